// Where the samples of one (batch, head, query) lie: corners, bilinear weights, and the way back to the gradients.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_kernels.h"
#include "vec.h"

namespace msda {
namespace {

constexpr int kCorners = 4;  // in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1)

// N = L x P samples, a vector of samples at a time. The arrays are as long as whole vectors; what lies beyond N is
// computed from zeros and never used.
template <typename Sum>
class Samples {
  static constexpr int kWidth = kLanes<Sum>;
  using V = Vec<Sum>;
  using I = IndexVec<Sum>;

 public:
  explicit Samples(const Problem& p)
      : size(p.levels * p.points),
        padded_((size + kWidth - 1) / kWidth * kWidth),
        reals_(padded_ * 18),
        indices_(padded_ * 7) {
    for (int64_t i = 0; i < padded_; ++i) {
      const Level& level = p.level[i < size ? i / p.points : 0];
      real(kLevelWidth)[i] = static_cast<Sum>(level.width);
      real(kLevelHeight)[i] = static_cast<Sum>(level.height);
      integer(kRowLength)[i] = static_cast<Index<Sum>>(level.width);
      integer(kStart)[i] = static_cast<Index<Sum>>(level.start);
    }
  }

  // locations: (N, 2) as (x, y); weights: (N). ForBackward: finish will be called.
  template <bool ForBackward>
  void place(const Sum* locations, const Sum* weights) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) {
      place_vector<ForBackward>(i, load(locations + 2 * i), load(locations + 2 * i + kWidth), load(weights + i));
    }
    if (i < size) {
      const int rest = static_cast<int>(size - i), pairs = 2 * rest;
      const int first = pairs < kWidth ? pairs : kWidth;
      place_vector<ForBackward>(i, load_part(locations + 2 * i, first),
                                load_part(locations + 2 * i + first, pairs - first), load_part(weights + i, rest));
    }
  }

  // From dot()[i * 4 + corner] = <grad_output, value at the corner> to the gradients of the locations and weights of
  // the samples [begin, end); the others belong to other threads and are not touched.
  void finish(int64_t begin, int64_t end, Sum* grad_locations, Sum* grad_weights) {
    for (int64_t i = begin / kWidth * kWidth; i < end; i += kWidth) {
      V grad_weight, first, second;
      finish_vector(i, grad_weight, first, second);
      if (i >= begin && i + kWidth <= end) {
        store(grad_weights + i, grad_weight);
        store(grad_locations + 2 * i, first);
        store(grad_locations + 2 * i + kWidth, second);
        continue;
      }
      Sum weight_part[kWidth], location_part[2 * kWidth];
      store(weight_part, grad_weight);
      store(location_part, first);
      store(location_part + kWidth, second);
      const int64_t from = begin > i ? begin - i : 0, to = end - i < kWidth ? end - i : kWidth;
      std::copy(weight_part + from, weight_part + to, grad_weights + i + from);
      std::copy(location_part + 2 * from, location_part + 2 * to, grad_locations + 2 * (i + from));
    }
  }

  bool inside(int64_t i) const { return indices_.data()[kInside * padded_ + i] != 0; }  // false: nothing is sampled
  int64_t row(int64_t i, int corner) const { return indices_.data()[(kRow + corner) * padded_ + i]; }  // token index
  Sum weight(int64_t i, int corner) const { return reals_.data()[(kWeight + corner) * padded_ + i]; }  // x attention weight
  Sum* dot() { return real(kDot); }
  void clear_dot() { std::memset(dot(), 0, padded_ * kCorners * sizeof(Sum)); }

  const int64_t size;

 private:
  enum Real { kLevelWidth, kLevelHeight, kX, kY, kScaleX, kScaleY, kWeight, kValid = kWeight + 4, kDot = kValid + 4 };
  enum Integer { kRowLength, kStart, kInside, kRow };

  Sum* real(int which) { return reals_.data() + which * padded_; }
  Index<Sum>* integer(int which) { return indices_.data() + which * padded_; }

  template <bool ForBackward>
  void place_vector(int64_t i, V first, V second, V weights) {
    V x, y;
    split_pairs<Sum>(first, second, x, y);
    const V width = load(real(kLevelWidth) + i), height = load(real(kLevelHeight) + i);
    x = x * width - Sum(0.5);
    y = y * height - Sum(0.5);
    // False for NaN too. Such a sample gets weights of zero and a harmless position.
    const I in = (x >= -1) & (y >= -1) & (x < width) & (y < height);
    const V zero = {};
    const V one = zero + Sum(1);
    x = in ? x : zero;
    y = in ? y : zero;
    const V attention = in ? weights : zero;
    const V x0 = floor(x), y0 = floor(y), fx = x - x0, fy = y - y0;
    const V has_x0 = x0 >= 0 ? one : zero, has_x1 = x0 + 1 < width ? one : zero;
    const V has_y0 = y0 >= 0 ? one : zero, has_y1 = y0 + 1 < height ? one : zero;
    const V left = (1 - fx) * has_x0, right = fx * has_x1;
    const V top = (1 - fy) * has_y0 * attention, bottom = fy * has_y1 * attention;
    const V corner_weights[kCorners] = {top * left, top * right, bottom * left, bottom * right};
    // A corner outside the level is read where its neighbour inside is, with weight zero.
    const I xa = __builtin_convertvector(x0 + (1 - has_x0), I), xb = __builtin_convertvector(x0 + has_x1, I);
    const I ya = __builtin_convertvector(y0 + (1 - has_y0), I), yb = __builtin_convertvector(y0 + has_y1, I);
    const I row_length = load_bits<I>(integer(kRowLength) + i), start = load_bits<I>(integer(kStart) + i);
    const I row_a = start + ya * row_length, row_b = start + yb * row_length;
    const I rows[kCorners] = {row_a + xa, row_a + xb, row_b + xa, row_b + xb};
    store_bits(integer(kInside) + i, in);
    for (int corner = 0; corner < kCorners; ++corner) {
      store(real(kWeight + corner) + i, corner_weights[corner]);
      store_bits(integer(kRow + corner) + i, rows[corner]);
    }
    if (ForBackward) {
      store(real(kX) + i, fx);
      store(real(kY) + i, fy);
      store(real(kScaleX) + i, attention * width);
      store(real(kScaleY) + i, attention * height);
      store(real(kValid) + i, has_y0 * has_x0);
      store(real(kValid + 1) + i, has_y0 * has_x1);
      store(real(kValid + 2) + i, has_y1 * has_x0);
      store(real(kValid + 3) + i, has_y1 * has_x1);
    }
  }

  void finish_vector(int64_t i, V& grad_weight, V& first, V& second) {
    const Sum* dots = dot() + i * kCorners;
    V d02, d13, e02, e13, d[kCorners];
    split_pairs<Sum>(load(dots), load(dots + kWidth), d02, d13);
    split_pairs<Sum>(load(dots + 2 * kWidth), load(dots + 3 * kWidth), e02, e13);
    split_pairs<Sum>(d02, e02, d[0], d[2]);
    split_pairs<Sum>(d13, e13, d[1], d[3]);
    for (int corner = 0; corner < kCorners; ++corner) d[corner] *= load(real(kValid + corner) + i);
    const V fx = load(real(kX) + i), fy = load(real(kY) + i);
    const V along_top = d[0] + fx * (d[1] - d[0]), along_bottom = d[2] + fx * (d[3] - d[2]);
    grad_weight = along_top + fy * (along_bottom - along_top);
    const V grad_x = load(real(kScaleX) + i) * ((1 - fy) * (d[1] - d[0]) + fy * (d[3] - d[2]));
    const V grad_y = load(real(kScaleY) + i) * (along_bottom - along_top);
    join_pairs<Sum>(grad_x, grad_y, first, second);
  }

  static V floor(V x) {  // of numbers an index can hold
    const V truncated = __builtin_convertvector(__builtin_convertvector(x, I), V);
    const V zero = {};
    return truncated - (truncated > x ? zero + 1 : zero);
  }

  const int64_t padded_;
  AlignedArray<Sum> reals_;
  AlignedArray<Index<Sum>> indices_;
};

}  // namespace
}  // namespace msda
