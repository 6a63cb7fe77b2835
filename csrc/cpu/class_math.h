// The maths of the classification loss, on vectors and on numbers. With z a logit, p = sigmoid(z)
// and softplus(z) = log(1 + exp(z)), a logit with target 0 has the loss
//
//   bce        softplus(z)                     with the gradient p
//   modulated  p^gamma softplus(z)             with the gradient
//              p^gamma (p + gamma (1 - p) softplus(z)), or p^gamma p with p^gamma as a constant
//
// which is varifocal and quality focal loss but for a factor.

#pragma once

#include <cmath>

#include "exps.h"

namespace dflkern {

template <class V>
DFL_INLINE V minus_magnitude(V x) {
  constexpr int kBits = 8 * sizeof(Element<V>);
  return bits_as<V>(bits_as<Bits<V>>(x) | (Bits<Element<V>>(1) << (kBits - 1)));
}

// max(x, 0); NaN stays NaN.
template <class V>
DFL_INLINE V rectified(V x) {
  return larger(V{}, x);
}

// log(2^n (1 + f)) for sqrt(1/2) <= 1 + f <= sqrt(2), to about 1 ulp.
template <class V>
DFL_INLINE V log_from(V n, V f) {
  using C = Constants<Element<V>>;
  const V q = f / (f + 2);
  const V half_square = f * f * Element<V>(0.5);
  const V rest = q * fma(q * q, C::template log_core<V>(q * q), half_square);
  const V small = fma(n, splat<V>(C::kLn2Rest), rest) - half_square;
  return fma(n, splat<V>(C::kLn2), small + f);
}

// log(1 + e) for 0 <= e <= 1 or NaN, with a small relative error also where e is tiny.
template <class V>
DFL_INLINE V log1p_of_fraction(V e) {
  using F = Element<V>;
  const auto halve = e > splat<V>(F(0.41421356237309503));  // sqrt(2) - 1
  const V f = halve ? (e - 1) * F(0.5) : e;                 // exact
  return log_from(halve ? splat<V>(F(1)) : V{}, f);
}

// log(1 + q) for 0 <= q < largest number / 2, or NaN.
template <class V>
DFL_INLINE V log1p_of_product(V q) {
  using C = Constants<Element<V>>;
  using I = Integer<V>;
  using Word = Integer<Element<V>>;
  const V u = q + 1, part = u - 1;
  const V rounding = (1 - (u - part)) + (q - part);  // 1 + q = u + rounding, exactly
  const I from_root = bits_as<I>(u) - C::kRootHalf;
  const V n = Lanes<V>::converted(from_root >> C::kMantissaBits);
  const I power = from_root & ~((Word(1) << C::kMantissaBits) - 1);
  const V down = bits_as<V>(bits_as<I>(splat<V>(1)) - power);  // 2^-n
  const V f = fma(rounding, down, bits_as<V>(bits_as<I>(u) - power) - 1);
  const V result = log_from(n, f);
  return q == q ? result : q;
}

// 1 / x for 1 <= x <= 2 or NaN, to 1 ulp.
template <class V>
DFL_INLINE V reciprocal(V x) {
  return 1 / x;
}
#if defined(__AVX512F__)
template <>
DFL_INLINE VecF reciprocal(VecF x) {  // a division takes twice as long
  const VecF r = _mm512_rcp14_ps(x);
  return fma(r, fma(-x, r, splat<VecF>(1)), r);
}
#endif

// What softplus and the sigmoid of a logit are made of.
template <class V>
struct Sigmoid {
  V p, rest;   // sigmoid(z), sigmoid(-z)
  V log;       // log(1 + e)
  V softplus;  // of z
};

template <class V>
DFL_INLINE Sigmoid<V> sigmoid_of(V z, V e) {
  Sigmoid<V> s;
  const V larger_half = reciprocal(1 + e), smaller_half = e * larger_half;
  const auto positive = z > V{};
  s.p = positive ? larger_half : smaller_half;
  s.rest = positive ? smaller_half : larger_half;
  s.log = log1p_of_fraction(e);
  s.softplus = rectified(z) + s.log;
  return s;
}

// p^gamma.
template <class V>
DFL_INLINE V power_of(V z, const Sigmoid<V>& s, Element<V> gamma) {
  if (gamma == 2) return s.p * s.p;
  if (gamma == 0) return s.p == s.p ? splat<V>(1) : s.p;
  return exp_nonpositive(gamma *
                         (-rectified(-z) - s.log));  // the log of p, of which none is inf - inf
}

// A product in which 0 times infinity is 0; NaN stays NaN.
DFL_INLINE double product(double factor, double value) {
  return factor == 0 && std::isinf(value) ? 0 : factor * value;
}

// The loss and the gradient of one logit whose target is y.
struct PositiveLoss {
  double loss, gradient;
};
PositiveLoss positive_loss(double z, double y, bool varifocal, bool quality, double gamma,
                           bool detach_modulation);

}  // namespace dflkern
