// The anchors of a box loss that are computed together.

#pragma once

#include <cstdlib>
#include <type_traits>

#include "box_weights.h"
#include "boxes.h"
#include "lanes.h"

namespace dflkern {

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
        backward_lanes_(backward_) {
    place_.next = next_;
    place_.gradient_next = gradient_next_;
  }

  BoxSums sum(int64_t chunk) {
    BoxSums sums;
    const int64_t begin = begin_of(chunk), end = begin_of(chunk + 1);
    fetch<false>(end, begin_of(chunk + 2));
    if (!collect(begin, end)) return sums;
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
      const F iou_loss = weight_[i] * (1 - overlap_[i]), dfl_loss = weight_[i] * (dfl / kSides);
      if (loss_.iou_losses) {
        static_cast<F*>(loss_.iou_losses)[indices_[i]] = iou_loss;
        static_cast<F*>(loss_.dfl_losses)[indices_[i]] = dfl_loss;
      }
      sums.iou += iou_loss;
      sums.dfl += dfl_loss;
    }
    sums.anchors = count_;
    return sums;
  }

  // Writes the gradients of candidates begin to end, which are a chunk at most, when
  // before(anchors, count) was called with those of them that have one.
  template <class Before>
  void write_gradient(int64_t begin, int64_t end, const BoxGradients& upstream, Before before) {
    fetch<true>(end, std::min(end + loss_.chunk, loss_.count));
    const bool any = collect(begin, end);
    before(indices_, count_);
    if (!any) return;
    LaneValues<F> values{};
    values.position = distances_;
    decode_lanes_.run(place_, values);
    alignas(64) F by_side[kSides][kAnchors + kWidth];
    scale_weights(upstream);
    for (int i = 0; i < count_; i += kWidth) {
      const Box<V> g = with_kind([&](auto kind) {
        return paired_iou_gradient<decltype(kind)::value>(predicted(i), wanted(i));
      });
      const V scale = load<V>(to_iou_ + i);
      store(by_side[0] + i, -(scale * g.x1));
      store(by_side[1] + i, -(scale * g.y1));
      store(by_side[2] + i, scale * g.x2);
      store(by_side[3] + i, scale * g.y2);
    }
    alignas(64) F grad_loss[kMaxLanes] = {}, grad_position[kMaxLanes] = {};
    for (int s = 0; s < kSides; ++s) {
      for (int i = 0; i < count_; ++i) {
        grad_position[s * count_ + i] = by_side[s][i];
        grad_loss[s * count_ + i] = to_dfl_[i];
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

  int64_t begin_of(int64_t chunk) const {
    return std::min<int64_t>(chunk * loss_.chunk, loss_.count);
  }

  // Asks memory for what these candidates need, which lies all over it; their rows are left to the
  // kernels, which ask for one at each step and not for more than can be under way. Inline, since
  // GCC takes a function that only prefetches for one without effect, and leaves its calls out.
  template <bool kBackward>
  DFL_INLINE void fetch(int64_t begin, int64_t end) {
    const T* logits = static_cast<const T*>(loss_.call.logits);
    const Weights& weight = loss_.weight;
    const char* weights = static_cast<const char*>(weight.data);
    const int64_t size = size_of(weight.storage);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t index = loss_.candidates[c];
      const int64_t image = index / loss_.anchors, anchor = index % loss_.anchors;
      if (!loss_.kept) {
        const int64_t first = image * weight.batch_stride + anchor * weight.anchor_stride;
        __builtin_prefetch(box_of(index, image, anchor));
        fetch_line<false>(weights + size * first, weight.classes, size * weight.class_stride);
      }
      const int64_t first = image * loss_.logits.batch + anchor * loss_.logits.anchor;
      const int64_t gradient = image * loss_.gradient.batch + anchor * loss_.gradient.anchor;
      if (forward_lanes_.takes_rows()) {
        for (int s = 0; s < kSides; ++s) {
          next_[kSides * (c - begin) + s] = first + s * loss_.logits.side;
          gradient_next_[kSides * (c - begin) + s] = gradient + s * loss_.gradient.side;
        }
        continue;
      }
      const T* sides = logits + first;
      T* gradients = static_cast<T*>(loss_.call.gradient) + gradient;
      for (int s = 0; s < kSides; ++s) {
        fetch_line<false>(sides + s * loss_.logits.side, loss_.call.bins,
                          sizeof(T) * loss_.call.bin_stride);
        if (kBackward) {
          fetch_line<true>(gradients + s * loss_.gradient.side, loss_.call.bins,
                           sizeof(T) * loss_.call.gradient_bin_stride);
        }
      }
    }
  }

  // The cache lines of `count` values that lie `step` bytes apart.
  template <bool kWrite>
  static DFL_INLINE void fetch_line(const void* values, int64_t count, int64_t step) {
    const int64_t stride = std::max<int64_t>(std::abs(step), 1);
    const int64_t every = std::max<int64_t>(1, kCacheLine / stride);
    const char* from = static_cast<const char*>(values);
    for (int64_t i = 0; i < count; i += every) __builtin_prefetch(from + i * step, kWrite);
    if (count) __builtin_prefetch(from + (count - 1) * step, kWrite);
  }

  // The weights times the upstream gradients.
  void scale_weights(const BoxGradients& upstream) {
    const F iou = static_cast<F>(-upstream.iou), dfl = static_cast<F>(upstream.dfl) / kSides;
    for (int i = 0; i < count_; ++i) {
      to_iou_[i] = weight_[i] * iou;
      to_dfl_[i] = weight_[i] * dfl;
      if (!upstream.iou_each) continue;
      to_iou_[i] *= static_cast<const F*>(upstream.iou_each)[indices_[i]];
      to_dfl_[i] *= static_cast<const F*>(upstream.dfl_each)[indices_[i]];
    }
  }

  // Where the target box of an anchor is.
  const F* box_of(int64_t index, int64_t image, int64_t anchor) const {
    const int64_t row = loss_.matched.data ? loss_.matched.at(image, anchor) : index;
    return static_cast<const F*>(loss_.target_boxes) + kSides * row;
  }

  // Reads the anchors of these candidates that have a weight; whether there are any.
  bool collect(int64_t begin, int64_t end) {
    const F* points = static_cast<const F*>(loss_.points);
    const F* stride = loss_.kept ? nullptr : static_cast<const F*>(loss_.stride);
    int64_t logits[kAnchors], gradient[kAnchors];
    count_ = 0;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t index = loss_.candidates[c];
      const int64_t image = index / loss_.anchors, anchor = index % loss_.anchors;
      const F* kept = loss_.kept ? static_cast<const F*>(loss_.kept) + kKept * c : nullptr;
      const F weight = kept ? kept[0] : weight_of<F>(loss_.weight, image, anchor);
      const F* from = kept ? kept + 1 : box_of(index, image, anchor);
      const F pixels = stride ? stride[anchor] : F(1);
      const F box[kSides] = {from[0] / pixels, from[1] / pixels, from[2] / pixels,
                             from[3] / pixels};
      if (loss_.keep) {
        F* keep = static_cast<F*>(loss_.keep) + kKept * c;
        keep[0] = weight;
        std::copy(box, box + kSides, keep + 1);
      }
      if (weight == 0) continue;
      const int i = count_++;
      indices_[i] = index;
      weight_[i] = weight;
      x_[i] = points[2 * anchor];
      y_[i] = points[2 * anchor + 1];
      for (int s = 0; s < kSides; ++s) box_[s][i] = box[s];
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
    return {load<V>(box_[0] + i), load<V>(box_[1] + i), load<V>(box_[2] + i), load<V>(box_[3] + i)};
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
  int64_t indices_[kAnchors];
  Place place_;
  int64_t next_[kMaxLanes] = {}, gradient_next_[kMaxLanes] = {};
  // Vectors may reach beyond the last anchor, into values that are not used.
  alignas(64) F weight_[kAnchors + kWidth] = {}, to_iou_[kAnchors + kWidth] = {},
                                   to_dfl_[kAnchors + kWidth] = {}, x_[kAnchors + kWidth] = {},
                                   y_[kAnchors + kWidth] = {}, overlap_[kAnchors + kWidth],
                                   box_[kSides][kAnchors + kWidth] = {},
                                   distances_[kMaxLanes + kWidth] = {}, losses_[kMaxLanes],
                                   target_[kMaxLanes];
};

}  // namespace dflkern
