// The objects of a call, sorted by image, and its anchor points.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "assign.h"
#include "assign_math.h"

namespace dflkern {

// Anchors whose points share a bounding box; on a grid, part of a row.
constexpr int kAnchorBlock = 64;

// Four numbers of many boxes, side by side.
template <class F>
struct Boxes {
  std::vector<F> x1, y1, x2, y2;

  void resize(size_t size) {
    for (auto* side : {&x1, &y1, &x2, &y2}) side->resize(size);
  }
  void set(size_t i, const Box<F>& box) {
    x1[i] = box.x1, y1[i] = box.y1, x2[i] = box.x2, y2[i] = box.y2;
  }
  Box<F> at(size_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  template <class V>
  Box<V> load_at(size_t i) const {
    return {load<V>(&x1[i]), load<V>(&y1[i]), load<V>(&x2[i]), load<V>(&y2[i])};
  }
};

template <class V>
DFL_INLINE auto contains(const Box<V>& box, V x, V y, Element<V> eps) {
  return (x - box.x1 > eps) & (y - box.y1 > eps) & (box.x2 - x > eps) & (box.y2 - y > eps);
}

template <class F>
struct Scene {
  static constexpr int kLanes = kLanesOf<Vec<F>>;

  explicit Scene(const AssignCall& call) {
    set_objects(call);
    set_points(call);
  }

  int64_t objects() const { return static_cast<int64_t>(numbers.size()); }

  // Whether a block of anchors may have a point inside an object. Rounding is monotonic: an extent
  // that misses the box has none.
  bool meets(int64_t object, int64_t block, F eps) const {
    const Box<F> reach = reaches.at(object), extent = extents.at(block);
    return extent.x2 - reach.x1 > eps && reach.x2 - extent.x1 > eps && extent.y2 - reach.y1 > eps &&
           reach.y2 - extent.y1 > eps;
  }

  // Of the objects that are not ignored, by image and in their order: their number among all
  // objects, label and image, box, and the box that holds their anchors. A vector of boxes can be
  // read from any of them on. The objects of an image begin at `first`.
  std::vector<int32_t> numbers, images;
  std::vector<int64_t> labels, first;
  Boxes<F> boxes, reaches;

  // Anchor points in pixels, filled up with NaN, which is inside nothing, to whole blocks; and the
  // extent of each block.
  std::vector<F> x, y;
  Boxes<F> extents;
  int64_t blocks;

 private:
  static Box<F> box_at(const AssignCall& call, int64_t n) {
    const F* box = static_cast<const F*>(call.gt_boxes) + kSides * n;
    return {box[0], box[1], box[2], box[3]};
  }

  static bool is_used(const AssignCall& call, int64_t n) {
    const int64_t image = call.images[n], label = call.labels[n];
    if (!(0 <= image && image < call.batch && 0 <= label && label < call.classes)) return false;
    const Box<F> box = box_at(call, n);
    for (const F side : {box.x1, box.y1, box.x2, box.y2}) {
      if (!std::isfinite(side)) return false;
    }
    return box.x2 > box.x1 && box.y2 > box.y1 && box.x1 + box.y1 + box.x2 + box.y2 > 0;
  }

  // Makes a side at least that long, about its centre.
  static void enlarge(F& begin, F& end, F least) {
    if (!(least > 0)) return;
    const F centre = (begin + end) / 2, half = std::max(end - begin, least) / 2;
    begin = centre - half;
    end = centre + half;
  }

  void set_objects(const AssignCall& call) {
    const F least = static_cast<F>(call.min_side);
    first.assign(call.batch + 1, 0);
    for (int64_t n = 0; n < call.objects; ++n) {
      if (is_used(call, n)) ++first[call.images[n] + 1];
    }
    for (int64_t i = 0; i < call.batch; ++i) first[i + 1] += first[i];
    const size_t count = first.back();
    numbers.resize(count);
    images.resize(count);
    labels.resize(count);
    boxes.resize(count + kLanes);
    reaches.resize(count + kLanes);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t n = 0; n < call.objects; ++n) {
      if (!is_used(call, n)) continue;
      const int64_t i = next[call.images[n]]++;
      Box<F> box = box_at(call, n);
      numbers[i] = static_cast<int32_t>(n);
      images[i] = static_cast<int32_t>(call.images[n]);
      labels[i] = call.labels[n];
      boxes.set(i, box);
      enlarge(box.x1, box.x2, least);
      enlarge(box.y1, box.y2, least);
      reaches.set(i, box);
    }
  }

  void set_points(const AssignCall& call) {
    const F* points = static_cast<const F*>(call.points);
    const F* cells = static_cast<const F*>(call.cells);
    blocks = (call.anchors + kAnchorBlock - 1) / kAnchorBlock;
    x.assign(blocks * kAnchorBlock, std::numeric_limits<F>::quiet_NaN());
    y = x;
    extents.resize(blocks);
    const F inf = std::numeric_limits<F>::infinity();
    for (int64_t b = 0; b < blocks; ++b) {
      Box<F> extent{inf, inf, -inf, -inf};
      const int64_t end = std::min((b + 1) * kAnchorBlock, call.anchors);
      for (int64_t a = b * kAnchorBlock; a < end; ++a) {
        x[a] = points[2 * a] * cells[a];
        y[a] = points[2 * a + 1] * cells[a];
        extent = {smaller(x[a], extent.x1), smaller(y[a], extent.y1), larger(x[a], extent.x2),
                  larger(y[a], extent.y2)};
      }
      extents.set(b, extent);
    }
  }
};

}  // namespace dflkern
