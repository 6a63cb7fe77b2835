// The numbers of task-aligned assignment. Templates over V as in dfl_math.h, one pair of an object
// and an anchor per lane; the scalar form gives the same bits.

#pragma once

#include <cmath>

#include "common/iou.h"
#include "vec.h"

namespace dflkern {

template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(Element<V>);

// Calls function on each lane.
template <class V, class Function>
DFL_INLINE V each_lane(V x, Function function) {
  if constexpr (kLanesOf<V> == 1) {
    return function(x);
  } else {
    for (int i = 0; i < kLanesOf<V>; ++i) x[i] = function(x[i]);
    return x;
  }
}

// Bit i is set where lane i of a comparison holds.
template <class Mask>
DFL_INLINE uint32_t lane_bits(Mask mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(mask[0]) == 4) return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
  if constexpr (sizeof(mask[0]) == 8) return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(mask[0]) == 4) return _mm256_movemask_ps((__m256)mask);
  if constexpr (sizeof(mask[0]) == 8) return _mm256_movemask_pd((__m256d)mask);
#endif
  uint32_t bits = 0;
  for (size_t i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
}

// An IoU, clamped to [0, 1]; NaN counts as 0.
template <Iou kKind, class V>
DFL_INLINE V overlap_of(const Box<V>& object, const Box<V>& found) {
  return smaller(larger(paired_iou<kKind>(object, found), V{}), splat<V>(1));
}

// 1 / (1 + exp(-x)); NaN stays NaN. Results below the smallest normal number keep what digits they
// have: their root need not be small.
template <class V>
DFL_INLINE V sigmoid(V x) {
  using F = Element<V>;
  const V size = x < 0 ? -x : x;
  V e = exp_nonpositive(-size);
  const V half = exp_nonpositive(size * F(-0.5));
  e = size > F(-0.9) * Constants<F>::kLowest ? half * half : e;
  return (x < 0 ? e : splat<V>(1)) / (1 + e);
}

// x to a power of at least 0, for x from 0 to 1 or NaN; everything to the power of 0 is 1.
template <class F>
class Power {
 public:
  explicit Power(double exponent) : exponent_(static_cast<F>(exponent)) {
    const double halves = 2 * exponent;
    if (halves <= 32 && halves == std::floor(halves)) halves_ = static_cast<int>(halves);
  }

  template <class V>
  DFL_INLINE V operator()(V x) const {
    const F exponent = exponent_;
    if (halves_ < 0) return each_lane(x, [=](F lane) { return std::pow(lane, exponent); });
    V result = splat<V>(1), square = x;
    for (int rest = halves_ / 2; rest; rest /= 2) {
      if (rest % 2) result *= square;
      square *= square;
    }
    if (halves_ % 2) result *= each_lane(x, [](F lane) { return std::sqrt(lane); });
    return result;
  }

 private:
  F exponent_;
  int halves_ = -1;  // twice the exponent, if that is a whole number and a small one
};

}  // namespace dflkern
