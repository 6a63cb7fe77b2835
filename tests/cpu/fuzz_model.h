// What the kernels compute, one number at a time in double, with a bound on the rounding error of
// the same expression in the type of the arithmetic (running error analysis: Higham, Accuracy and
// Stability of Numerical Algorithms, section 3.3). Shares nothing with csrc.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fuzz {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kEps = 1e-7, kPi = 3.14159265358979323846;

// Unit roundoff, largest number, distance of the smallest numbers, smallest normal number.
struct Format {
  double unit, largest, smallest, normal;
};
constexpr Format kFloat{0x1p-24, 3.4028234663852886e38, 0x1p-149, 0x1p-126};
constexpr Format kDouble{0x1p-53, 1.7976931348623157e308, 4.9406564584124654e-324, 0x1p-1022};
constexpr Format kHalf{0x1p-11, 65504, 0x1p-24, 0x1p-14};
constexpr Format kBFloat16{0x1p-8, 3.3895313892515355e38, 0x1p-133, 0x1p-126};

inline Format arithmetic;  // the one that the bounds are about

// A value and the bound on its error. An infinite or NaN value of bound 0 is certain; an infinite
// bound means that rounding decides, and that any result will do.
struct Number {
  double v = 0, r = 0;
  Number() = default;
  Number(double value, double bound = 0) : v(value), r(bound) {}
};

inline bool is_nan(Number a) { return std::isnan(a.v) && std::isfinite(a.r); }
inline bool decided(Number a) { return std::fabs(a.v) > a.r || (a.v == 0 && a.r == 0); }
inline bool infinite(Number a, Number b) {
  return std::isfinite(a.r) && std::isfinite(b.r) && (std::isinf(a.v) || std::isinf(b.v));
}

inline Number settled(double v, double r, bool certain) {
  r += arithmetic.unit * std::fabs(v);
  if (!std::isfinite(v) || !std::isfinite(r)) return {v, certain ? 0 : kInf};
  return {v, std::fabs(v) + r <= arithmetic.largest ? r : kInf};
}

inline Number operator-(Number a) { return {-a.v, a.r}; }
inline Number operator+(Number a, Number b) {
  return settled(a.v + b.v, a.r + b.r, is_nan(a) || is_nan(b) || infinite(a, b));
}
inline Number operator-(Number a, Number b) { return a + -b; }
inline Number operator*(Number a, Number b) {
  const double r = std::fabs(a.v) * b.r + std::fabs(b.v) * a.r + a.r * b.r + arithmetic.smallest;
  return settled(a.v * b.v, r,
                 is_nan(a) || is_nan(b) || (decided(a) && decided(b) && infinite(a, b)));
}
inline Number operator/(Number a, Number b) {
  const double v = a.v / b.v, room = std::fabs(b.v) - b.r;
  const double r = room > 0 ? (a.r + std::fabs(v) * b.r) / room + arithmetic.smallest : kInf;
  const bool by_zero = b.v == 0 && b.r == 0 && std::isfinite(a.r) && decided(a);
  return settled(v, r, is_nan(a) || is_nan(b) || by_zero || (infinite(a, b) && decided(b)));
}

// Of numbers up to 0, to 2.5 units in the last place, or 5 below -16; what is below the smallest
// normal number may be 0.
inline Number exponential(Number x) {
  if (std::isnan(x.v)) return {x.v};
  if (x.v == -kInf && x.r == 0) return {0};
  const double v = std::exp(x.v);
  if (x.v + (std::isfinite(x.r) ? x.r : 0) < -800) return {v, arithmetic.normal};
  const double ulps = (x.v < -16 ? 10 : 5) * arithmetic.unit;
  return {v, v * (std::expm1(std::min(x.r, 700.0)) + ulps) + arithmetic.normal};
}
inline Number logarithm(Number x) {  // of numbers from 1 up
  if (std::isnan(x.v)) return {x.v};
  const double v = std::log(x.v);
  return {v, x.r / (x.v - x.r) + 2 * arithmetic.unit * std::fabs(v)};
}
inline Number arctangent(Number x) {
  const double v = std::atan(x.v);
  if (std::isnan(v)) return {v, std::isfinite(x.r) ? 0 : kPi};
  if (std::isinf(x.r)) return {v, kPi};
  const double near = std::max(std::fabs(x.v) - x.r, 0.0);
  return {v, std::min(x.r / (1 + near * near), kPi) + 8 * arithmetic.unit * std::fabs(v)};
}
inline Number maximum(Number a, Number b) {
  if (is_nan(a) || is_nan(b)) return {kNan};
  const double v = std::isnan(a.v) || std::isnan(b.v) ? kNan : std::max(a.v, b.v);
  return {v, a.v - a.r > b.v + b.r ? a.r : b.v - b.r > a.v + a.r ? b.r : std::max(a.r, b.r)};
}
inline Number minimum(Number a, Number b) { return -maximum(-a, -b); }

// 1 where a > b, 0 where a < b, and anything between where rounding decides or at a tie.
inline Number above(Number a, Number b) {
  if (is_nan(a) || is_nan(b)) return {kNan};
  const double apart = a.v - b.v, reach = a.r + b.r;
  if (std::fabs(apart) > reach) return {apart > 0 ? 1.0 : 0.0};
  return {0.5, std::isfinite(reach) && !std::isnan(apart) ? 0.5 : kInf};
}

// Whether a result, stored in a format, can come from the expression. The slack is for expressions
// that are equal in exact arithmetic and round elsewhere.
inline bool accepts(Number expected, double actual, const Format& stored) {
  if (std::isinf(expected.r) || actual == expected.v) return true;
  if (std::isnan(expected.v) || std::isinf(expected.v)) {
    return std::isnan(expected.v) && std::isnan(actual);
  }
  if (expected.v == 0 && expected.r == 0) return false;
  const double r = 4 * (expected.r + stored.unit * std::fabs(expected.v) + stored.smallest);
  if (actual == kInf) return expected.v + r >= stored.largest;
  if (actual == -kInf) return expected.v - r <= -stored.largest;
  return std::fabs(actual - expected.v) <= r;
}

// The two bins of a target, in the type of the arithmetic: left, and the weights of left, left + 1.
struct Bins {
  int left;
  double weights[2];
};

template <class F>
Bins bins_of(F target, const F* project, int count, double margin) {
  const auto at = [&](int k) { return project ? project[k] : F(k); };
  F highest = F(count - 1 - margin);
  if (project) highest = std::max(F(project[count - 1] - F(margin)), project[0]);
  if (target < at(0)) target = at(0);
  if (target > highest) target = highest;
  int left = 0;
  while (left < count - 2 && at(left + 1) <= target) ++left;
  const F right = (target - at(left)) / (at(left + 1) - at(left));
  return {left, {F(1) - right, right}};
}

struct Distribution {
  std::vector<Number> shifted, p;
  std::vector<double> w;
  Number sum, expected;

  template <class F>
  Distribution(const std::vector<double>& z, const F* project) : shifted(z.size()), p(z.size()) {
    double max = -kInf;
    for (double x : z) {
      if (std::isnan(x) || x > max) max = x;
    }
    Number moment;
    for (size_t k = 0; k < z.size(); ++k) {
      w.push_back(project ? double(project[k]) : double(k));
      shifted[k] = Number(z[k]) - max;
      p[k] = exponential(shifted[k]);
      sum = sum + p[k];
      moment = moment + p[k] * w[k];
    }
    expected = moment / sum;
    for (Number& each : p) each = each / sum;
  }

  Number loss(const Bins& y) const {
    Number total = logarithm(sum);
    for (int i = 0; i < 2; ++i) {
      if (y.weights[i] != 0) total = total - shifted[y.left + i] * y.weights[i];
    }
    return total;
  }
  // The gradient by logit k, from upstream gradients of which null ones take no part. Where one is
  // infinite the order of operations decides between infinity and NaN.
  Number gradient(const Number* by_loss, const Bins& y, const Number* by_position, int k) const {
    Number total;
    bool infinite = false;
    if (by_loss) {
      const bool pair = k == y.left || k == y.left + 1;
      const double wanted = pair ? y.weights[k - y.left] : 0;
      total = *by_loss * (p[k] - (std::isnan(y.weights[0]) ? kNan : wanted));
      infinite = std::isinf(by_loss->v) && (pair || by_position);
    }
    if (by_position) {
      const Number distance = Number(w[k]) - expected;
      const double size = std::isnan(distance.v) ? 0 : std::fabs(distance.v);
      // In another order the product of two factors may be subnormal, and have few digits
      const Number product = *by_position * distance * p[k];
      const Number part(product.v, product.r + arithmetic.smallest * size);
      total = by_loss ? total + part : part;
      infinite = infinite || (by_loss && std::isinf(by_position->v));
    }
    if (infinite && !std::isnan(total.v)) total.r = kInf;
    // A result of 0 may be rounded: only that of an anchor that does not count must be 0
    if (total.v == 0 && total.r == 0) total.r = arithmetic.normal;
    return total;
  }
};

// The IoU of two boxes x1, y1, x2, y2 of kind 0 to 3 (IoU, GIoU, DIoU, CIoU), and its gradient by
// the first.
struct Overlap {
  Number value, gradient[4];

  Overlap(const Number* a, const Number* b, int kind) {
    const Number eps(kEps, kEps * arithmetic.unit);
    const Number aw = a[2] - a[0], ah = a[3] - a[1] + eps, bw = b[2] - b[0], bh = b[3] - b[1] + eps;
    const Number ow = maximum(minimum(a[2], b[2]) - maximum(a[0], b[0]), 0);
    const Number oh = maximum(minimum(a[3], b[3]) - maximum(a[1], b[1]), 0);
    const Number overlap = ow * oh, area = aw * ah + bw * bh - overlap + eps;
    const Number iou = overlap / area, tall = oh * above(ow, 0), wide = ow * above(oh, 0);
    const Number inner[] = {-(tall * above(a[0], b[0])), -(wide * above(a[1], b[1])),
                            tall * above(b[2], a[2]), wide * above(b[3], a[3])};
    const Number sides[] = {-ah, -aw, ah, aw};
    Number by_area[4];
    for (int i = 0; i < 4; ++i) {
      by_area[i] = sides[i] - inner[i];
      gradient[i] = (inner[i] - iou * by_area[i]) / area;
    }
    value = iou;
    if (kind == 0) return;
    const Number ew = maximum(a[2], b[2]) - minimum(a[0], b[0]);
    const Number eh = maximum(a[3], b[3]) - minimum(a[1], b[1]);
    const Number outer[] = {-above(b[0], a[0]), -above(b[1], a[1]), above(a[2], b[2]),
                            above(a[3], b[3])};
    if (kind == 1) {
      const Number enclosing = ew * eh + eps, filled = area / enclosing;
      value = value - (enclosing - area) / enclosing;
      for (int i = 0; i < 4; ++i) {
        const Number by_enclosing = outer[i] * (i % 2 ? ew : eh);
        gradient[i] = gradient[i] + (by_area[i] - filled * by_enclosing) / enclosing;
      }
      return;
    }
    const Number square = ew * ew + eh * eh + eps;
    const Number apart[] = {b[0] + b[2] - a[0] - a[2], b[1] + b[3] - a[1] - a[3]};
    const Number share = (apart[0] * apart[0] + apart[1] * apart[1]) * 0.25 / square;
    value = value - share;
    for (int i = 0; i < 4; ++i) {
      const Number extent = i % 2 ? eh : ew;
      gradient[i] = gradient[i] + (apart[i % 2] * 0.5 + share * (extent * outer[i]) * 2) / square;
    }
    if (kind == 2) return;
    const Number angle = arctangent(bw / bh) - arctangent(aw / ah);
    const Number v = angle * angle * (4 / (kPi * kPi));
    const Number alpha = v / (v - iou + (1 + kEps));
    const Number turn = alpha * angle * (8 / (kPi * kPi)) / (aw * aw + ah * ah);
    value = value - alpha * v;
    const Number turned[] = {-(turn * ah), turn * aw, turn * ah, -(turn * aw)};
    for (int i = 0; i < 4; ++i) gradient[i] = gradient[i] + turned[i];
  }
};

}  // namespace fuzz
