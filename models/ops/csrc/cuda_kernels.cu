// Forward and backward on the GPU. Compiled once per value type: MSDA_VALUE is its name.
//
// A block owns kRows output rows (image, query, head). Its threads first place the samples of all rows together, one
// sample each, and leave corners and weights in shared memory; then a group of threads per row, each with 16 bytes of
// the channels, walks through the samples. The backward pass adds to grad_value with atomics (vectors of four floats
// from compute capability 9.0 on), or to integers where the result must not depend on the order.
#include <algorithm>
#include <type_traits>

#include "cuda_kernels.h"
#include "cuda_samples.cuh"

namespace msda {
namespace {

constexpr int kSlots = 512;  // samples in shared memory at a time
constexpr int kMaxChunk = 16;
constexpr int64_t kMaxBlocks = 1 << 30;  // the rest is left to the grid-stride loop

// Kernel shape: Count channels per thread, Group threads per row; Loop: the group covers D in several steps.
template <typename ValueType, int CountPerThread, int GroupSize, bool LoopOverChannels>
struct Shape {
  using Value = ValueType;
  using Sum = typename SumOf<Value>::type;
  static constexpr int kCount = CountPerThread, kGroup = GroupSize, kRows = kThreads / GroupSize;
  static constexpr int kChunk = kSlots / kRows < kMaxChunk ? kSlots / kRows : kMaxChunk;
  static constexpr bool kLoop = LoopOverChannels;
};

template <typename S>
__device__ inline const typename S::Value* head_of(const CudaProblem& p, int64_t row) {
  const int64_t image = row / p.rows_per_image, head = row % p.heads;
  return static_cast<const typename S::Value*>(p.value) + (image * p.tokens * p.heads + head) * p.channels;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ CudaProblem p) {
  using Value = typename S::Value;
  using Sum = typename S::Sum;
  using Values = Pack<Value, S::kCount>;
  __shared__ Shared<Sum, S::kRows, S::kChunk> shared;
  const int r = threadIdx.x / S::kGroup, samples = p.levels * p.points;
  const int64_t stride = static_cast<int64_t>(p.heads) * p.channels;
  for (int64_t first_row = int64_t(blockIdx.x) * S::kRows; first_row < p.rows;
       first_row += int64_t(gridDim.x) * S::kRows) {
    const int64_t row = first_row + r;
    const Value* value = head_of<S>(p, row < p.rows ? row : 0);
    for (int step = 0; step < p.channels; step += S::kGroup * S::kCount) {
      const int channel = step + (threadIdx.x % S::kGroup) * S::kCount;
      const bool active = row < p.rows && (!S::kLoop || channel < p.channels);
      Sum sum[S::kCount] = {};
      for (int first = 0; first < samples; first += S::kChunk) {
        __syncthreads();  // everyone has read the last chunk
        place_chunk(p, first_row, first, shared);
        __syncthreads();
        const int chunk = active ? min(S::kChunk, samples - first) : 0;
        for (int i = 0; i < chunk; ++i) {
          const int4 token = shared.token[r][i];
          if (token.x < 0) continue;
          const Quad<Sum> weight = shared.weight[r][i];
          const int tokens[4] = {token.x, token.y, token.z, token.w};
          Values values[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) values[k] = *reinterpret_cast<const Values*>(value + tokens[k] * stride + channel);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int c = 0; c < S::kCount; ++c) sum[c] += weight.at[k] * widen(values[k].at[c]);
          }
        }
      }
      if (active) {
        Values out;
#pragma unroll
        for (int c = 0; c < S::kCount; ++c) out.at[c] = narrow<Value>(sum[c]);
        *reinterpret_cast<Values*>(static_cast<Value*>(p.output) + row * p.channels + channel) = out;
      }
    }
  }
}

// Sums each of dot[4] over the group; the lane that returns true holds in dot[0] the sum of `corner`. Every exchange
// halves the number of values a lane is responsible for: 4 shuffles for 8 lanes instead of 12.
template <typename Sum, int Group>
__device__ inline bool sum_over_group(Sum (&dot)[4], int lane, unsigned mask, int& corner) {
  static_assert(Group >= 4, "smaller groups sum each corner by itself");
  const bool upper = lane & (Group / 2), odd = lane & (Group / 4);
  const Sum first = (upper ? dot[2] : dot[0]) + __shfl_xor_sync(mask, upper ? dot[0] : dot[2], Group / 2);
  const Sum second = (upper ? dot[3] : dot[1]) + __shfl_xor_sync(mask, upper ? dot[1] : dot[3], Group / 2);
  Sum sum = (odd ? second : first) + __shfl_xor_sync(mask, odd ? first : second, Group / 4);
  if constexpr (Group >= 8) {
#pragma unroll
    for (int step = Group / 8; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  }
  dot[0] = sum;
  corner = 2 * upper + odd;
  return lane % (Group / 4) == 0;
}

template <typename Sum>
__device__ inline unsigned long long to_fixed_point(Sum x) {
  if constexpr (std::is_same_v<Sum, float>) {
    return static_cast<unsigned long long>(__float2ll_rn(x));
  } else {
    return static_cast<unsigned long long>(__double2ll_rn(x));
  }
}

#if __CUDA_ARCH__ >= 900
constexpr bool kHasVectorAtomics = true;
#else
constexpr bool kHasVectorAtomics = false;
#endif

template <typename Sum, int Count>
__device__ inline void add(Sum* out, const Sum (&x)[Count]) {
  if constexpr (kHasVectorAtomics && std::is_same_v<Sum, float> && Count % 4 == 0) {
#pragma unroll
    for (int c = 0; c < Count; c += 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(out + c), "f"(x[c]),
                   "f"(x[c + 1]), "f"(x[c + 2]), "f"(x[c + 3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int c = 0; c < Count; ++c) atomicAdd(out + c, x[c]);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ CudaProblem p) {
  using Value = typename S::Value;
  using Sum = typename S::Sum;
  using Values = Pack<Value, S::kCount>;
  __shared__ Shared<Sum, S::kRows, S::kChunk> shared;
  __shared__ Quad<Sum> dots[S::kRows][S::kChunk];
  const int r = threadIdx.x / S::kGroup, lane = threadIdx.x % S::kGroup, samples = p.levels * p.points;
  const unsigned mask = (0xffffffffu >> (32 - S::kGroup)) << (threadIdx.x % 32 - lane);
  const int64_t stride = static_cast<int64_t>(p.heads) * p.channels;
  const Sum scale = p.scale ? *static_cast<const Sum*>(p.scale) : Sum(1);
  for (int64_t first_row = int64_t(blockIdx.x) * S::kRows; first_row < p.rows;
       first_row += int64_t(gridDim.x) * S::kRows) {
    const int64_t row = first_row + r;
    const bool active = row < p.rows;
    const Value* value = head_of<S>(p, active ? row : 0);
    const int64_t origin = value - static_cast<const Value*>(p.value);
    const Value* grad_row = static_cast<const Value*>(p.grad_output) + (active ? row : 0) * p.channels;
    for (int first = 0; first < samples; first += S::kChunk) {
      __syncthreads();  // everyone has read the last chunk
      place_chunk(p, first_row, first, shared);
      __syncthreads();
      const int chunk = active ? min(S::kChunk, samples - first) : 0;
      for (int i = 0; i < chunk; ++i) {
        const int4 token = shared.token[r][i];
        if (token.x < 0) continue;  // the same for the whole group
        const Quad<Sum> weight = shared.weight[r][i];
        const int tokens[4] = {token.x, token.y, token.z, token.w};
        Sum dot[4] = {};
        for (int channel = lane * S::kCount; channel < p.channels; channel += S::kGroup * S::kCount) {
          const Values packed = *reinterpret_cast<const Values*>(grad_row + channel);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int64_t at = tokens[k] * stride + channel;
            const Values values = *reinterpret_cast<const Values*>(value + at);
            Sum share[S::kCount];
#pragma unroll
            for (int c = 0; c < S::kCount; ++c) {
              const Sum grad = widen(packed.at[c]);
              dot[k] += grad * widen(values.at[c]);
              share[c] = weight.at[k] * grad;
            }
            if (weight.at[k] == Sum(0)) continue;
            if (p.fixed_point) {
#pragma unroll
              for (int c = 0; c < S::kCount; ++c) {
                atomicAdd(p.fixed_point + origin + at + c, to_fixed_point(share[c] * scale));
              }
            } else {
              add(static_cast<Sum*>(p.grad_value) + origin + at, share);
            }
          }
        }
        if constexpr (S::kGroup >= 4) {
          int corner;
          if (sum_over_group<Sum, S::kGroup>(dot, lane, mask, corner)) dots[r][i].at[corner] = dot[0];
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            for (int step = S::kGroup / 2; step > 0; step /= 2) dot[k] += __shfl_xor_sync(mask, dot[k], step);
            if (lane == 0) dots[r][i].at[k] = dot[k];
          }
        }
      }
      __syncthreads();
      finish_chunk<Sum, S::kRows, S::kChunk>(p, first_row, first, dots);
    }
  }
}

template <typename S>
cudaError_t launch(const CudaProblem& p, cudaStream_t stream, bool backward) {
  const int64_t blocks = std::min((p.rows + S::kRows - 1) / S::kRows, kMaxBlocks);
  if (backward) {
    backward_kernel<S><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  } else {
    forward_kernel<S><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The fast paths read 16 bytes at a time; every other head size, or a view that begins in between, goes by elements.
template <typename Value>
cudaError_t choose(const CudaProblem& p, cudaStream_t stream, bool backward) {
  constexpr int kCount = 16 / sizeof(Value);
  if (p.rows == 0) return cudaSuccess;
  if (aligned(p.value) && aligned(p.output) && aligned(p.grad_output) && aligned(p.grad_value)) {
    switch (p.channels) {
      case 16: return launch<Shape<Value, kCount, 16 / kCount, false>>(p, stream, backward);
      case 32: return launch<Shape<Value, kCount, 32 / kCount, false>>(p, stream, backward);
      case 64: return launch<Shape<Value, kCount, 64 / kCount, false>>(p, stream, backward);
    }
  }
  return launch<Shape<Value, 1, 32, true>>(p, stream, backward);
}

using f32 = float;
using f64 = double;
using f16 = __half;
using bf16 = __nv_bfloat16;

}  // namespace

#define MSDA_JOIN(a, b) a##b
#define MSDA_NAME(a, b) MSDA_JOIN(a, b)
cudaError_t MSDA_NAME(forward_, MSDA_VALUE)(const CudaProblem& p, cudaStream_t s) {
  return choose<MSDA_VALUE>(p, s, false);
}
cudaError_t MSDA_NAME(backward_, MSDA_VALUE)(const CudaProblem& p, cudaStream_t s) {
  return choose<MSDA_VALUE>(p, s, true);
}

}  // namespace msda
