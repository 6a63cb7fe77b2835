#include "boxes.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace dflkern {
namespace {

// Calls function(anchor, offset of its first number) for anchors, of all images, begin to end.
template <class Function>
void each_anchor(const BoxLayout& layout, int64_t begin, int64_t end, Function function) {
  int64_t image = begin / layout.anchors, anchor = begin % layout.anchors;
  for (int64_t index = begin; index < end; ++index, ++anchor) {
    if (anchor == layout.anchors) {
      anchor = 0;
      ++image;
    }
    function(anchor, image * layout.anchors * kSides + anchor * layout.anchor_step());
  }
}

template <class F, class W>
F sum_of(const W* scores, int64_t classes, int64_t stride) {
  F sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += static_cast<F>(widened(scores[c * stride]));
  return sum;
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

// The anchors of one chunk that have a weight, side by side; lane s * count + i is side s of the
// i-th of them.
template <class T>
class BoxChunk {
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int kWidth = sizeof(V) / sizeof(F);
  static constexpr int kAnchors = kMaxLanes / kSides;

 public:
  explicit BoxChunk(const BoxLoss& loss)
      : loss_(loss),
        forward_(call_for(loss, true, false)),
        decode_(call_for(loss, false, false)),
        backward_(call_for(loss, true, true)),
        forward_lanes_(forward_),
        decode_lanes_(decode_),
        backward_lanes_(backward_) {}

  BoxSums sum(int64_t chunk) {
    BoxSums sums;
    if (!collect(chunk)) return sums;
    LaneValues<F> values{};
    values.target = target_;
    values.loss = losses_;
    values.position = distances_;
    forward_lanes_.run(place_, values);
    for (int i = 0; i < count_; i += kWidth) {
      store(overlap_ + i, with_kind([&](auto kind) {
              return paired_iou<decltype(kind)::value>(predicted(i), wanted(i));
            }));
    }
    for (int i = 0; i < count_; ++i) {
      F dfl = 0;
      for (int s = 0; s < kSides; ++s) dfl += losses_[s * count_ + i];
      sums.iou += weight_[i] * (1 - overlap_[i]);
      sums.dfl += weight_[i] * (dfl / kSides);
    }
    sums.anchors = count_;
    return sums;
  }

  void write_gradient(int64_t chunk, const BoxGradients& upstream) {
    if (!collect(chunk)) return;
    LaneValues<F> values{};
    values.position = distances_;
    decode_lanes_.run(place_, values);
    alignas(64) F by_side[kSides][kAnchors + kWidth];
    const F to_iou = static_cast<F>(-upstream.iou), to_dfl = static_cast<F>(upstream.dfl) / kSides;
    for (int i = 0; i < count_; i += kWidth) {
      const Box<V> g = with_kind([&](auto kind) {
        return paired_iou_gradient<decltype(kind)::value>(predicted(i), wanted(i));
      });
      const V scale = load<V>(weight_ + i) * to_iou;
      store(by_side[0] + i, -(scale * g.x1));
      store(by_side[1] + i, -(scale * g.y1));
      store(by_side[2] + i, scale * g.x2);
      store(by_side[3] + i, scale * g.y2);
    }
    alignas(64) F grad_loss[kMaxLanes] = {}, grad_position[kMaxLanes] = {};
    for (int s = 0; s < kSides; ++s) {
      for (int i = 0; i < count_; ++i) {
        grad_position[s * count_ + i] = by_side[s][i];
        grad_loss[s * count_ + i] = weight_[i] * to_dfl;
      }
    }
    values = {};
    values.target = target_;
    values.grad_loss = grad_loss;
    values.grad_position = grad_position;
    backward_lanes_.run(place_, values);
  }

 private:
  static Call call_for(const BoxLoss& loss, bool with_loss, bool backward) {
    Call call = loss.call;
    call.loss = with_loss;
    call.position = true;
    call.backward = backward;
    return call;
  }

  template <class Function>
  auto with_kind(Function function) const {
    switch (loss_.iou) {
      case Iou::kIou:
        return function(std::integral_constant<Iou, Iou::kIou>());
      case Iou::kGiou:
        return function(std::integral_constant<Iou, Iou::kGiou>());
      case Iou::kDiou:
        return function(std::integral_constant<Iou, Iou::kDiou>());
      default:
        return function(std::integral_constant<Iou, Iou::kCiou>());
    }
  }

  // Reads the chunk's anchors; whether there are any.
  bool collect(int64_t chunk) {
    const int64_t begin = chunk * loss_.chunk;
    const int64_t end = std::min<int64_t>(begin + loss_.chunk, loss_.candidates.size());
    const F* boxes = static_cast<const F*>(loss_.target_boxes);
    const F* points = static_cast<const F*>(loss_.points);
    int64_t logits[kAnchors], gradient[kAnchors];
    count_ = 0;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t index = loss_.candidates[c];
      const int64_t image = index / loss_.anchors, anchor = index % loss_.anchors;
      const F weight = weight_of<F>(loss_.weight, image, anchor);
      if (weight == 0) continue;
      const int i = count_++;
      weight_[i] = weight;
      x_[i] = points[2 * anchor];
      y_[i] = points[2 * anchor + 1];
      for (int s = 0; s < kSides; ++s) box_[s][i] = boxes[kSides * index + s];
      logits[i] = image * loss_.logits.batch + anchor * loss_.logits.anchor;
      gradient[i] = image * loss_.gradient.batch + anchor * loss_.gradient.anchor;
    }
    if (count_ == 0) return false;
    place_.lanes = kSides * count_;
    for (int s = 0; s < kSides; ++s) {
      const F* point = s % 2 ? y_ : x_;
      for (int i = 0; i < count_; ++i) {
        const int lane = s * count_ + i;
        place_.logits[lane] = logits[i] + s * loss_.logits.side;
        place_.gradient[lane] = gradient[i] + s * loss_.gradient.side;
        target_[lane] = s < 2 ? point[i] - box_[s][i] : box_[s][i] - point[i];
      }
    }
    pad(place_.logits, place_.lanes);
    std::fill(target_ + place_.lanes, target_ + padded_lanes(place_.lanes), F(0));
    return true;
  }

  Box<V> wanted(int i) const {
    return {load<V>(box_[0] + i), load<V>(box_[1] + i), load<V>(box_[2] + i),
            load<V>(box_[3] + i)};
  }
  Box<V> predicted(int i) const {
    const V x = load<V>(x_ + i), y = load<V>(y_ + i);
    const F* d = distances_ + i;
    return {x - load<V>(d), y - load<V>(d + count_), x + load<V>(d + 2 * count_),
            y + load<V>(d + 3 * count_)};
  }

  const BoxLoss& loss_;
  const Call forward_, decode_, backward_;
  LaneRunner<T> forward_lanes_, decode_lanes_, backward_lanes_;
  int count_;
  Place place_;
  // Vectors may reach beyond the last anchor, into values that are not used.
  alignas(64) F weight_[kAnchors + kWidth] = {}, x_[kAnchors + kWidth] = {},
                y_[kAnchors + kWidth] = {}, overlap_[kAnchors + kWidth],
                box_[kSides][kAnchors + kWidth] = {}, distances_[kMaxLanes + kWidth] = {},
                losses_[kMaxLanes], target_[kMaxLanes];
};

// Calls function with the storage type of the logits as an argument's type.
template <class Function>
void with_storage(Storage storage, Function function) {
  switch (storage) {
    case Storage::kFloat:
      return function(float());
    case Storage::kDouble:
      return function(double());
    case Storage::kHalf:
      return function(Half());
    case Storage::kBFloat16:
      return function(BFloat16());
  }
}

// The anchors of one image whose mask is set; most masks are mostly empty.
void list_set(const bool* mask, int64_t stride, int64_t anchors, int64_t first,
              std::vector<int64_t>& found) {
  int64_t a = 0;
  while (a < anchors) {
    uint64_t eight = 0;
    if (stride == 1 && a + 8 <= anchors) {
      std::memcpy(&eight, mask + a, sizeof(eight));
      if (eight == 0) {
        a += 8;
        continue;
      }
    }
    const int64_t end = std::min(a + 8, anchors);
    for (; a < end; ++a) {
      if (mask[a * stride]) found.push_back(first + a);
    }
  }
}

}  // namespace

template <class F>
void to_boxes(const BoxLayout& layout, const F* points, const F* stride, bool xywh, int64_t begin,
              int64_t end, F* boxes) {
  const int64_t side = layout.side_step();
  each_anchor(layout, begin, end, [=](int64_t anchor, int64_t offset) {
    F* box = boxes + offset;
    const F x = points[2 * anchor], y = points[2 * anchor + 1];
    const F scale = stride ? stride[anchor] : F(1);
    F x1 = x - box[0], y1 = y - box[side], x2 = x + box[2 * side], y2 = y + box[3 * side];
    if (xywh) {
      const F width = x2 - x1, height = y2 - y1;
      x1 = (x1 + x2) / 2;
      y1 = (y1 + y2) / 2;
      x2 = width;
      y2 = height;
    }
    box[0] = x1 * scale;
    box[side] = y1 * scale;
    box[2 * side] = x2 * scale;
    box[3 * side] = y2 * scale;
  });
}

template <class F>
void to_distance_gradients(const BoxLayout& layout, const F* stride, bool xywh, int64_t begin,
                           int64_t end, const F* grad_boxes, F* grad_distances) {
  const int64_t side = layout.side_step();
  each_anchor(layout, begin, end, [=](int64_t anchor, int64_t offset) {
    const F* from = grad_boxes + offset;
    F* to = grad_distances + offset;
    const F scale = stride ? stride[anchor] : F(1);
    for (int axis = 0; axis < 2; ++axis) {
      const F first = from[axis * side] * scale, second = from[(axis + 2) * side] * scale;
      // Centre = anchor + (rb - lt) / 2, size = lt + rb
      to[axis * side] = xywh ? second - first / 2 : -first;
      to[(axis + 2) * side] = xywh ? second + first / 2 : second;
    }
  });
}

template void to_boxes<float>(const BoxLayout&, const float*, const float*, bool, int64_t, int64_t,
                              float*);
template void to_boxes<double>(const BoxLayout&, const double*, const double*, bool, int64_t,
                               int64_t, double*);
template void to_distance_gradients<float>(const BoxLayout&, const float*, bool, int64_t, int64_t,
                                           const float*, float*);
template void to_distance_gradients<double>(const BoxLayout&, const double*, bool, int64_t,
                                            int64_t, const double*, double*);

void find_candidates(BoxLoss& loss) {
  loss.candidates.clear();
  for (int64_t image = 0; image < loss.batch; ++image) {
    const int64_t first = image * loss.anchors;
    if (loss.foreground) {
      list_set(loss.foreground + image * loss.foreground_batch_stride,
               loss.foreground_anchor_stride, loss.anchors, first, loss.candidates);
      continue;
    }
    for (int64_t a = 0; a < loss.anchors; ++a) {
      if (weight_of<double>(loss.weight, image, a) != 0) loss.candidates.push_back(first + a);
    }
  }
  const int lanes = std::clamp(kColumnsSize / loss.call.bins / kStep * kStep, kStep, kMaxLanes);
  loss.chunk = lanes / kSides;
  loss.chunks = (static_cast<int64_t>(loss.candidates.size()) + loss.chunk - 1) / loss.chunk;
}

void sum_box_losses(const BoxLoss& loss, int64_t begin, int64_t end, BoxSums* sums) {
  with_storage(loss.call.storage, [&](auto logit) {
    BoxChunk<decltype(logit)> chunk(loss);
    for (int64_t c = begin; c < end; ++c) sums[c] = chunk.sum(c);
  });
}

void fill_zeros(char* data, int64_t size, int64_t begin, int64_t end) {
#if defined(__SSE2__)
  constexpr int64_t kCached = 1 << 22;
  if (size > kCached) {
    const auto aligned = [&](int64_t at) {
      const int64_t over = reinterpret_cast<uintptr_t>(data + at) % kCacheLine;
      return over ? std::min(at + kCacheLine - over, end) : at;
    };
    int64_t at = aligned(begin);
    std::memset(data + begin, 0, at - begin);
    for (; at + kCacheLine <= end; at += kCacheLine) {
      for (int i = 0; i < kCacheLine; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(data + at + i), _mm_setzero_si128());
      }
    }
    _mm_sfence();
    begin = at;
  }
#endif
  std::memset(data + begin, 0, end - begin);
}

void write_box_gradients(const BoxLoss& loss, const BoxGradients& upstream, int64_t begin,
                         int64_t end) {
  with_storage(loss.call.storage, [&](auto logit) {
    BoxChunk<decltype(logit)> chunk(loss);
    for (int64_t c = begin; c < end; ++c) chunk.write_gradient(c, upstream);
  });
}

}  // namespace dflkern
