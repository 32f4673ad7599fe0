// Forward and backward on the CPU, vectorised over channels. Compiled once per instruction set: MSDA_KERNELS is the
// name of the function that returns the kernels.
#include "cpu_kernels.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "samples.h"
#include "vec.h"

namespace msda {
namespace {

// out[c] = sum over samples and corners of weight x value, for Count vectors of channels (part > 0: for one vector of
// which only the first `part` channels exist).
template <int Count, typename Value, typename Samples>
void gather(const Value* value, int64_t row_stride, const Samples& samples, Value* out, int part) {
  using Sum = typename Types<Value>::Sum;
  Vec<Sum> sums[Count][2] = {};  // two chains of additions each: one would wait for its own result
  for (int64_t i = 0; i < samples.size; ++i) {
    if (!samples.inside(i)) continue;
    for (int corner = 0; corner < kCorners; ++corner) {
      const Value* token = value + samples.row(i, corner) * row_stride;
      const Sum weight = samples.weight(i, corner);
      for (int v = 0; v < Count; ++v) {
        const Vec<Sum> x = part ? load_part(token, part) : load(token + v * kLanes<Sum>);
        sums[v][corner & 1] += weight * x;
      }
    }
  }
  for (int v = 0; v < Count; ++v) {
    const Vec<Sum> sum = sums[v][0] + sums[v][1];
    if (part) {
      store_part(out, sum, part);
    } else {
      store(out + v * kLanes<Sum>, sum);
    }
  }
}

// For the samples [begin, end): adds weight x grad_output to the tokens of grad_value and <grad_output, value> to
// dot (N, 4); channels as in gather.
template <int Count, typename Value, typename Sum, typename Samples>
void scatter(const Value* __restrict value, int64_t row_stride, const Samples& samples, const Value* grad_output,
             int64_t begin, int64_t end, Sum* grad_value, Sum* dot, int part) {
  Vec<Sum> grad[Count];
  for (int v = 0; v < Count; ++v) {
    grad[v] = part ? load_part(grad_output, part) : load(grad_output + v * kLanes<Sum>);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (!samples.inside(i)) continue;
    Vec<Sum> products[kCorners] = {};
    for (int corner = 0; corner < kCorners; ++corner) {
      const int64_t offset = samples.row(i, corner) * row_stride;
      const Value* token = value + offset;
      Sum* grad_token = grad_value + offset;
      const Sum weight = samples.weight(i, corner);
      for (int v = 0; v < Count; ++v) {
        const int at = v * kLanes<Sum>;
        if (part) {
          products[corner] += grad[v] * load_part(token, part);
          store_part(grad_token, load_part(grad_token, part) + weight * grad[v], part);
        } else {
          products[corner] += grad[v] * load(token + at);
          store(grad_token + at, load(grad_token + at) + weight * grad[v]);
        }
      }
    }
    add_lane_sums(products, dot + i * kCorners);
  }
}

// Calls step(count, channel, part) for chunks of 4, 2 or 1 vectors that cover the channels; count is a constant type.
template <int Count>
struct Constant {
  static constexpr int value = Count;
};

template <int Lanes, typename Step>
inline void for_channels(int64_t channels, const Step& step) {
  int64_t at = 0;
  for (; channels - at >= 4 * Lanes; at += 4 * Lanes) step(Constant<4>{}, at, 0);
  if (channels - at >= 2 * Lanes) step(Constant<2>{}, at, 0), at += 2 * Lanes;
  if (channels - at >= Lanes) step(Constant<1>{}, at, 0), at += Lanes;
  if (at < channels) step(Constant<1>{}, at, static_cast<int>(channels - at));
}

// The tokens of one head lie H * D apart. Where H * D is a power of two, as it nearly always is, they share a few sets
// of the cache and push each other out. Copied together, many more fit: worth it where each is used often.
constexpr int64_t kUsesThatPayForACopy = 8;

template <typename T>
struct Tokens {
  T* data;
  int64_t stride;
};

// The rows of one head of a (B, S, H, D) array, and a place for a copy of them that serves head after head.
template <typename T>
class HeadRows {
 public:
  HeadRows(const Problem& p, int64_t uses) : channels_(p.channels), stride_(p.heads * p.channels) {
    if (p.heads > 1 && uses >= kUsesThatPayForACopy * p.tokens) copy_.reset(new AlignedArray<T>(p.tokens * p.channels));
  }

  Tokens<const T> read(const T* rows, int64_t begin, int64_t end) {
    if (!copy_) return {rows, stride_};
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(copy_->data() + row * channels_, rows + row * stride_, channels_ * sizeof(T));
    }
    return {copy_->data(), channels_};
  }

  Tokens<T> clear(T* rows, int64_t begin, int64_t end) {
    const Tokens<T> tokens = copy_ ? Tokens<T>{copy_->data(), channels_} : Tokens<T>{rows, stride_};
    for (int64_t row = begin; row < end; ++row) std::memset(tokens.data + row * tokens.stride, 0, channels_ * sizeof(T));
    return tokens;
  }

  void write_back(T* rows, int64_t begin, int64_t end) {
    for (int64_t row = begin; copy_ && row < end; ++row) {
      std::memcpy(rows + row * stride_, copy_->data() + row * channels_, channels_ * sizeof(T));
    }
  }

 private:
  int64_t channels_, stride_;
  std::unique_ptr<AlignedArray<T>> copy_;
};

// Locations and weights of one head lie too far apart for the processor to foresee them.
constexpr int64_t kQueriesAhead = 8;

template <typename T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i);
}

template <typename Value>
void forward(const Problem& p, int64_t begin, int64_t end) {
  using Sum = typename Types<Value>::Sum;
  Samples<Sum> samples(p);
  const auto* locations = static_cast<const Sum*>(p.locations);
  const auto* weights = static_cast<const Sum*>(p.weights);
  HeadRows<Value> rows(p, std::min(p.queries, end - begin) * samples.size * kCorners);
  while (begin < end) {
    const int64_t first = begin % p.queries, head = begin / p.queries % p.heads, batch = begin / p.queries / p.heads;
    const int64_t last = std::min(p.queries, first + end - begin);
    begin += last - first;
    const Value* value = static_cast<const Value*>(p.value) + (batch * p.tokens * p.heads + head) * p.channels;
    const Tokens<const Value> tokens = rows.read(value, 0, p.tokens);
    for (int64_t query = first; query < last; ++query) {
      const int64_t position = (batch * p.queries + query) * p.heads + head;
      const int64_t ahead = std::min(query + kQueriesAhead, p.queries - 1) - query;
      prefetch(locations + (position + ahead * p.heads) * samples.size * 2, samples.size * 2);
      prefetch(weights + (position + ahead * p.heads) * samples.size, samples.size);
      samples.template place<false>(locations + position * samples.size * 2, weights + position * samples.size);
      Value* out = static_cast<Value*>(p.output) + position * p.channels;
      for_channels<kLanes<Sum>>(p.channels, [&](auto count, int64_t channel, int part) {
        gather<decltype(count)::value>(tokens.data + channel, tokens.stride, samples, out + channel, part);
      });
    }
  }
}

// Gradients of the levels [first, last) of one head: all of them for these samples, and these rows of grad_value.
template <typename Value, typename Sum>
void backward_levels(const Problem& p, int64_t batch, int64_t head, int64_t first, int64_t last, HeadRows<Value>& rows,
                     HeadRows<Sum>& grad_rows) {
  Samples<Sum> samples(p);
  const auto* locations = static_cast<const Sum*>(p.locations);
  const auto* weights = static_cast<const Sum*>(p.weights);
  const int64_t origin = (batch * p.tokens * p.heads + head) * p.channels;
  Sum* grad_value = static_cast<Sum*>(p.grad_value) + origin;
  const int64_t begin = first * p.points, end = last * p.points, first_row = p.level[first].start;
  const int64_t last_row = p.level[last - 1].start + p.level[last - 1].height * p.level[last - 1].width;
  const Tokens<const Value> tokens = rows.read(static_cast<const Value*>(p.value) + origin, first_row, last_row);
  const Tokens<Sum> grad_tokens = grad_rows.clear(grad_value, first_row, last_row);
  for (int64_t query = 0; query < p.queries; ++query) {
    const int64_t position = (batch * p.queries + query) * p.heads + head;
    const int64_t sample = position * samples.size;
    const int64_t ahead = (std::min(query + kQueriesAhead, p.queries - 1) - query) * p.heads;
    prefetch(locations + (sample + ahead * samples.size) * 2, samples.size * 2);
    prefetch(weights + sample + ahead * samples.size, samples.size);
    const Value* grad_output = static_cast<const Value*>(p.grad_output) + position * p.channels;
    prefetch(grad_output + ahead * p.channels, p.channels);
    samples.template place<true>(locations + sample * 2, weights + sample);
    samples.clear_dot();
    for_channels<kLanes<Sum>>(p.channels, [&](auto count, int64_t channel, int part) {
      scatter<decltype(count)::value>(tokens.data + channel, tokens.stride, samples, grad_output + channel, begin, end,
                                      grad_tokens.data + channel, samples.dot(), part);
    });
    samples.finish(begin, end, static_cast<Sum*>(p.grad_locations) + sample * 2,
                   static_cast<Sum*>(p.grad_weights) + sample);
  }
  grad_rows.write_back(grad_value, first_row, last_row);
}

template <typename Value>
void backward(const Problem& p, int64_t begin, int64_t end) {
  const int64_t uses = std::min(p.levels, end - begin) * p.points * p.queries * kCorners;
  HeadRows<Value> rows(p, uses);
  HeadRows<typename Types<Value>::Sum> grad_rows(p, uses);
  while (begin < end) {
    const int64_t first = begin % p.levels, head = begin / p.levels % p.heads, batch = begin / p.levels / p.heads;
    const int64_t last = std::min(p.levels, first + end - begin);
    begin += last - first;
    backward_levels(p, batch, head, first, last, rows, grad_rows);
  }
}

void forward_any(const Problem& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case ValueType::f32: return forward<float>(p, begin, end);
    case ValueType::f64: return forward<double>(p, begin, end);
    case ValueType::bf16: return forward<bfloat16>(p, begin, end);
  }
}

void backward_any(const Problem& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case ValueType::f32: return backward<float>(p, begin, end);
    case ValueType::f64: return backward<double>(p, begin, end);
    case ValueType::bf16: return backward<bfloat16>(p, begin, end);
  }
}

}  // namespace

Kernels MSDA_KERNELS() { return {forward_any, backward_any}; }

}  // namespace msda
