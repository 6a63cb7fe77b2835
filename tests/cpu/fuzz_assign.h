// The assignment of random objects to random anchors, against the definition: all objects against
// all anchors, one pair at a time, in the same arithmetic, so that results must be the same.

#pragma once

#include <algorithm>

#include "assign.h"
#include "assign_math.h"
#include "fuzz_support.h"

namespace fuzz {

using namespace dflkern;

template <class T>
class AssignCase {
  using F = Compute<T>;
  struct Pair {
    int64_t anchor;
    F metric, overlap;
  };
  using Pairs = std::vector<Pair>;

 public:
  AssignCase(Random& random, Report& report)
      : random_(random),
        report_(report),
        batch_(random.pick({0, 1, 1, 2, 3})),
        anchors_(random.pick({0, 1, 7, 16, 33, 63, 64, 65, 130, 200})),
        classes_(random.pick({0, 1, 2, 5})),
        objects_(random.pick({0, 1, 2, 5, 15, 16, 17, 40})),
        logit_sizes_{batch_, anchors_, classes_},
        box_sizes_{batch_, anchors_, kSides},
        logit_strides_(strides_for(random, logit_sizes_, true, random.one_in(8))),
        box_strides_(strides_for(random, box_sizes_, true, random.one_in(8))),
        logits_(random, logit_strides_.extent),
        boxes_(random, box_strides_.extent),
        points_(random, 2 * anchors_),
        cells_(random, anchors_),
        gt_boxes_(random, kSides * objects_),
        step_(1 + random.below(2)),
        labels_(random, step_ * objects_),
        images_(random, step_ * objects_),
        matched_(random, batch_ * anchors_),
        score_(random, batch_ * anchors_) {
    report.what += " assign, " + std::to_string(batch_) + " x " + std::to_string(anchors_) +
                   " anchors, " + std::to_string(objects_) + " objects";
    fill();
  }

  void check() {
    AssignCall call{};
    call.storage = Stored<T>::kStorage;
    call.logits = logits_.get();
    call.logit_strides = {logit_strides_.of[0], logit_strides_.of[1], logit_strides_.of[2]};
    call.boxes = boxes_.get();
    call.box_strides = {box_strides_.of[0], box_strides_.of[1], box_strides_.of[2]};
    call.points = points_.get();
    call.cells = cells_.get();
    call.gt_boxes = gt_boxes_.get();
    call.labels = {labels_.get(), true, step_};
    call.images = {images_.get(), false, step_};
    call.batch = batch_;
    call.anchors = anchors_;
    call.classes = classes_;
    call.objects = objects_;
    call.topk = random_.pick({1, 2, 3, 10, 1000});
    call.topk2 = random_.one_in(2) ? call.topk : 1 + random_.below(static_cast<int>(call.topk));
    call.alpha = random_.pick({0.5, 0.5, 1.0, 0.0, 0.3, 2.0});
    call.beta = random_.pick({6.0, 6.0, 1.0, 0.0, 2.7, 40.0});
    call.min_side = random_.pick({0.0, 16.0, 1e30});
    call.eps = random_.pick({1e-9, 0.0, 0.5});
    call.iou = static_cast<Iou>(random_.below(4));
    call.conflicts = static_cast<Conflicts>(random_.below(3));
    call.matched = matched_.get();
    call.score = score_.get();
    const auto assigner = make_assigner(call);
    in_pieces(random_, assigner->objects(),
              [&](int64_t begin, int64_t end) { assigner->claim(begin, end); });
    in_pieces(random_, batch_, [&](int64_t begin, int64_t end) { assigner->settle(begin, end); });
    double sum = 0;
    for (int64_t image = 0; image < batch_; ++image) sum += expect_image(call, image);
    report_.expect(std::fabs(assigner->total() - sum) <= 1e-9 * sum, "total", 0, assigner->total(),
                   sum);
  }

 private:
  void fill() {
    const int kind = random_.pick({0, 0, 0, 1, 2, 4});
    const int cells = random_.pick({4, 12});
    logits_.fill(random_, random_.pick({0, 0, 1, 2, 3}), 5);
    boxes_.fill(random_, random_.pick({0, 1, 2, 4}), 60);
    for (int64_t a = 0; a < anchors_; ++a) {
      cells_[a] = random_.pick({8, 8, 16});
      for (int i = 0; i < 2; ++i) {
        points_[2 * a + i] = F(kind == 2 ? random_.number(1, 10) : random_.below(cells) + 0.5);
      }
    }
    for (int64_t n = 0; n < objects_; ++n) {
      images_[step_ * n] = random_.one_in(10) ? random_.pick({-1, int(batch_), 1 << 30})
                                              : random_.below(int(batch_) + !batch_);
      labels_[step_ * n] = random_.one_in(10)
                               ? random_.pick({int64_t(-1), classes_, int64_t(1) << 40})
                               : random_.below(int(classes_) + !classes_);
      const bool twice = n && random_.one_in(5);
      for (int s = 0; s < 2; ++s) {
        const double size = random_.pick({4.0, 30.0, 100.0}) * random_.uniform(0.3, 1);
        const double centre = random_.below(8 * cells + 1);
        const int64_t at = kSides * n + s;
        gt_boxes_[at] = twice ? gt_boxes_[at - kSides] : F(centre - size / 2);
        gt_boxes_[at + 2] = twice ? gt_boxes_[at + 2 - kSides] : F(centre + size / 2);
        if (kind && random_.one_in(8))
          gt_boxes_[at + 2 * random_.below(2)] = F(random_.number(kind, 50));
      }
    }
    for (int64_t i = 0; i < batch_ * anchors_ && objects_; ++i) {  // near some object
      if (random_.one_in(3)) continue;
      const int64_t n = random_.below(static_cast<int>(objects_));
      const double noise = random_.pick({0.0, 3.0, 10.0});
      for (int s = 0; s < kSides; ++s) {
        boxes_[box_place(i) + s * box_strides_.of[2]] =
            gt_boxes_[kSides * n + s] + F(random_.uniform(-noise, noise));
      }
    }
  }

  int64_t box_place(int64_t i) const {
    return i / anchors_ * box_strides_.of[0] + i % anchors_ * box_strides_.of[1];
  }

  static bool better(const Pair& a, const Pair& b) {
    return a.metric != b.metric ? a.metric > b.metric : a.anchor < b.anchor;
  }

  static Pairs best_of(Pairs pairs, int64_t count) {
    pairs.erase(std::remove_if(pairs.begin(), pairs.end(), [](auto& p) { return !(p.metric > 0); }),
                pairs.end());
    std::sort(pairs.begin(), pairs.end(), better);
    if (static_cast<int64_t>(pairs.size()) > count) pairs.resize(count);
    return pairs;
  }

  F overlap(const AssignCall& call, int64_t object, int64_t place) {
    const F* o = gt_boxes_.get() + kSides * object;
    const F* b = boxes_.get() + box_place(place);
    const int64_t s = box_strides_.of[2];
    const Box<F> mine{o[0], o[1], o[2], o[3]}, found{b[0], b[s], b[2 * s], b[3 * s]};
    switch (call.iou) {
      case Iou::kIou:
        return overlap_of<Iou::kIou>(mine, found);
      case Iou::kGiou:
        return overlap_of<Iou::kGiou>(mine, found);
      case Iou::kDiou:
        return overlap_of<Iou::kDiou>(mine, found);
      default:
        return overlap_of<Iou::kCiou>(mine, found);
    }
  }

  Pair pair(const AssignCall& call, int64_t object, int64_t place) {
    const int64_t image = place / anchors_, anchor = place % anchors_;
    const F reach = overlap(call, object, place);
    const F logit = F(logits_.value(image * logit_strides_.of[0] + anchor * logit_strides_.of[1] +
                                    labels_[step_ * object] * logit_strides_.of[2]));
    const F metric = Power<F>(call.alpha)(sigmoid(logit)) * Power<F>(call.beta)(reach);
    return {anchor, metric > 0 ? metric : F(0), reach};
  }

  bool used(int64_t object, int64_t image) {
    const F* b = gt_boxes_.get() + kSides * object;
    for (int s = 0; s < kSides; ++s) {
      if (!std::isfinite(b[s])) return false;
    }
    const int64_t label = labels_[step_ * object];
    return images_[step_ * object] == image && label >= 0 && label < classes_ && b[0] < b[2] &&
           b[1] < b[3] && b[0] + b[1] + b[2] + b[3] > 0;
  }

  bool inside(const AssignCall& call, int64_t object, int64_t anchor) {
    const F least = F(call.min_side), eps = F(call.eps);
    for (int i = 0; i < 2; ++i) {
      F first = gt_boxes_[kSides * object + i], second = gt_boxes_[kSides * object + i + 2];
      const F at = points_[2 * anchor + i] * cells_[anchor];
      if (least > 0) {
        const F centre = (first + second) / 2;
        const F size = second - first < least ? least : second - first;
        first = centre - size / 2;
        second = centre + size / 2;
      }
      if (!(at - first > eps && second - at > eps)) return false;
    }
    return true;
  }

  // Settles an anchor that several claimed.
  int64_t winner(const AssignCall& call, const std::vector<int64_t>& mine,
                 const std::vector<Pairs>& claims, int64_t image, int64_t anchor) {
    int64_t best = -1;
    F most = -1;
    for (size_t i = 0; i < mine.size(); ++i) {
      if (call.conflicts == Conflicts::kInside && !inside(call, mine[i], anchor)) continue;
      if (call.conflicts == Conflicts::kClaimed && !has(claims[i], anchor)) continue;
      const F reach = overlap(call, mine[i], image * anchors_ + anchor);
      if (reach > most) {
        best = static_cast<int64_t>(i);
        most = reach;
      }
    }
    return best;
  }
  static bool has(const Pairs& pairs, int64_t anchor) {
    return std::any_of(pairs.begin(), pairs.end(), [&](auto& p) { return p.anchor == anchor; });
  }

  // Compares an image, and returns the sum of its scores.
  double expect_image(const AssignCall& call, int64_t image) {
    std::vector<int64_t> mine;
    std::vector<Pairs> claims;
    for (int64_t n = 0; n < objects_; ++n) {
      if (!used(n, image)) continue;
      Pairs candidates;
      for (int64_t a = 0; a < anchors_; ++a) {
        if (inside(call, n, a)) candidates.push_back(pair(call, n, image * anchors_ + a));
      }
      mine.push_back(n);
      claims.push_back(best_of(candidates, call.topk));
    }
    std::vector<Pairs> final(mine.size());
    for (int64_t a = 0; a < anchors_; ++a) {
      int64_t count = 0, owner = -1;
      for (size_t i = 0; i < mine.size(); ++i) {
        if (!has(claims[i], a)) continue;
        ++count;
        owner = static_cast<int64_t>(i);
      }
      if (count > 1) owner = winner(call, mine, claims, image, a);
      if (owner >= 0) final[owner].push_back(pair(call, mine[owner], image * anchors_ + a));
    }
    std::vector<int32_t> matched(anchors_, -1);
    std::vector<F> score(anchors_, 0);
    double sum = 0;
    for (size_t i = 0; i < mine.size(); ++i) {
      if (call.topk2 < call.topk) final[i] = best_of(final[i], call.topk2);
      F metric = 0, reach = 0;
      for (const Pair& p : final[i]) {
        metric = std::max(metric, p.metric);
        reach = std::max(reach, p.overlap);
      }
      for (const Pair& p : final[i]) {
        matched[p.anchor] = static_cast<int32_t>(mine[i]);
        if (p.metric > 0) score[p.anchor] = p.metric * reach / (metric + F(call.eps));
        sum += score[p.anchor];
      }
    }
    for (int64_t a = 0; a < anchors_; ++a) {
      const int64_t at = image * anchors_ + a;
      report_.expect(matched_[at] == matched[a], "matched", at, matched_[at], double(matched[a]));
      report_.expect(score_[at] == score[a], "score", at, score_[at], double(score[a]));
    }
    return sum;
  }

  Random& random_;
  Report& report_;
  const int64_t batch_, anchors_, classes_, objects_;
  const std::vector<int64_t> logit_sizes_, box_sizes_;
  const Strides logit_strides_, box_strides_;
  Memory<T> logits_;
  Memory<F> boxes_, points_, cells_, gt_boxes_;
  const int64_t step_;
  Memory<int64_t> labels_;
  Memory<int32_t> images_, matched_;
  Memory<F> score_;
};

}  // namespace fuzz
