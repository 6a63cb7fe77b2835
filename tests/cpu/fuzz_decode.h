// The boxes of random heads, and their gradient.

#pragma once

#include "fuzz_head.h"

namespace fuzz {

template <class T>
class DecodeCase {
  using F = Compute<T>;

 public:
  DecodeCase(Random& random, Report& report)
      : random_(random),
        report_(report),
        head_(random, random.pick({0, 1, 2, 7, 15, 16, 17, 33, 130})),
        layout_{head_.batch, head_.anchors, head_.sides_last},
        anchors_(head_.batch * head_.anchors),
        cxcywh_(random.one_in(2)),
        with_stride_(random.one_in(2)),
        cells_(random, with_stride_ ? head_.anchors : 0),
        boxes_(random, anchors_ * kSides),
        upstream_(random, anchors_ * kSides),
        distances_(random, anchors_ * kSides) {
    report.what += " decode, bins " + std::to_string(head_.bins) + ", anchors " +
                   std::to_string(head_.anchors) + (cxcywh_ ? ", cxcywh" : ", xyxy");
    for (int64_t i = 0; i < cells_.size(); ++i) cells_[i] = random.pick({F(8), F(16), F(0.1)});
    upstream_.fill(random, random.kind(), 2);
  }

  void check() {
    if (anchors_ == 0) return;
    decode();
    decode_backward();
    for (int64_t i = 0; i < anchors_; ++i) compare(i);
  }

 private:
  const F* stride() { return with_stride_ ? cells_.get() : nullptr; }

  Call describe() {
    Call call{};
    head_.describe(call);
    call.position = true;
    const auto axis = [&](int64_t of, int64_t output) {
      return Axis{head_.shape[of], head_.strides.of[of], output, head_.dense.of[of]};
    };
    const Axis along = axis(head_.anchor_axis(), layout_.anchor_step());
    const Axis sides = axis(head_.side_axis(), layout_.side_step());
    call.axes = 3;
    call.axis[0] = axis(0, head_.anchors * kSides);
    call.axis[1] = head_.sides_last ? along : sides;
    call.axis[2] = head_.sides_last ? sides : along;
    return call;
  }

  void decode() {
    const BoxDecode boxes{head_.points.get(), stride(), cxcywh_, head_.anchors, head_.sides_last};
    Call call = describe();
    call.gradient = nullptr;
    call.boxes = &boxes;
    call.position_out = boxes_.get();
    run_all(random_, call);
    if (gives_boxes(call)) return;
    in_pieces(random_, anchors_, [&](int64_t begin, int64_t end) {
      to_boxes<F>(layout_, head_.points.get(), stride(), cxcywh_, begin, end, boxes_.get());
    });
  }

  void decode_backward() {
    in_pieces(random_, anchors_, [&](int64_t begin, int64_t end) {
      to_distance_gradients<F>(layout_, stride(), cxcywh_, begin, end, upstream_.get(),
                               distances_.get());
    });
    Call call = describe();
    call.backward = true;
    call.grad_position = {distances_.get(), 1, false};
    run_all(random_, call);
  }

  void compare(int64_t i) {
    const int64_t image = i / head_.anchors, anchor = i % head_.anchors, side = layout_.side_step();
    const int64_t first = image * head_.anchors * kSides + anchor * layout_.anchor_step();
    const Number scale = with_stride_ ? double(cells_[anchor]) : 1;
    Number box[kSides], by_side[kSides];
    std::vector<Distribution> of;
    for (int s = 0; s < kSides; ++s) {
      of.push_back(head_.distribution(image, anchor, s));
      const Number point = double(head_.points[2 * anchor + s % 2]);
      box[s] = s < 2 ? point - of[s].expected : point + of[s].expected;
    }
    for (int a = 0; a < 2; ++a) {
      const Number low = double(upstream_[first + a * side]) * scale;
      const Number high = double(upstream_[first + (a + 2) * side]) * scale;
      by_side[a] = cxcywh_ ? high - low / 2.0 : -low;
      by_side[a + 2] = cxcywh_ ? high + low / 2.0 : high;
      if (cxcywh_) {
        const Number size = box[a + 2] - box[a];
        box[a] = (box[a] + box[a + 2]) / 2.0;
        box[a + 2] = size;
      }
    }
    for (int s = 0; s < kSides; ++s) {
      const double actual = boxes_[first + s * side];
      const Number wanted = with_stride_ ? box[s] * scale : box[s];
      report_.expect(accepts(wanted, actual, Stored<F>::kFormat), "box", 4 * i + s, actual, wanted);
      for (int k = 0; k < head_.bins; ++k) {
        const Number g = of[s].gradient(nullptr, {}, &by_side[s], k);
        const double found = head_.gradient.value(head_.offset(head_.dense, image, anchor, s, k));
        report_.expect(accepts(g, found, Stored<T>::kFormat), "gradient", 4 * i + s, found, g);
      }
    }
  }

  Random& random_;
  Report& report_;
  Head<T> head_;
  const BoxLayout layout_;
  const int64_t anchors_;
  const bool cxcywh_, with_stride_;
  Memory<F> cells_, boxes_, upstream_, distances_;
};

}  // namespace fuzz
