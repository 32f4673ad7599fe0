// Where the samples of a block lie, computed by all its threads together, and the way back to the gradients of
// locations and weights.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda_kernels.h"

namespace msda {
namespace {

constexpr int kThreads = 256;

template <typename Value>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;
template <typename T>
constexpr bool kIsBrain = std::is_same_v<T, __nv_bfloat16>;

template <typename T>
__device__ inline typename SumOf<T>::type widen(T x) {
  if constexpr (kIsHalf<T>) {
    return __half2float(x);
  } else if constexpr (kIsBrain<T>) {
    return __bfloat162float(x);
  } else {
    return x;
  }
}

template <typename T>
__device__ inline T narrow(typename SumOf<T>::type x) {
  if constexpr (kIsHalf<T>) {
    return __float2half_rn(x);
  } else if constexpr (kIsBrain<T>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T at[Count];
};

template <typename Sum>
struct Quad {
  Sum at[4];  // corners in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1)
};

// Where one sample lies.
template <typename Sum>
struct Place {
  bool inside;
  Sum fx, fy, x0_valid, x1_valid, y0_valid, y1_valid, attention;
  int32_t row[4];  // token index of each corner; one outside the level is read where its neighbour inside is
};

template <typename Sum>
__device__ inline Place<Sum> place(const CudaProblem& p, int64_t row, int sample, const CudaLevel& level) {
  const int64_t index = row * (p.levels * p.points) + sample;
  const Pack<Sum, 2> location = static_cast<const Pack<Sum, 2>*>(p.locations)[index];
  const Sum width = level.width, height = level.height;
  Sum x = location.at[0] * width - Sum(0.5), y = location.at[1] * height - Sum(0.5);
  Place<Sum> out;
  out.inside = x >= -1 && y >= -1 && x < width && y < height;  // false for NaN too
  x = out.inside ? x : Sum(0);
  y = out.inside ? y : Sum(0);
  const Sum x0 = floor(x), y0 = floor(y);
  out.fx = x - x0;
  out.fy = y - y0;
  out.x0_valid = x0 >= 0;
  out.y0_valid = y0 >= 0;
  out.x1_valid = x0 + 1 < width;
  out.y1_valid = y0 + 1 < height;
  out.attention = out.inside ? static_cast<const Sum*>(p.weights)[index] : Sum(0);
  const int xa = static_cast<int>(x0 >= 0 ? x0 : Sum(0)), xb = static_cast<int>(x0 + out.x1_valid);
  const int ya = static_cast<int>(y0 >= 0 ? y0 : Sum(0)), yb = static_cast<int>(y0 + out.y1_valid);
  const int32_t top = level.start + ya * level.width, bottom = level.start + yb * level.width;
  out.row[0] = top + xa;
  out.row[1] = top + xb;
  out.row[2] = bottom + xa;
  out.row[3] = bottom + xb;
  return out;
}

// Samples of the rows of this block, a chunk at a time.
template <typename Sum, int Rows, int Chunk>
struct Shared {
  Quad<Sum> weight[Rows][Chunk];
  int4 token[Rows][Chunk];  // x < 0: nothing is sampled
};

template <typename Sum, int Rows, int Chunk>
__device__ inline void place_chunk(const CudaProblem& p, int64_t first_row, int first_sample,
                                   Shared<Sum, Rows, Chunk>& shared) {
  const int samples = p.levels * p.points;
  for (int slot = threadIdx.x; slot < Rows * Chunk; slot += kThreads) {
    const int r = slot / Chunk, s = slot % Chunk, sample = first_sample + s;
    if (first_row + r >= p.rows || sample >= samples) continue;
    const Place<Sum> at = place<Sum>(p, first_row + r, sample, p.level[sample / p.points]);
    const Sum left = (1 - at.fx) * at.x0_valid, right = at.fx * at.x1_valid;
    const Sum top = (1 - at.fy) * at.y0_valid * at.attention, bottom = at.fy * at.y1_valid * at.attention;
    shared.weight[r][s] = {top * left, top * right, bottom * left, bottom * right};
    shared.token[r][s] = at.inside ? make_int4(at.row[0], at.row[1], at.row[2], at.row[3]) : make_int4(-1, 0, 0, 0);
  }
}

// Gradients of locations and weights of a chunk, from <grad_output, value> at the four corners of every sample.
template <typename Sum, int Rows, int Chunk>
__device__ inline void finish_chunk(const CudaProblem& p, int64_t first_row, int first_sample,
                                    const Quad<Sum> (&dots)[Rows][Chunk]) {
  const int samples = p.levels * p.points;
  for (int slot = threadIdx.x; slot < Rows * Chunk; slot += kThreads) {
    const int r = slot / Chunk, sample = first_sample + slot % Chunk;
    if (first_row + r >= p.rows || sample >= samples) continue;
    const CudaLevel& level = p.level[sample / p.points];
    const Place<Sum> at = place<Sum>(p, first_row + r, sample, level);
    const Quad<Sum> dot = dots[r][slot % Chunk];
    const Sum zero = 0;
    const Sum d0 = at.inside ? dot.at[0] * at.y0_valid * at.x0_valid : zero;
    const Sum d1 = at.inside ? dot.at[1] * at.y0_valid * at.x1_valid : zero;
    const Sum d2 = at.inside ? dot.at[2] * at.y1_valid * at.x0_valid : zero;
    const Sum d3 = at.inside ? dot.at[3] * at.y1_valid * at.x1_valid : zero;
    const Sum along_top = d0 + at.fx * (d1 - d0), along_bottom = d2 + at.fx * (d3 - d2);
    const int64_t index = (first_row + r) * samples + sample;
    static_cast<Sum*>(p.grad_weights)[index] = along_top + at.fy * (along_bottom - along_top);
    Pack<Sum, 2> grad;
    grad.at[0] = at.attention * level.width * ((1 - at.fy) * (d1 - d0) + at.fy * (d3 - d2));
    grad.at[1] = at.attention * level.height * (along_bottom - along_top);
    static_cast<Pack<Sum, 2>*>(p.grad_locations)[index] = grad;
  }
}

}  // namespace
}  // namespace msda
