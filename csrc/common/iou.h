// The IoU of paired boxes in its four kinds, and its gradient by the first box, as dflkern/iou.py
// defines them. Templates over V as in dfl_math.h, one pair per lane.

#pragma once

#include "dfl_math.h"

namespace dflkern {

enum class Iou { kIou, kGiou, kDiou, kCiou };

template <class V>
struct Box {
  V x1, y1, x2, y2;
};

template <class V>
DFL_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

// atan(x) in float, to 2.5 ulp, which tests/cpu/box_driver.cpp tests.
template <class V>
DFL_INLINE V float_arctangent(V x) {
  constexpr uint32_t kSign = 0x80000000;
  const Bits<V> sign = bits_as<Bits<V>>(x) & kSign;
  const V size = bits_as<V>(bits_as<Bits<V>>(x) & ~kSign);
  const auto large = size > 1;
  const V u = large ? 1 / size : size;
  const V core = polynomial(u * u, -0x1.5554dcp-2f, 0x1.9978ecp-3f, -0x1.230a94p-3f, 0x1.b4debp-4f,
                            -0x1.3550dap-4f, 0x1.61eebp-5f, -0x1.0c17d4p-6f, 0x1.7ea694p-9f);
  const V small = fma(u * u * core, u, u);
  const V result = large ? 0x1.921fb6p0f - small : small;
  return bits_as<V>(bits_as<Bits<V>>(result) | sign);
}

DFL_INLINE float arctangent(float x) { return float_arctangent(x); }
DFL_INLINE double arctangent(double x) { return atan(x); }
template <class V>
DFL_INLINE V arctangent(V x) {
  if constexpr (sizeof(Element<V>) == sizeof(float)) {
    return float_arctangent(x);
  } else {
    for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = atan(x[i]);
    return x;
  }
}

// Lengths and areas of a pair; the centres lie (apart_x / 2, apart_y / 2) apart.
template <class V>
struct Pair {
  V a_width, a_height, b_width, b_height;
  V overlap_width, overlap_height, overlap, union_area, iou;
  V enclosing_width, enclosing_height, apart_x, apart_y;
};

template <class V>
constexpr Element<V> kIouEps = Element<V>(1e-7);

template <class V>
DFL_INLINE Pair<V> measure(const Box<V>& a, const Box<V>& b) {
  Pair<V> p;
  p.a_width = a.x2 - a.x1;
  p.a_height = a.y2 - a.y1 + kIouEps<V>;
  p.b_width = b.x2 - b.x1;
  p.b_height = b.y2 - b.y1 + kIouEps<V>;
  p.overlap_width = larger(smaller(a.x2, b.x2) - larger(a.x1, b.x1), V{});
  p.overlap_height = larger(smaller(a.y2, b.y2) - larger(a.y1, b.y1), V{});
  p.overlap = p.overlap_width * p.overlap_height;
  p.union_area = p.a_width * p.a_height + p.b_width * p.b_height - p.overlap + kIouEps<V>;
  p.iou = p.overlap / p.union_area;  // NaN if any coordinate is, through the areas
  p.enclosing_width = larger(a.x2, b.x2) - smaller(a.x1, b.x1);
  p.enclosing_height = larger(a.y2, b.y2) - smaller(a.y1, b.y1);
  p.apart_x = b.x1 + b.x2 - a.x1 - a.x2;
  p.apart_y = b.y1 + b.y2 - a.y1 - a.y2;
  return p;
}

template <class V>
DFL_INLINE V enclosing_area(const Pair<V>& p) {
  return p.enclosing_width * p.enclosing_height + kIouEps<V>;
}

// The squared diagonal of the enclosing box, and the squared distance of the centres.
template <class V>
DFL_INLINE V diagonal(const Pair<V>& p) {
  return p.enclosing_width * p.enclosing_width + p.enclosing_height * p.enclosing_height +
         kIouEps<V>;
}
template <class V>
DFL_INLINE V apart(const Pair<V>& p) {
  return (p.apart_x * p.apart_x + p.apart_y * p.apart_y) * Element<V>(0.25);
}

// CIoU's v, its alpha, a constant in backward, and the difference of the two angles.
template <class V>
struct Aspect {
  V v, alpha, angle;
};

constexpr double kPi = 3.14159265358979323846;

template <class V>
DFL_INLINE Aspect<V> aspect(const Pair<V>& p) {
  using F = Element<V>;
  Aspect<V> of;
  of.angle = arctangent(p.b_width / p.b_height) - arctangent(p.a_width / p.a_height);
  of.v = F(4 / (kPi * kPi)) * (of.angle * of.angle);
  of.alpha = of.v / (of.v - p.iou + F(1 + 1e-7));
  return of;
}

template <Iou kKind, class V>
DFL_INLINE V paired_iou(const Box<V>& a, const Box<V>& b) {
  const Pair<V> p = measure(a, b);
  V result = p.iou;
  if (kKind == Iou::kGiou) {
    const V enclosing = enclosing_area(p);
    result -= (enclosing - p.union_area) / enclosing;
  }
  if (kKind == Iou::kDiou || kKind == Iou::kCiou) result -= apart(p) / diagonal(p);
  if (kKind == Iou::kCiou) {
    const Aspect<V> of = aspect(p);
    result -= of.alpha * of.v;
  }
  return result;
}

// The derivative of max(x, y) by x: 1 where x is the larger, half at a tie.
template <class V>
DFL_INLINE V is_above(V x, V y) {
  const V one = splat<V>(1), half = splat<V>(0.5f);
  const V tie = x == y ? half : V{};
  return x > y ? one : tie;
}

// The gradient of paired_iou by a.
template <Iou kKind, class V>
DFL_INLINE Box<V> paired_iou_gradient(const Box<V>& a, const Box<V>& b) {
  using F = Element<V>;
  const Pair<V> p = measure(a, b);
  const V tall = p.overlap_width > 0 ? p.overlap_height : V{};
  const V wide = p.overlap_height > 0 ? p.overlap_width : V{};
  const Box<V> d_overlap{-tall * is_above(a.x1, b.x1), -wide * is_above(a.y1, b.y1),
                         tall * is_above(b.x2, a.x2), wide * is_above(b.y2, a.y2)};
  const Box<V> d_union{-p.a_height - d_overlap.x1, -p.a_width - d_overlap.y1,
                       p.a_height - d_overlap.x2, p.a_width - d_overlap.y2};
  Box<V> g{(d_overlap.x1 - p.iou * d_union.x1) / p.union_area,
           (d_overlap.y1 - p.iou * d_union.y1) / p.union_area,
           (d_overlap.x2 - p.iou * d_union.x2) / p.union_area,
           (d_overlap.y2 - p.iou * d_union.y2) / p.union_area};
  if (kKind == Iou::kIou) return g;
  // By x1 and x2 of the enclosing width, by y1 and y2 of its height
  const Box<V> d_enclosing{-is_above(b.x1, a.x1), -is_above(b.y1, a.y1), is_above(a.x2, b.x2),
                           is_above(a.y2, b.y2)};
  if (kKind == Iou::kGiou) {
    const V enclosing = enclosing_area(p), filled = p.union_area / enclosing;
    g.x1 += (d_union.x1 - filled * (d_enclosing.x1 * p.enclosing_height)) / enclosing;
    g.y1 += (d_union.y1 - filled * (d_enclosing.y1 * p.enclosing_width)) / enclosing;
    g.x2 += (d_union.x2 - filled * (d_enclosing.x2 * p.enclosing_height)) / enclosing;
    g.y2 += (d_union.y2 - filled * (d_enclosing.y2 * p.enclosing_width)) / enclosing;
    return g;
  }
  const V square = diagonal(p), share = 2 * (apart(p) / square);
  const V toward_x = p.apart_x * F(0.5), toward_y = p.apart_y * F(0.5);
  g.x1 += (toward_x + share * (p.enclosing_width * d_enclosing.x1)) / square;
  g.y1 += (toward_y + share * (p.enclosing_height * d_enclosing.y1)) / square;
  g.x2 += (toward_x + share * (p.enclosing_width * d_enclosing.x2)) / square;
  g.y2 += (toward_y + share * (p.enclosing_height * d_enclosing.y2)) / square;
  if (kKind == Iou::kDiou) return g;
  const Aspect<V> of = aspect(p);
  const V turn =
      of.alpha * F(8 / (kPi * kPi)) * of.angle / (p.a_width * p.a_width + p.a_height * p.a_height);
  g.x1 -= turn * p.a_height;
  g.y1 += turn * p.a_width;
  g.x2 += turn * p.a_height;
  g.y2 -= turn * p.a_width;
  return g;
}

}  // namespace dflkern
