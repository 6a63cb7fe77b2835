// The weights of anchors.

#pragma once

#include "boxes.h"
#include "storage.h"

namespace dflkern {

// In several sums side by side, as one sum waits for each addition.
template <class F, class W>
F sum_of(const W* scores, int64_t classes, int64_t stride) {
  constexpr int kSums = 16;
  F sums[kSums] = {};
  int64_t c = 0;
  for (; stride == 1 && c + kSums <= classes; c += kSums) {
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<F>(widened(scores[c + i]));
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  for (; c < classes; ++c) sums[0] += static_cast<F>(widened(scores[c * stride]));
  return sums[0];
}

inline int64_t size_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return 4;
    case Storage::kDouble:
      return 8;
    default:
      return 2;
  }
}

// The weight of an anchor: the sum of its class scores.
template <class F>
F weight_of(const Weights& weight, int64_t image, int64_t anchor) {
  const int64_t offset = image * weight.batch_stride + anchor * weight.anchor_stride;
  switch (weight.storage) {
    case Storage::kFloat:
      return sum_of<F>(static_cast<const float*>(weight.data) + offset, weight.classes,
                       weight.class_stride);
    case Storage::kDouble:
      return sum_of<F>(static_cast<const double*>(weight.data) + offset, weight.classes,
                       weight.class_stride);
    case Storage::kHalf:
      return sum_of<F>(static_cast<const Half*>(weight.data) + offset, weight.classes,
                       weight.class_stride);
    case Storage::kBFloat16:
      return sum_of<F>(static_cast<const BFloat16*>(weight.data) + offset, weight.classes,
                       weight.class_stride);
  }
  return F(0);
}

}  // namespace dflkern
