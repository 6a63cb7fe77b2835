// The box losses of random heads, masks, weights and targets, and their gradient.

#pragma once

#include <cstring>

#include "fuzz_head.h"

namespace fuzz {

template <class T>
class BoxLossCase {
  using F = Compute<T>;

 public:
  BoxLossCase(Random& random, Report& report)
      : random_(random),
        report_(report),
        head_(random, random.pick({0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 40, 64, 65, 97, 130})),
        count_(head_.batch * head_.anchors),
        mask_sizes_{head_.batch, head_.anchors},
        mask_strides_(strides_for(random, mask_sizes_, true, random.one_in(4))),
        mask_(random, mask_strides_.extent),
        boxes_(random, count_ * kSides),
        kind_(random.below(4)) {
    report.what += " box loss, kind " + std::to_string(kind_) + ", bins " +
                   std::to_string(head_.bins) + ", anchors " + std::to_string(head_.batch) + " x " +
                   std::to_string(head_.anchors);
    with_mask_ = !random.one_in(4);
    const int mask_kind = random.below(5);
    for (int64_t i = 0; i < mask_.size(); ++i) mask_[i] = mask_byte(mask_kind);
    fill_boxes();
  }

  void check() {
    switch (random_.below(4)) {
      case 0:
        return check_with<float>();
      case 1:
        return check_with<double>();
      case 2:
        return check_with<Half>();
      default:
        return check_with<BFloat16>();
    }
  }

 private:
  uint8_t mask_byte(int kind) {
    const bool set = random_.one_in(2);
    switch (kind) {
      case 0:
        return set ? 255 : 0;
      case 1:
        return static_cast<uint8_t>(set ? 1 + random_.below(255) : 0);
      case 2:
        return 255;
      case 3:
        return random_.one_in(20) ? 2 : 0;
      default:
        return set ? 1 : 0;
    }
  }

  void fill_boxes() {
    const int kind = random_.pick({0, 0, 1, 4, 5});
    for (int64_t i = 0; i < boxes_.size(); ++i) {
      const double point = head_.points[2 * (i / kSides % head_.anchors) + i % 2];
      const double reach = random_.uniform(-1, head_.bins + 1) * (i % kSides < 2 ? -1 : 1);
      boxes_[i] = F(kind == 0   ? point + reach
                    : kind == 5 ? random_.below(20)
                                : random_.number(kind, 30));
    }
  }

  // Weights of type W, whose sums over classes are never almost 0.
  template <class W>
  void check_with() {
    const bool scores = random_.one_in(2);
    const int64_t classes = scores ? random_.pick({1, 3, 16, 17, 40}) : 1;
    const std::vector<int64_t> sizes{head_.batch, head_.anchors, classes};
    const Strides strides = strides_for(random_, sizes, true, random_.one_in(4));
    Memory<W> weight(random_, strides.extent);
    const int kind = random_.below(4);
    for (int64_t i = 0; i < weight.size(); ++i) {
      const double positive = random_.uniform(0.1, 1);
      const double special = random_.pick({kNan, kInf, 1e30});
      weight.set(i, kind == 0                         ? random_.below(17) / 4.0 - 2
                    : kind == 1                       ? (random_.one_in(2) ? 0 : positive)
                    : kind == 2 && random_.one_in(20) ? special
                                                      : positive);
    }
    std::vector<Number> weights;
    std::vector<bool> active;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t at = place(strides, mask_sizes_, i);
      Number sum = double(F(weight.value(at)));
      for (int64_t c = 1; c < classes; ++c) {
        sum = sum + double(F(weight.value(at + c * strides.of[2])));
      }
      weights.push_back(sum);
      active.push_back(is_set(i) && sum.v != 0);
    }

    BoxLoss loss{};
    head_.describe(loss.call);
    loss.call.margin = margin_;
    loss.batch = head_.batch;
    loss.anchors = head_.anchors;
    const auto strides_of = [&](const Strides& of) {
      return BoxStrides{of.of[0], of.of[head_.anchor_axis()], of.of[head_.side_axis()]};
    };
    loss.logits = strides_of(head_.strides);
    loss.gradient = strides_of(head_.dense);
    loss.points = head_.points.get();
    loss.target_boxes = boxes_.get();
    loss.weight = {Stored<W>::kStorage, weight.get(),  classes,
                   strides.of[0],       strides.of[1], scores ? strides.of[2] : 0};
    if (with_mask_) {
      loss.foreground = reinterpret_cast<decltype(loss.foreground)>(mask_.get());
      loss.foreground_batch_stride = mask_strides_.of[0];
      loss.foreground_anchor_stride = mask_strides_.of[1];
    }
    loss.iou = static_cast<Iou>(kind_);
    compare(loss, weights, active);
  }

  bool is_set(int64_t i) { return !with_mask_ || mask_[place(mask_strides_, mask_sizes_, i)] != 0; }

  void compare(BoxLoss& loss, const std::vector<Number>& weights, const std::vector<bool>& active) {
    const std::vector<int64_t> candidates = find_candidates(loss);
    if (!are_candidates(candidates, active)) return;
    // Memory of exactly that size, unlike a vector's
    Memory<int64_t> listed(random_, candidates.size());
    std::copy(candidates.begin(), candidates.end(), listed.get());
    set_candidates(loss, listed.get(), listed.size());
    Memory<F> kept(random_, kKept * listed.size());
    loss.keep = kept.get();
    std::vector<BoxSums> sums(loss.chunks);
    in_pieces(random_, loss.chunks,
              [&](int64_t begin, int64_t end) { sum_box_losses(loss, begin, end, sums.data()); });
    loss.keep = nullptr;
    if (random_.one_in(2)) {  // what was kept stands for these
      loss.kept = kept.get();
      loss.target_boxes = loss.weight.data = loss.foreground = nullptr;
    }
    const float values[] = {0.7f, 1.3f, -2, 0, 1e30f, 1e-30f};
    const BoxGradients upstream{random_.pick(values), random_.pick(values)};
    write_gradient(loss, upstream);

    BoxSums total;
    for (const BoxSums& part : sums) {
      total.iou += part.iou;
      total.dfl += part.dfl;
      total.anchors += part.anchors;
    }
    Number iou_loss, dfl_loss;
    for (int64_t i = 0; i < count_; ++i) {
      expect_anchor(i, weights[i], active[i], upstream, iou_loss, dfl_loss);
    }
    expect("iou loss", 0, total.iou, iou_loss);
    expect("dfl loss", 0, total.dfl, dfl_loss);
    const auto set = std::count(active.begin(), active.end(), true);
    report_.expect(total.anchors == set, "number of anchors", 0, total.anchors, set);
  }

  // In order, each once, with all that count among them.
  bool are_candidates(const std::vector<int64_t>& found, const std::vector<bool>& active) {
    size_t next = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool listed = next < found.size() && found[next] == i;
      next += listed;
      if (active[i] && !listed) break;
      if (listed && !is_set(i)) break;
    }
    const bool right = next == found.size();
    report_.expect(right, "candidate", next, found.size(), double(next));
    return right;
  }

  void write_gradient(BoxLoss& loss, const BoxGradients& upstream) {
    Memory<T>& gradient = head_.gradient;
    gradient.fill(random_, 1, 3);  // all of it must be written
    const int64_t bytes = gradient.size() * static_cast<int64_t>(sizeof(T));
    if (loss.count == 0 || !gradient_in_order(loss)) {
      in_pieces(random_, bytes, [&](int64_t begin, int64_t end) {
        fill_zeros(reinterpret_cast<char*>(gradient.get()), bytes, begin, end);
      });
      end_fills();
    }
    if (loss.count == 0) return;
    in_pieces(random_, count_,
              [&](int64_t begin, int64_t end) { write_box_gradients(loss, upstream, begin, end); });
  }

  void expect_anchor(int64_t i, Number weight, bool active, const BoxGradients& upstream,
                     Number& iou_loss, Number& dfl_loss) {
    const int64_t image = i / head_.anchors, anchor = i % head_.anchors;
    if (!active) {
      for (int s = 0; s < kSides; ++s) {
        for (int k = 0; k < head_.bins; ++k) expect_gradient(image, anchor, s, k, 0);
      }
      return;
    }
    std::vector<Distribution> of;
    std::vector<Bins> y;
    Number found[kSides], wanted[kSides], dfl;
    for (int s = 0; s < kSides; ++s) {
      const F point = head_.points[2 * anchor + s % 2], edge = boxes_[kSides * i + s];
      of.push_back(head_.distribution(image, anchor, s));
      const F* project = head_.project.empty() ? nullptr : head_.project.data();
      y.push_back(bins_of(s < 2 ? point - edge : edge - point, project, head_.bins, margin_));
      found[s] = s < 2 ? Number(double(point)) - of[s].expected : double(point) + of[s].expected;
      wanted[s] = double(edge);
      dfl = dfl + of[s].loss(y[s]);
    }
    const Overlap overlap(found, wanted, kind_);
    iou_loss = iou_loss + weight * (Number(1) - overlap.value);
    dfl_loss = dfl_loss + weight * (dfl / double(kSides));
    for (int s = 0; s < kSides; ++s) {
      const Number by_side = weight * -upstream.iou * overlap.gradient[s] * (s < 2 ? -1.0 : 1.0);
      const Number by_loss = weight * (upstream.dfl / kSides);
      for (int k = 0; k < head_.bins; ++k) {
        expect_gradient(image, anchor, s, k, of[s].gradient(&by_loss, y[s], &by_side, k));
      }
    }
  }

  void expect_gradient(int64_t image, int64_t anchor, int side, int bin, Number wanted) {
    const double actual = head_.gradient.value(head_.offset(head_.dense, image, anchor, side, bin));
    report_.expect(accepts(wanted, actual, Stored<T>::kFormat), "gradient",
                   ((image * head_.anchors + anchor) * kSides + side) * head_.bins + bin, actual,
                   wanted);
  }
  void expect(const char* name, int64_t at, double actual, Number expected) {
    report_.expect(accepts(expected, actual, Stored<F>::kFormat), name, at, actual, expected);
  }

  Random& random_;
  Report& report_;
  Head<T> head_;
  const int64_t count_;
  const std::vector<int64_t> mask_sizes_;
  const Strides mask_strides_;
  Memory<uint8_t> mask_;
  Memory<F> boxes_;
  const int kind_;
  const double margin_ = 0.01;
  bool with_mask_;
};

}  // namespace fuzz
