// From the distances of an anchor's sides to its box.

#pragma once

#include "call.h"

namespace dflkern {

template <class F>
struct Sides {
  typedef F Vector __attribute__((vector_size(kSides * sizeof(F))));
};

// The box of one anchor, in place of its distances.
template <class F>
DFL_INLINE void to_box(const F* point, const F* stride, bool cxcywh, F* box) {
  using V = typename Sides<F>::Vector;
  const V sign{-1, -1, 1, 1}, anchor{point[0], point[1], point[0], point[1]};
  V distances;
  std::memcpy(&distances, box, sizeof(distances));
  V result = anchor + sign * distances;
  if (cxcywh) {
    const V opposite{result[2], result[3], result[0], result[1]};
    const V centre = (result + opposite) / F(2), size = result - opposite;
    result = V{centre[0], centre[1], size[2], size[3]};
  }
  if (stride) result *= *stride;
  std::memcpy(box, &result, sizeof(result));
}

// One side of the boxes as xyxy of neighbouring anchors, in place of their distances.
template <class F>
DFL_INLINE void to_side(const F* points, const F* stride, int side, int count, F* values) {
  const F sign = side < 2 ? F(-1) : F(1);
  for (int i = 0; i < count; ++i) {
    values[i] = points[2 * i + side % 2] + sign * values[i];
    if (stride) values[i] *= stride[i];
  }
}

// The boxes of a block whose call gives_boxes().
template <class F>
void to_boxes_of_block(const Call& call, int64_t output, int lanes, F* values) {
  const BoxDecode& boxes = *call.boxes;
  const F* points = static_cast<const F*>(boxes.points);
  const F* stride = static_cast<const F*>(boxes.stride);
  if (call.columns) {
    const int64_t anchor = output % boxes.anchors;
    const int side = static_cast<int>(output / boxes.anchors % kSides);
    to_side(points + 2 * anchor, stride ? stride + anchor : nullptr, side, lanes, values);
    return;
  }
  int64_t anchor = output / kSides % boxes.anchors;
  for (int i = 0; i < lanes; i += kSides) {
    to_box(points + 2 * anchor, stride ? stride + anchor : nullptr, boxes.cxcywh, values + i);
    if (++anchor == boxes.anchors) anchor = 0;
  }
}

}  // namespace dflkern
