// Runs CUDA kernels on the CPU, for tests on machines without a GPU: every thread of a block is a coroutine that runs
// until it waits, at a barrier or for the lanes it exchanges values with. Shows errors of logic and of memory access
// (under a sanitizer), not of timing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(x)
#define __grid_constant__

using std::floor;
using std::min;

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, gridDim;

struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulation {

constexpr int kStack = 1 << 16;
enum class State { ready, barrier, exchange, done };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  State state;
  int64_t exchanges;
  uint64_t sent[2];  // of the last two exchanges: a partner can be one ahead
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline void (*body)();

inline void wait(State state) {
  Thread& me = threads[threadIdx.x];
  me.state = state;
  swapcontext(&me.context, &scheduler);
}

inline void start() {
  body();
  wait(State::done);
}

inline void run_block(unsigned size) {
  threads.resize(size);
  for (Thread& t : threads) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    t.state = State::ready;
    t.exchanges = 0;
    makecontext(&t.context, start, 0);
  }
  for (;;) {
    unsigned at_barrier = 0, done = 0;
    for (unsigned i = 0; i < size; ++i) {
      if (threads[i].state == State::ready || threads[i].state == State::exchange) {
        threadIdx.x = i;
        swapcontext(&scheduler, &threads[i].context);
      }
      at_barrier += threads[i].state == State::barrier;
      done += threads[i].state == State::done;
    }
    if (done == size) return;
    if (at_barrier == size) {
      for (Thread& t : threads) t.state = State::ready;
    } else if (at_barrier + done == size) {
      std::fprintf(stderr, "some threads left while others wait at a barrier\n");
      std::abort();
    }
  }
}

template <typename Kernel, typename Problem>
void launch(Kernel kernel, unsigned blocks, unsigned size, const Problem& problem) {
  static Kernel current_kernel;
  static const Problem* current_problem;
  current_kernel = kernel;
  current_problem = &problem;
  body = [] { current_kernel(*current_problem); };
  gridDim.x = std::min(blocks, 3u);  // so few that the grid-stride loop has work
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(size);
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::barrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  using namespace emulation;
  const unsigned me = threadIdx.x, warp = me / 32 * 32;
  Thread& self = threads[me];
  const int64_t turn = self.exchanges++;
  std::memcpy(&self.sent[turn % 2], &value, sizeof(T));
  if (!(mask >> (me % 32) & 1) || !(mask >> ((me ^ step) % 32) & 1)) {
    std::fprintf(stderr, "lane %u exchanges with %u outside the mask %x\n", me, me ^ step, mask);
    std::abort();
  }
  for (bool complete = false; !complete;) {
    complete = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1 && threads[warp + lane].exchanges <= turn) complete = false;
    }
    if (!complete) wait(State::exchange);
  }
  T received;
  std::memcpy(&received, &threads[me ^ step].sent[turn % 2], sizeof(T));
  return received;
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
