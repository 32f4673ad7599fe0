// Schemas of the kernels and their CPU implementation: choose the instruction set, share the work among the threads.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"

// Read by library.py before it loads the file.
extern "C" __attribute__((visibility("default"), used)) const char msda_built_for[] = "MSDA_BUILT_FOR:" MSDA_MARK;

namespace msda {
namespace {

using at::Tensor;

// Ours follows torch's choice, so that ATEN_CPU_CAPABILITY governs both.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(MSDA_HAVE_X86)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512();
    if (capability == "AVX2") return kernels_avx2();
#endif
    return kernels_default();
  }();
  return chosen;
}

ValueType value_type(const Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat: return ValueType::f32;
    case at::kDouble: return ValueType::f64;
    case at::kBFloat16: return ValueType::bf16;
    default: TORCH_CHECK(false, "expected float32, float64 or bfloat16 value, got ", value.scalar_type());
  }
}

at::ScalarType sum_type(const Tensor& value) { return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

std::vector<Level> read_levels(at::IntArrayRef level_shapes) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i + 1 < level_shapes.size(); i += 2) {
    levels.push_back({level_shapes[i], level_shapes[i + 1], start});
    start += level_shapes[i] * level_shapes[i + 1];
  }
  return levels;
}

// The Python side has checked shapes and types; what is repeated here guards memory against other callers.
Problem describe(const Tensor& value, const std::vector<Level>& levels, const Tensor& locations,
                 const Tensor& weights) {
  TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && locations.size(5) == 2 && !levels.empty(),
              "expected value (B, S, H, D) and locations (B, Q, H, L, P, 2), got ", value.sizes(), " and ",
              locations.sizes());
  TORCH_CHECK(weights.sizes() == locations.sizes().slice(0, 5) && locations.size(0) == value.size(0) &&
                  locations.size(2) == value.size(2) && locations.size(3) == static_cast<int64_t>(levels.size()),
              "expected weights (B, Q, H, L, P), got ", weights.sizes(), " for locations ", locations.sizes());
  const Level& last = levels.back();
  TORCH_CHECK(last.start + last.height * last.width == value.size(1) &&
                  value.size(1) < std::numeric_limits<int32_t>::max(),
              "expected as many tokens as the levels hold and fewer than 2^31, got ", value.size(1));
  Problem p{};
  p.type = value_type(value);
  p.batch = value.size(0), p.tokens = value.size(1), p.heads = value.size(2), p.channels = value.size(3);
  p.queries = locations.size(1), p.levels = locations.size(3), p.points = locations.size(4);
  p.level = levels.data();
  p.value = value.const_data_ptr();
  p.locations = locations.const_data_ptr();
  p.weights = weights.const_data_ptr();
  return p;
}

Tensor forward(const Tensor& value, at::IntArrayRef level_shapes, const Tensor& locations, const Tensor& weights) {
  if (value.scalar_type() == at::kHalf) {  // too rare on CPUs for kernels of its own
    return forward(value.to(at::kFloat), level_shapes, locations, weights).to(at::kHalf);
  }
  const std::vector<Level> levels = read_levels(level_shapes);
  const Tensor v = value.contiguous(), l = locations.to(sum_type(value)).contiguous(),
               w = weights.to(sum_type(value)).contiguous();
  Problem p = describe(v, levels, l, w);
  Tensor output = at::empty({p.batch, p.queries, p.heads * p.channels}, value.options());
  p.output = output.mutable_data_ptr();
  const Kernel kernel = kernels().forward;
  at::parallel_for(0, p.batch * p.heads * p.queries, 64,
                   [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef level_shapes, const Tensor& locations,
                                            const Tensor& weights) {
  if (value.scalar_type() == at::kHalf) {
    auto [grad_value, grad_locations, grad_weights] =
        backward(grad_output.to(at::kFloat), value.to(at::kFloat), level_shapes, locations, weights);
    return {grad_value.to(at::kHalf), grad_locations, grad_weights};
  }
  const std::vector<Level> levels = read_levels(level_shapes);
  const Tensor g = grad_output.contiguous(), v = value.contiguous(), l = locations.to(sum_type(value)).contiguous(),
               w = weights.to(sum_type(value)).contiguous();
  Problem p = describe(v, levels, l, w);
  TORCH_CHECK(g.scalar_type() == v.scalar_type() && g.numel() == p.batch * p.queries * p.heads * p.channels,
              "expected grad_output (B, Q, H * D) in the type of value, got ", g.sizes(), " ", g.scalar_type());
  // grad_value is summed in full precision: bfloat16 would lose small contributions to a large sum.
  Tensor grad_value = at::empty(v.sizes(), l.options()), grad_locations = at::empty_like(l),
         grad_weights = at::empty_like(w);
  p.grad_output = g.const_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_locations = grad_locations.mutable_data_ptr();
  p.grad_weights = grad_weights.mutable_data_ptr();
  const Kernel kernel = kernels().backward;
  at::parallel_for(0, p.batch * p.heads * p.levels, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {grad_value.to(value.scalar_type()), grad_locations.to(locations.scalar_type()),
          grad_weights.to(weights.scalar_type())};
}

}  // namespace
}  // namespace msda

TORCH_LIBRARY(dn_detr_kernels, m) {
  m.def("forward(Tensor value, int[] level_shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "backward(Tensor grad_output, Tensor value, int[] level_shapes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dn_detr_kernels, CPU, m) {
  m.impl("forward", msda::forward);
  m.impl("backward", msda::backward);
}
