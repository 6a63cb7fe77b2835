// Which object each anchor answers for, as an assigner found it.

#pragma once

#include <cstdint>

namespace dflkern {

// A tensor (batch, anchors) of int32 or int64.
struct MatchedObjects {
  const void* data;
  bool wide;  // int64
  int64_t batch_stride, anchor_stride;

  int64_t at(int64_t image, int64_t anchor) const {
    const int64_t offset = image * batch_stride + anchor * anchor_stride;
    return wide ? static_cast<const int64_t*>(data)[offset]
                : static_cast<const int32_t*>(data)[offset];
  }
};

}  // namespace dflkern
