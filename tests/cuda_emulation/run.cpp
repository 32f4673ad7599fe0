// Entry points for ctypes: fill in a problem and run an emulated kernel.
#include "cuda_kernels.h"

extern "C" int run(const char* type, int backward, int64_t batch, int64_t queries, const int64_t* sizes,
                   const int32_t* levels, void** arrays) {
  msda::CudaProblem p{};
  p.tokens = sizes[0];
  p.heads = sizes[1], p.channels = sizes[2], p.levels = sizes[3], p.points = sizes[4];
  p.rows_per_image = queries * p.heads;
  p.rows = batch * p.rows_per_image;
  for (int i = 0; i < p.levels; ++i) p.level[i] = {levels[3 * i], levels[3 * i + 1], levels[3 * i + 2]};
  p.value = arrays[0], p.locations = arrays[1], p.weights = arrays[2], p.output = arrays[3];
  p.grad_output = arrays[4], p.grad_value = arrays[5], p.grad_locations = arrays[6], p.grad_weights = arrays[7];
  p.fixed_point = static_cast<unsigned long long*>(arrays[8]), p.scale = arrays[9];
  switch (type[0] * 10 + type[1]) {
    case 'f' * 10 + '3': return (backward ? msda::backward_f32 : msda::forward_f32)(p, nullptr);
    case 'f' * 10 + '6': return (backward ? msda::backward_f64 : msda::forward_f64)(p, nullptr);
    case 'f' * 10 + '1': return (backward ? msda::backward_f16 : msda::forward_f16)(p, nullptr);
    case 'b' * 10 + 'f': return (backward ? msda::backward_bf16 : msda::forward_bf16)(p, nullptr);
  }
  return -1;
}
