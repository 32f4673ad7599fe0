// CUDA implementation of the kernels' schemas. A library of its own: a torch without CUDA cannot load it.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "cuda_kernels.h"

// Read by library.py before it loads the file.
extern "C" __attribute__((visibility("default"), used)) const char msda_cuda_built_for[] = "MSDA_BUILT_FOR:" MSDA_MARK;

namespace msda {
namespace {

using at::Tensor;

struct CudaKernels {
  CudaKernel forward, backward;
};

CudaKernels kernels_for(const Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat: return {forward_f32, backward_f32};
    case at::kDouble: return {forward_f64, backward_f64};
    case at::kHalf: return {forward_f16, backward_f16};
    case at::kBFloat16: return {forward_bf16, backward_bf16};
    default: TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16 value, got ", value.scalar_type());
  }
}

at::ScalarType sum_type(const Tensor& value) { return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The Python side has checked shapes and types; what is repeated here guards memory against other callers.
CudaProblem describe(const Tensor& value, at::IntArrayRef level_shapes, const Tensor& locations,
                     const Tensor& weights) {
  const int64_t levels = static_cast<int64_t>(level_shapes.size()) / 2;
  TORCH_CHECK(levels > 0 && levels <= kMaxLevels, "the CUDA kernels take 1 to ", kMaxLevels, " levels, got ", levels,
              ": set MSDA_BACKEND=triton for more");
  TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && locations.size(5) == 2,
              "expected value (B, S, H, D) and locations (B, Q, H, L, P, 2), got ", value.sizes(), " and ",
              locations.sizes());
  TORCH_CHECK(weights.sizes() == locations.sizes().slice(0, 5) && locations.size(0) == value.size(0) &&
                  locations.size(2) == value.size(2) && locations.size(3) == levels,
              "expected weights (B, Q, H, L, P), got ", weights.sizes(), " for locations ", locations.sizes());
  TORCH_CHECK(value.is_cuda() && locations.device() == value.device() && weights.device() == value.device(),
              "expected all tensors on one GPU, got ", value.device(), ", ", locations.device(), " and ",
              weights.device());
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  CudaProblem p{};
  int64_t start = 0;
  for (int64_t i = 0; i < levels; ++i) {
    const int64_t height = level_shapes[2 * i], width = level_shapes[2 * i + 1];
    p.level[i] = {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start)};
    start += height * width;
  }
  TORCH_CHECK(start == value.size(1) && start < kMaxInt && value.size(3) < kMaxInt && levels * locations.size(4) < kMaxInt,
              "expected as many tokens as the levels hold and fewer than 2^31, got ", value.size(1));
  p.rows_per_image = locations.size(1) * locations.size(2);
  p.rows = locations.size(0) * p.rows_per_image;
  p.tokens = value.size(1);
  p.heads = static_cast<int32_t>(value.size(2));
  p.channels = static_cast<int32_t>(value.size(3));
  p.levels = static_cast<int32_t>(levels);
  p.points = static_cast<int32_t>(locations.size(4));
  p.value = value.const_data_ptr();
  p.locations = locations.const_data_ptr();
  p.weights = weights.const_data_ptr();
  return p;
}

Tensor forward(const Tensor& value, at::IntArrayRef level_shapes, const Tensor& locations, const Tensor& weights) {
  const c10::cuda::CUDAGuard guard(value.device());
  const Tensor v = value.contiguous(), l = locations.to(sum_type(value)).contiguous(),
               w = weights.to(sum_type(value)).contiguous();
  CudaProblem p = describe(v, level_shapes, l, w);
  Tensor output = at::empty({v.size(0), l.size(1), v.size(2) * v.size(3)}, v.options());
  p.output = output.mutable_data_ptr();
  C10_CUDA_CHECK(kernels_for(v).forward(p, c10::cuda::getCurrentCUDAStream()));
  return output;
}

// A power of two that lets the sum of all contributions to a token just fit into 63 bits. No contribution exceeds
// max |grad_output| x max |weight|, and a token gets at most one per sample. Stays on the GPU: no synchronisation.
Tensor fixed_point_scale(const Tensor& grad_output, const Tensor& weights, const CudaProblem& p) {
  const double samples = static_cast<double>(p.rows_per_image) / p.heads * p.levels * p.points;
  const double bits = 62 - std::ceil(std::log2(samples + 1));
  const Tensor bound = at::mul(grad_output.abs().amax().to(weights.scalar_type()), weights.abs().amax());
  // The limits keep the scale a normal number of its type even where all gradients are tiny or zero.
  return at::exp2(at::clamp(at::floor(at::rsub(at::log2(bound), bits)), -100, 100));
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef level_shapes, const Tensor& locations,
                                            const Tensor& weights) {
  const c10::cuda::CUDAGuard guard(value.device());
  const Tensor g = grad_output.contiguous(), v = value.contiguous(), l = locations.to(sum_type(value)).contiguous(),
               w = weights.to(sum_type(value)).contiguous();
  CudaProblem p = describe(v, level_shapes, l, w);
  TORCH_CHECK(g.device() == v.device() && g.scalar_type() == v.scalar_type() && g.numel() == p.rows * p.channels,
              "expected grad_output (B, Q, H * D) like value, got ", g.sizes(), " ", g.scalar_type(), " on ",
              g.device());
  const bool deterministic = at::globalContext().deterministicAlgorithms() && p.rows > 0;
  Tensor grad_locations = at::empty_like(l), grad_weights = at::empty_like(w), grad_value, fixed_point, scale;
  if (deterministic) {
    fixed_point = at::zeros(v.sizes(), v.options().dtype(at::kLong));
    scale = fixed_point_scale(g, w, p);
    p.fixed_point = reinterpret_cast<unsigned long long*>(fixed_point.mutable_data_ptr<int64_t>());
    p.scale = scale.const_data_ptr();
  } else {
    // Summed in full precision: a half type would lose small contributions to a large sum.
    grad_value = at::zeros(v.sizes(), l.options());
    p.grad_value = grad_value.mutable_data_ptr();
  }
  p.grad_output = g.const_data_ptr();
  p.grad_locations = grad_locations.mutable_data_ptr();
  p.grad_weights = grad_weights.mutable_data_ptr();
  C10_CUDA_CHECK(kernels_for(v).backward(p, c10::cuda::getCurrentCUDAStream()));
  if (deterministic) grad_value = fixed_point.to(at::kDouble).div_(scale.to(at::kDouble));
  return {grad_value.to(value.scalar_type()), grad_locations.to(locations.scalar_type()),
          grad_weights.to(weights.scalar_type())};
}

}  // namespace
}  // namespace msda

TORCH_LIBRARY_IMPL(dn_detr_kernels, CUDA, m) {
  m.impl("forward", msda::forward);
  m.impl("backward", msda::backward);
}
