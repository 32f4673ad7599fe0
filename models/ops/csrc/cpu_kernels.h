// What the CPU kernels need to know, without torch: cpu_kernels.cpp is compiled once per instruction set, and a
// header-only function of torch compiled for AVX-512 must not end up in the path of an older processor.
#pragma once

#include <cstdint>

namespace msda {

struct Level {
  int64_t height, width, start;
};

enum class ValueType { f32, f64, bf16 };

// One call. Sums, locations, weights and all gradients are double for f64 and float otherwise; value and output have
// the value type. All arrays are contiguous, shapes as in ms_deform_attn.py.
struct Problem {
  ValueType type;
  int64_t batch, tokens, heads, channels, queries, levels, points;
  const Level* level;
  const void* value;
  const void* locations;
  const void* weights;
  void* output;             // forward only
  const void* grad_output;  // backward only, like the following
  void* grad_value;
  void* grad_locations;
  void* grad_weights;
};

// forward: output of the flat (batch, head, query) positions [begin, end).
// backward: all gradients of the flat (batch, head, level) positions [begin, end), whoever computes the others. Each
// of them owns its rows of grad_value and adds to them in the order of the queries: same bits for any split.
using Kernel = void (*)(const Problem&, int64_t begin, int64_t end);

struct Kernels {
  Kernel forward, backward;
};

Kernels kernels_default();
#if defined(MSDA_HAVE_X86)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace msda
