// Loss, expected position or both of random distributions, and their gradient.

#pragma once

#include "fuzz_head.h"

namespace fuzz {

template <class F>
F target_for(Random& random, const std::vector<F>& project, int bins, int kind) {
  const double low = project.empty() ? 0 : project[0];
  const double high = project.empty() ? bins - 1 : project.back();
  if (kind == 2) return project.empty() ? F(random.below(bins)) : project[random.below(bins)];
  if (kind == 1) return F(random.number(1, bins));
  return F(random.uniform(low - 1, high + 1));
}

template <class T>
class DistributionsCase {
  using F = Compute<T>;

 public:
  DistributionsCase(Random& random, Report& report)
      : random_(random),
        report_(report),
        bins_(random.pick(kBins)),
        mean_(random.one_in(4)),
        loss_(mean_ || random.one_in(2)),
        position_(!mean_ && (!loss_ || random.one_in(2))),
        margin_(random.pick({0.0, 0.01, 0.5})),
        step_(random.one_in(4) ? 0 : 1),
        sizes_(random_sizes()),
        count_(count_of(sizes_)),
        results_(mean_ ? count_ / kSides : count_),
        strides_(strides_for(random, with_bins(), true, random.one_in(4))),
        dense_(strides_for(random, with_bins(), false, false)),
        logits_(random, strides_.extent),
        gradient_(random, dense_.extent),
        project_(positions_for<F>(random, bins_)),
        positions_(random, project_.size()),
        target_(random, count_),
        losses_(random, results_),
        found_(random, count_),
        grad_loss_(random, step_ ? results_ : 1),
        grad_position_(random, step_ ? count_ : 1) {
    report.what += " distributions, bins " + std::to_string(bins_) + ", count " +
                   std::to_string(count_) + (loss_ ? ", loss" : "") +
                   (position_ ? ", position" : "") + (mean_ ? ", mean" : "");
    logits_.fill(random, random.kind(), 6);
    grad_loss_.fill(random, random.kind(), 2);
    grad_position_.fill(random, random.kind(), 2);
    const int kind = random.below(3);
    for (int64_t i = 0; i < count_; ++i) target_[i] = target_for(random, project_, bins_, kind);
    for (size_t k = 0; k < project_.size(); ++k) positions_[k] = project_[k];
  }

  void check() {
    if (count_ == 0) return;
    Call call = describe(), back = call;
    call.loss_out = loss_ ? losses_.get() : nullptr;
    call.position_out = position_ ? found_.get() : nullptr;
    run_all(random_, call);
    back.backward = true;
    back.gradient = gradient_.get();
    back.gradient_bin_stride = dense_.of.back();
    if (loss_) back.grad_loss = {grad_loss_.get(), step_, mean_};
    if (position_) back.grad_position = {grad_position_.get(), step_, false};
    run_all(random_, back);
    Number sum;
    for (int64_t i = 0; i < count_; ++i) compare(i, sum);
  }

 private:
  // Of the axes beside the bins; for a mean the last is that of the sides.
  std::vector<int64_t> random_sizes() {
    std::vector<int64_t> sizes;
    const int64_t room = std::max(2500 / bins_, 4) / (mean_ ? kSides : 1);
    for (int axes = random_.below(4); axes > 0; --axes) {
      const int64_t size = random_.pick({0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 65});
      if (count_of(sizes) * std::max<int64_t>(size, 1) <= room) sizes.push_back(size);
    }
    if (mean_) sizes.push_back(kSides);
    return sizes;
  }
  std::vector<int64_t> with_bins() const {
    std::vector<int64_t> sizes = sizes_;
    sizes.push_back(bins_);
    return sizes;
  }

  // All that forward and backward have in common.
  Call describe() {
    Call call{};
    call.storage = Stored<T>::kStorage;
    call.loss = loss_;
    call.position = position_;
    call.logits = logits_.get();
    call.project = project_.empty() ? nullptr : positions_.get();
    call.margin = margin_;
    call.mean = mean_;
    call.bins = bins_;
    call.bin_stride = strides_.of.back();
    call.axes = static_cast<int>(sizes_.size());
    int64_t output = 1;
    for (int a = call.axes - 1; a >= 0; --a) {
      call.axis[a] = {sizes_[a], strides_.of[a], output, dense_.of[a]};
      output *= sizes_[a];
    }
    if (loss_) call.target = {target_.get(), 1, false};
    return call;
  }

  // Results and gradient of distribution i; sum is that of the losses of its sides so far.
  void compare(int64_t i, Number& sum) {
    const int64_t at = place(strides_, sizes_, i), to = place(dense_, sizes_, i);
    std::vector<double> z;
    for (int k = 0; k < bins_; ++k) z.push_back(logits_.value(at + k * strides_.of.back()));
    const F* project = project_.empty() ? nullptr : project_.data();
    const Distribution of(z, project);
    const Bins y = bins_of(target_[i], project, bins_, margin_);
    Number by_loss, by_position;
    if (loss_) {
      sum = mean_ && i % kSides ? sum + of.loss(y) : of.loss(y);
      by_loss = double(grad_loss_[step_ * (mean_ ? i / kSides : i)]);
      if (mean_) by_loss = by_loss / double(kSides);
      if (!mean_) expect("loss", i, losses_[i], sum);
      if (mean_ && i % kSides == kSides - 1) {
        expect("mean", i, losses_[i / kSides], sum / double(kSides));
      }
    }
    if (position_) {
      by_position = double(grad_position_[step_ * i]);
      expect("position", i, found_[i], of.expected);
    }
    for (int k = 0; k < bins_; ++k) {
      const Number g =
          of.gradient(loss_ ? &by_loss : nullptr, y, position_ ? &by_position : nullptr, k);
      const double actual = gradient_.value(to + k * dense_.of.back());
      report_.expect(accepts(g, actual, Stored<T>::kFormat), "gradient", i * bins_ + k, actual, g);
    }
  }

  void expect(const char* name, int64_t at, double actual, Number expected) {
    report_.expect(accepts(expected, actual, Stored<F>::kFormat), name, at, actual, expected);
  }

  Random& random_;
  Report& report_;
  const int bins_;
  const bool mean_, loss_, position_;
  const double margin_;
  const int step_;  // 0: one upstream gradient for all
  const std::vector<int64_t> sizes_;
  const int64_t count_, results_;
  const Strides strides_, dense_;
  Memory<T> logits_, gradient_;
  const std::vector<F> project_;
  Memory<F> positions_, target_, losses_, found_, grad_loss_, grad_position_;
};

}  // namespace fuzz
