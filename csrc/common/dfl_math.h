// The maths of one distribution, shared by the CPU and the CUDA kernels. Includes no torch.
//
// Every function is a template over V, the type of a number: float or double, or a vector of them
// with one distribution per lane (vec.h). No operation mixes lanes, so a distribution's result does
// not depend on its neighbours, on its position in a vector or on how work is split.
//
// With z the logits, m = max z, s = sum exp(z - m), p = exp(z - m) / s, W the positions of the
// bins, and y the two bins of the target t:
//
//   loss = sum y (log s - (z - m))    d loss / dz = p - y
//   E    = sum p W                    d E / dz    = p (W - E)
//
// NaN is carried by arithmetic and by comparisons that are false for it: a NaN or +inf logit, or a
// row of -inf, makes z - m, hence s and all results of that row, NaN.

#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC, which has no standard headers
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
#define DFL_INLINE __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define DFL_INLINE __attribute__((always_inline)) inline
#endif

namespace dflkern {

// What V is made of, and the operations that have no operator. vec.h adds vector types.
template <class V>
struct Lanes;

template <class F, class SignedInteger, class UnsignedInteger>
struct ScalarLanes {
  using Element = F;
  using Integer = SignedInteger;
  using Bits = UnsignedInteger;
  static DFL_INLINE F larger(F a, F b) { return a > b ? a : b; }
  static DFL_INLINE Integer truncated(F x) { return static_cast<Integer>(x); }
  static DFL_INLINE F converted(Integer x) { return static_cast<F>(x); }
};
template <>
struct Lanes<float> : ScalarLanes<float, int32_t, uint32_t> {
  static DFL_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
};
template <>
struct Lanes<double> : ScalarLanes<double, int64_t, uint64_t> {
  static DFL_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
};

template <class V>
using Element = typename Lanes<V>::Element;
template <class V>
using Integer = typename Lanes<V>::Integer;
template <class V>
using Bits = typename Lanes<V>::Bits;

// a b + c, rounded once.
template <class V>
DFL_INLINE V fma(V a, V b, V c) {
  return Lanes<V>::fma(a, b, c);
}
// a if a > b, else b; so b if either is NaN.
template <class V>
DFL_INLINE V larger(V a, V b) {
  return Lanes<V>::larger(a, b);
}

template <class V>
DFL_INLINE V splat(Element<V> x) {
  return x - V{};  // folds to a broadcast, as x + 0 cannot: that would change -0
}

template <class To, class From>
DFL_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// c0 + c1 x + c2 x^2 + ... by Horner's rule.
template <class V>
DFL_INLINE V polynomial(V, Element<V> c0) {
  return splat<V>(c0);
}
template <class V, class... C>
DFL_INLINE V polynomial(V x, Element<V> c0, Element<V> c1, C... more) {
  return fma(polynomial(x, c1, more...), x, splat<V>(c0));
}

// The constants of exp and log by element type. The polynomials are minimax fits, rounded one
// coefficient at a time with the others refitted; fit_polynomials.py derives them
// (those of double up to the last digits, which depend on the solver's version).
template <class F>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kRootHalf = 0x3f3504f3;    // the bits of sqrt(1/2)
  static constexpr float kRounder = 0x1.8p23f + 127;  // leaves round(x) + bias in the low bits
  static constexpr float kLowest = -0x1.601e68p6f;    // -127 ln 2: the scale below is 0
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2 = 0x1.62e43p-1f;
  static constexpr float kLn2Rest = 0;  // left out: it costs 1.9e-9 of the result for every halving

  // exp(r) for |r| <= ln 2 / 2, to 1.54 * 2^-24 of it, by powers of r.
  static constexpr float kExp[] = {1.0f,           0x1.fffff6p-1f, 0x1.fffdc4p-2f,
                                   0x1.555a82p-3f, 0x1.573ad6p-5f, 0x1.0f9f16p-7f};
  template <class V>
  static DFL_INLINE V exp_core(V r) {
    return polynomial(r, kExp[0], kExp[1], kExp[2], kExp[3], kExp[4], kExp[5]);
  }
  // (log((1 + q) / (1 - q)) / q - 2) / q^2 at x = q^2, for |q| <= 3 - 2 sqrt 2.
  template <class V>
  static DFL_INLINE V log_core(V x) {
    return polynomial(x, 0x1.55557ap-1f, 0x1.995eccp-2f, 0x1.31e23ep-2f);
  }
};

template <>
struct Constants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kRounder = 0x1.8p52 + 1023;
  static constexpr double kLowest = -0x1.628b76e3a7b61p9;  // -1023 ln 2
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  static constexpr double kLn2Rest = 0x1.abc9e3b39803fp-56;

  template <class V>
  static DFL_INLINE V exp_core(V r) {
    return polynomial(r, 1.0, 1.0, 0x1.000000000000ap-1, 0x1.555555555550ap-3, 0x1.5555555550772p-5,
                      0x1.1111111124ce8p-7, 0x1.6c16c18446894p-10, 0x1.a01a01368f988p-13,
                      0x1.a01999e2d6a53p-16, 0x1.71df0f6f2b197p-19, 0x1.28ad8965b3857p-22,
                      0x1.ad9c2409dc96dp-26);
  }
  template <class V>
  static DFL_INLINE V log_core(V x) {
    return polynomial(x, 0x1.5555555555593p-1, 0x1.999999997f9f7p-2, 0x1.249249422a5e7p-2,
                      0x1.c71c51d7b7165p-3, 0x1.746649b48209ap-3, 0x1.39a0951b01b89p-3,
                      0x1.2f1182a52c380p-3);
  }
};

// exp(x) for x <= 0 or NaN. exp(0) is 1 and exp(-inf) is 0, exactly; results below the smallest
// normal number may be 0. Errors, which tests/cpu/driver.cpp tests: float 2.5 ulp down to exp(-16),
// which is what counts beside exp(0) = 1, and 5 ulp below; double 1 ulp.
template <class V>
DFL_INLINE V exp_nonpositive(V x) {
  using C = Constants<Element<V>>;
  x = larger(splat<V>(C::kLowest), x);
  const V shifted = fma(x, splat<V>(C::kLog2e), splat<V>(C::kRounder));
  const V n = shifted - C::kRounder;
  V r = fma(n, splat<V>(-C::kLn2), x);
  if (C::kLn2Rest != 0) r = fma(n, splat<V>(-C::kLn2Rest), r);
  const V scale = bits_as<V>(bits_as<Bits<V>>(shifted) << C::kMantissaBits);
  return C::template exp_core<V>(r) * scale;
}

// log(x) for 1 <= x < inf or NaN, to 1 ulp up to 256.
template <class V>
DFL_INLINE V log_at_least_one(V x) {
  using C = Constants<Element<V>>;
  using I = Integer<V>;
  // x = 2^n (1 + f) with 1 + f from sqrt(1/2) to sqrt 2, by integer arithmetic on the bits.
  const I from_root = bits_as<I>(x) - C::kRootHalf;
  const V n = Lanes<V>::converted(from_root >> C::kMantissaBits);
  const I power = from_root & ~((Integer<Element<V>>(1) << C::kMantissaBits) - 1);
  const V f = bits_as<V>(bits_as<I>(x) - power) - 1;
  const V q = f / (f + 2);
  const V half_square = f * f * Element<V>(0.5);
  const V rest = q * fma(q * q, C::template log_core<V>(q * q), half_square);
  // log(1 + f) = f - (half_square - rest)
  const V small = fma(n, splat<V>(C::kLn2Rest), rest) - half_square;
  const V result = fma(n, splat<V>(C::kLn2), small + f);
  return x == x ? result : x;
}

// The two bins of a target: `left` is l, a whole number from 0 to K - 2 whatever the target; a NaN
// target has NaN weights.
template <class V>
struct TwoBins {
  V left;
  V left_weight;
  V right_weight;
};

// What the two bins depend on beside the target. `positions` is null for 0, 1, ..., K - 1.
template <class F>
struct Bins {
  int count;
  const F* positions;
  F lowest, highest;  // the target's bounds: W_0, and W_{K-1} - margin if that is above it
};

template <class F>
DFL_INLINE Bins<F> make_bins(int count, const F* positions, double margin) {
  if (positions == nullptr) return {count, nullptr, F(0), F(count - 1 - margin)};
  const F first = positions[0], last = positions[count - 1] - F(margin);
  return {count, positions, first, last < first ? first : last};
}

template <class V>
DFL_INLINE TwoBins<V> two_bins(V target, const Bins<Element<V>>& bins) {
  using F = Element<V>;
  target = target < bins.lowest ? splat<V>(bins.lowest) : target;
  target = target > bins.highest ? splat<V>(bins.highest) : target;
  TwoBins<V> result;
  if (bins.positions == nullptr) {
    const V number = target == target ? target : V{};
    const V last = splat<V>(F(bins.count - 2));
    result.left = Lanes<V>::converted(Lanes<V>::truncated(number));
    result.left = result.left > last ? last : result.left;
    result.right_weight = target - result.left;
  } else {
    const F* w = bins.positions;
    V lower = splat<V>(w[0]), upper = splat<V>(w[1]);
    result.left = V{};
    for (int k = 1; k < bins.count - 1; ++k) {
      const auto reached = target >= w[k];
      lower = reached ? splat<V>(w[k]) : lower;
      upper = reached ? splat<V>(w[k + 1]) : upper;
      result.left = reached ? result.left + 1 : result.left;
    }
    result.right_weight = (target - lower) / (upper - lower);
  }
  result.left_weight = 1 - result.right_weight;
  return result;
}

// weight * shifted logit, where a weight of 0 makes an infinite logit cost nothing.
template <class V>
DFL_INLINE V weighted(V weight, V shifted) {
  return weight == 0 ? V{} : weight * shifted;
}

// The loss, from s and the shifted logits z - m of the two bins.
template <class V>
DFL_INLINE V loss_of(V sum, const TwoBins<V>& y, V left_shifted, V right_shifted) {
  return log_at_least_one(sum) -
         (weighted(y.left_weight, left_shifted) + weighted(y.right_weight, right_shifted));
}

}  // namespace dflkern
