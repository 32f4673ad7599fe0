// What the CUDA kernels need to know, without torch: nvcc then compiles them in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msda {

constexpr int kMaxLevels = 16;

struct CudaLevel {
  int32_t height, width, start;
};

// One call. Locations, weights and all gradients but fixed_point are double for double values and float otherwise;
// value, output and grad_output have the value type. All arrays are contiguous, shapes as in ms_deform_attn.py.
struct CudaProblem {
  int64_t rows;  // B * Q * H: one row of D outputs each
  int64_t rows_per_image;
  int64_t tokens;
  int32_t heads, channels, levels, points;
  CudaLevel level[kMaxLevels];
  const void* value;
  const void* locations;
  const void* weights;
  void* output;             // forward only
  const void* grad_output;  // backward only, like the following
  void* grad_value;         // null in a deterministic backward pass, which adds to fixed_point instead
  void* grad_locations;
  void* grad_weights;
  unsigned long long* fixed_point;  // grad_value x *scale, rounded: sums of integers do not depend on their order
  const void* scale;
};

using CudaKernel = cudaError_t (*)(const CudaProblem&, cudaStream_t);

#define MSDA_DECLARE(type)                                            \
  cudaError_t forward_##type(const CudaProblem& p, cudaStream_t s);   \
  cudaError_t backward_##type(const CudaProblem& p, cudaStream_t s);
MSDA_DECLARE(f32)
MSDA_DECLARE(f64)
MSDA_DECLARE(f16)
MSDA_DECLARE(bf16)
#undef MSDA_DECLARE

}  // namespace msda
