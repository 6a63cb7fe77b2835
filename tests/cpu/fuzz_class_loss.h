// The classification loss of random heads and assignments, and its gradient, against the formulas
// in double.

#pragma once

#include "class_loss.h"
#include "fuzz_head.h"

namespace fuzz {

// Memory of integers, which ends where they end.
class Integers {
 public:
  Integers(Random&, int64_t size) : size_(size), data_(new int32_t[size]()) {}
  int32_t* get() { return data_.get(); }
  int64_t size() const { return size_; }
  int32_t& operator[](int64_t i) { return data_[i]; }

 private:
  const int64_t size_;
  std::unique_ptr<int32_t[]> data_;
};

template <class T>
class ClassLossCase {
  using F = Compute<T>;

 public:
  ClassLossCase(Random& random, Report& report)
      : random_(random),
        report_(report),
        classes_(random.pick({1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 80, 130})),
        anchors_(random.one_in(20) ? random.pick({1023, 1024, 1025, 2100})
                                   : random.pick({0, 1, 2, 7, 8, 63, 64, 65, 130, 257})),
        batch_(random.pick({0, 1, 1, 2, 3})),
        label_last_(random.one_in(2)),
        shape_(label_last_ ? std::vector<int64_t>{batch_, anchors_, classes_}
                           : std::vector<int64_t>{batch_, classes_, anchors_}),
        per_anchor_{batch_, anchors_},
        strides_(strides_for(random, shape_, true, random.one_in(5))),
        dense_(strides_for(random, shape_, false, false)),
        matched_strides_(strides_for(random, per_anchor_, true, random.one_in(5))),
        score_strides_(strides_for(random, per_anchor_, true, random.one_in(5))),
        logits_(random, strides_.extent),
        gradient_(random, dense_.extent),
        matched_(random, matched_strides_.extent),
        score_(random, score_strides_.extent),
        labels_(random.pick({0, 1, 3, 9})),
        weight_(random.one_in(2) ? classes_ : 0) {
    logits_.fill(random, random.kind(), 8);
    score_.fill(random, 0, 0.5);
    for (int64_t i = 0; i < matched_.size(); ++i) matched_[i] = object();
    for (int64_t& label : labels_) {
      label = random.one_in(4) ? random.pick<int64_t>({-1, classes_, INT64_MAX, INT64_MIN})
                               : random.below(static_cast<int>(classes_));
    }
    for (double& weight : weight_) weight = random.pick({0.0, 0.5, 1.0, 3.0});
    describe();
    report.what += " class loss, " + std::to_string(anchors_) + " anchors, " +
                   std::to_string(classes_) + " classes, kind " +
                   std::to_string(static_cast<int>(loss_.kind));
  }

  void check() {
    const std::vector<Positive> positives = find_positives(loss_);
    loss_.positives = positives.data();
    loss_.positive_count = static_cast<int64_t>(positives.size());
    std::vector<double> sums(class_loss_parts(loss_));
    const int64_t parts = static_cast<int64_t>(sums.size());
    in_pieces(random_, parts, [&](int64_t begin, int64_t end) {
      sum_class_losses(loss_, begin, end, sums.data());
    });
    if (parts) {
      loss_.gradient = gradient_.get();
      in_pieces(random_, parts, [&](int64_t begin, int64_t end) {
        write_class_gradients(loss_, kScale, begin, end);
      });
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    compare(total);
  }

 private:
  static constexpr double kScale = 0.75;

  int32_t object() {
    const int count = static_cast<int>(labels_.size());
    if (count && random_.one_in(2)) return random_.below(count);
    return random_.pick<int32_t>({-1, INT32_MIN, INT32_MAX, count});
  }

  ClassStrides strides_of(const Strides& strides) const {
    return {strides.of[0], strides.of[label_last_ ? 1 : 2], strides.of[label_last_ ? 2 : 1]};
  }

  void describe() {
    loss_.storage = Stored<T>::kStorage;
    loss_.logits = logits_.get();
    loss_.batch = batch_;
    loss_.anchors = anchors_;
    loss_.classes = classes_;
    loss_.strides = strides_of(strides_);
    loss_.gradient_strides = strides_of(dense_);
    loss_.matched = {matched_.get(), false, matched_strides_.of[0], matched_strides_.of[1]};
    loss_.score = {Stored<T>::kStorage, score_.get(), score_strides_.of[0], score_strides_.of[1]};
    loss_.labels = labels_.data();
    loss_.objects = static_cast<int64_t>(labels_.size());
    loss_.class_weight = weight_.empty() ? nullptr : weight_.data();
    loss_.kind =
        random_.pick({ClassLossKind::kBce, ClassLossKind::kVarifocal, ClassLossKind::kQuality});
    loss_.alpha = random_.pick({0.75, 0.25, 0.0});
    loss_.gamma = random_.pick({2.0, 2.0, 1.0, 1.5, 3.0});
    loss_.detach_modulation = random_.one_in(3);
  }

  // A product in which 0 times infinity is 0.
  static double times(double a, double b) { return a == 0 && std::isinf(b) ? 0 : a * b; }

  struct Exact {
    double loss, gradient, size;  // of the largest term of the gradient
  };

  Exact exact(double z, bool positive, double y) const {
    const double e = std::exp(-std::fabs(z)), log = std::log1p(e);
    const double p = z > 0 ? 1 / (1 + e) : e / (1 + e), rest = z > 0 ? e / (1 + e) : 1 / (1 + e);
    const double up = (z > 0 ? z : z < 0 ? 0 : z) + log, down = (z < 0 ? -z : z > 0 ? 0 : z) + log;
    const double entropy = times(y, down) + times(1 - y, up), away = p - y;
    double factor = 1, slope = 0;
    if (loss_.kind == ClassLossKind::kVarifocal) {
      factor = positive ? y : loss_.alpha * std::pow(p, loss_.gamma);
      slope = positive ? 0 : factor * loss_.gamma * rest;
    } else if (loss_.kind == ClassLossKind::kQuality) {
      factor = std::pow(std::fabs(away), loss_.gamma);
      slope = loss_.gamma * std::pow(std::fabs(away), loss_.gamma - 1) * p * rest;
      if (away < 0) slope = -slope;
    }
    if (loss_.detach_modulation) slope = 0;
    const double first = factor * away, second = times(slope, entropy);
    return {times(factor, entropy), first + second, std::fabs(first) + std::fabs(second)};
  }

  static bool close(double actual, double expected, double bound) {
    if (std::isnan(expected)) return std::isnan(actual);
    if (std::isinf(expected)) return actual == expected;
    return std::fabs(actual - expected) <= bound;
  }

  void compare(double total) {
    long double expected = 0;
    double magnitude = 0;
    for (int64_t image = 0; image < batch_; ++image) {
      for (int64_t anchor = 0; anchor < anchors_; ++anchor) {
        const int32_t object =
            matched_[image * matched_strides_.of[0] + anchor * matched_strides_.of[1]];
        const bool exists = object >= 0 && object < loss_.objects;
        const double score =
            score_.value(image * score_strides_.of[0] + anchor * score_strides_.of[1]);
        for (int64_t label = 0; label < classes_; ++label) {
          const bool positive = exists && labels_[object] == label;
          const double weight = weight_.empty() ? 1 : weight_[label];
          const Exact one = exact(logits_.value(at(loss_.strides, image, anchor, label)), positive,
                                  positive ? score : 0);
          const double value = times(weight, one.loss);
          expected += value;
          magnitude += std::isfinite(value) ? std::fabs(value) : 0;
          compare_gradient(at(loss_.gradient_strides, image, anchor, label), weight, one);
        }
      }
    }
    if (magnitude > arithmetic.largest / 2) return;  // its parts may overflow
    const double bound = 200 * arithmetic.unit * magnitude + 1e4 * arithmetic.normal;
    const double sum = static_cast<double>(expected);
    report_.expect(close(total, sum, bound), "loss", 0, total, {sum, bound});
  }

  void compare_gradient(int64_t place, double weight, const Exact& one) {
    const double actual = gradient_.value(place), scale = kScale * weight;
    const double expected = scale * one.gradient, size = scale * one.size;
    const Format& stored = Stored<T>::kFormat;
    const double bound = 400 * arithmetic.unit * size + 8 * arithmetic.normal +
                         2 * stored.unit * std::fabs(expected) + stored.smallest;
    report_.expect(close(actual, expected, bound), "gradient", place, actual, {expected, bound});
  }

  static int64_t at(const ClassStrides& of, int64_t image, int64_t anchor, int64_t label) {
    return image * of.batch + anchor * of.anchor + label * of.label;
  }

  Random& random_;
  Report& report_;
  const int64_t classes_, anchors_, batch_;
  const bool label_last_;
  const std::vector<int64_t> shape_, per_anchor_;
  const Strides strides_, dense_, matched_strides_, score_strides_;
  Memory<T> logits_, gradient_;
  Integers matched_;
  Memory<T> score_;
  std::vector<int64_t> labels_;
  std::vector<double> weight_;
  ClassLoss loss_{};
};

}  // namespace fuzz
