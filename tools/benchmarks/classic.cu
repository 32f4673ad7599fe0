// The design that most implementations of the operator share, as the baseline of our kernels: one thread per output
// channel, which computes the position of every sample for itself; atomics for the gradient of value, and a sum over
// the threads of a block, one per channel, for the gradients of locations and weights. float32 only.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace {

struct Sizes {
  int tokens, heads, channels, queries, levels, points;
};

struct Bilinear {
  int offset[4];  // token index, or -1 outside
  float weight[4], dx[4], dy[4];
};

__device__ Bilinear locate(float x, float y, int height, int width, int start) {
  Bilinear b;
  x = x * width - 0.5f;
  y = y * height - 0.5f;
  const bool inside = x > -1 && y > -1 && x < width && y < height;
  const int x0 = floorf(x), y0 = floorf(y);
  const float fx = x - x0, fy = y - y0;
  for (int k = 0; k < 4; ++k) {
    const int cx = x0 + k % 2, cy = y0 + k / 2;
    const float wx = k % 2 ? fx : 1 - fx, wy = k / 2 ? fy : 1 - fy;
    const bool valid = inside && cx >= 0 && cy >= 0 && cx < width && cy < height;
    b.offset[k] = valid ? start + cy * width + cx : -1;
    b.weight[k] = wx * wy;
    b.dx[k] = k % 2 ? wy : -wy;
    b.dy[k] = k / 2 ? wx : -wx;
  }
  return b;
}

__global__ void classic_forward(int64_t count, Sizes n, const int64_t* level, const float* value,
                                const float* locations, const float* weights, float* output) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / n.channels, image = row / n.heads / n.queries;
    const int channel = i % n.channels, head = row % n.heads;
    float sum = 0;
    for (int l = 0; l < n.levels; ++l) {
      const int height = level[3 * l], width = level[3 * l + 1], start = level[3 * l + 2];
      for (int p = 0; p < n.points; ++p) {
        const int64_t sample = (row * n.levels + l) * n.points + p;
        const Bilinear b = locate(locations[2 * sample], locations[2 * sample + 1], height, width, start);
        float mixed = 0;
        for (int k = 0; k < 4; ++k) {
          if (b.offset[k] < 0) continue;
          mixed += b.weight[k] * value[((image * n.tokens + b.offset[k]) * n.heads + head) * n.channels + channel];
        }
        sum += weights[sample] * mixed;
      }
    }
    output[i] = sum;
  }
}

// One block per row, one thread per channel.
__global__ void classic_backward(Sizes n, const int64_t* level, const float* grad_output, const float* value,
                                 const float* locations, const float* weights, float* grad_value,
                                 float* grad_locations, float* grad_weights) {
  extern __shared__ float parts[];  // (3, channels)
  const int64_t row = blockIdx.x, image = row / n.heads / n.queries;
  const int channel = threadIdx.x, head = row % n.heads;
  const float grad = grad_output[row * n.channels + channel];
  for (int l = 0; l < n.levels; ++l) {
    const int height = level[3 * l], width = level[3 * l + 1], start = level[3 * l + 2];
    for (int p = 0; p < n.points; ++p) {
      const int64_t sample = (row * n.levels + l) * n.points + p;
      const Bilinear b = locate(locations[2 * sample], locations[2 * sample + 1], height, width, start);
      float mixed = 0, along_x = 0, along_y = 0;
      for (int k = 0; k < 4; ++k) {
        if (b.offset[k] < 0) continue;
        const int64_t at = ((image * n.tokens + b.offset[k]) * n.heads + head) * n.channels + channel;
        mixed += b.weight[k] * value[at];
        along_x += b.dx[k] * value[at];
        along_y += b.dy[k] * value[at];
        atomicAdd(grad_value + at, b.weight[k] * weights[sample] * grad);
      }
      parts[channel] = grad * mixed;
      parts[channel + n.channels] = grad * weights[sample] * width * along_x;
      parts[channel + 2 * n.channels] = grad * weights[sample] * height * along_y;
      __syncthreads();
      for (int step = blockDim.x / 2; step > 0; step /= 2) {  // channels: a power of two
        for (int k = 0; k < 3 && channel < step; ++k) {
          parts[channel + k * n.channels] += parts[channel + step + k * n.channels];
        }
        __syncthreads();
      }
      if (channel == 0) {
        grad_weights[sample] = parts[0];
        grad_locations[2 * sample] = parts[n.channels];
        grad_locations[2 * sample + 1] = parts[2 * n.channels];
      }
      __syncthreads();
    }
  }
}

}  // namespace

// sizes: B, S, H, D, Q, L, P; level: (L, 3) height, width, first token, on the GPU. Returns the CUDA error.
extern "C" int classic_run_forward(const int64_t* sizes, const int64_t* level, const float* value,
                                   const float* locations, const float* weights, float* output, cudaStream_t stream) {
  const Sizes n{int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[4]), int(sizes[5]), int(sizes[6])};
  const int64_t count = sizes[0] * n.queries * n.heads * n.channels;
  classic_forward<<<(count + 1023) / 1024, 1024, 0, stream>>>(count, n, level, value, locations, weights, output);
  return cudaGetLastError();
}

extern "C" int classic_run_backward(const int64_t* sizes, const int64_t* level, const float* grad_output,
                                    const float* value, const float* locations, const float* weights,
                                    float* grad_value, float* grad_locations, float* grad_weights,
                                    cudaStream_t stream) {
  const Sizes n{int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[4]), int(sizes[5]), int(sizes[6])};
  const int64_t rows = sizes[0] * n.queries * n.heads;
  classic_backward<<<rows, n.channels, 3 * n.channels * sizeof(float), stream>>>(
      n, level, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights);
  return cudaGetLastError();
}
