// The forward pass of the classification loss.

#include "class_parts.h"

namespace dflkern {
namespace {

// Sums of the losses of logits with target 0, lane by lane. In place of log(1 + e) of each, with
// e = exp(-|z|), the logarithm of a product of (1 + e) is taken; q is that product minus 1, which
// keeps the digits of small e.
template <class F, bool kModulated>
class Sums {
  using V = Vec<F>;
  static constexpr int kLanes = sizeof(V) / sizeof(F);

 public:
  explicit Sums(F gamma) : gamma_(gamma) {}

  DFL_INLINE void add(const V (&z)[kUnroll]) {
    V e[kUnroll];
    DFL_UNROLL for (int i = 0; i < kUnroll; ++i) e[i] = minus_magnitude(z[i]);
    exps_(e);
    if constexpr (!kModulated) {
      sum_ += (rectified(z[0]) + rectified(z[1])) + (rectified(z[2]) + rectified(z[3]));
      product_ = both(product_, both(both(e[0], e[1]), both(e[2], e[3])));
    } else {
      V loss[kUnroll];
      DFL_UNROLL for (int i = 0; i < kUnroll; ++i) {
        const Sigmoid<V> s = sigmoid_of(z[i], e[i]);
        loss[i] = power_of(z[i], s, gamma_) * s.softplus;
      }
      sum_ += (loss[0] + loss[1]) + (loss[2] + loss[3]);
    }
    ++steps_;
  }

  bool full() const { return steps_ == kStepsPerLogarithm; }

  // The sum of all lanes, each times its weight; starts anew.
  DFL_INLINE double take(const double* weights, int step) {
    const V sum = kModulated ? sum_ : sum_ + log1p_of_product(product_);
    alignas(kVectorBytes) F lanes[kLanes];
    store(lanes, sum);
    double total = 0;
    for (int i = 0; i < kLanes; ++i) {
      total += weights ? product(weights[i * step], lanes[i]) : double(lanes[i]);
    }
    sum_ = product_ = V{};
    steps_ = 0;
    return total;
  }

 private:
  // (1 + a) (1 + b) - 1
  static DFL_INLINE V both(V a, V b) { return fma(a, b, a + b); }

  const Exps<V> exps_{};
  const F gamma_;
  V sum_{}, product_{};
  int steps_ = 0;
};

template <class T, bool kModulated>
class Forward {
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int kStep = kUnroll * kWidth<T>;

 public:
  explicit Forward(const ClassLoss& loss)
      : loss_(loss), layout_(layout_of(loss)), sums_(static_cast<F>(loss.gamma)) {
    std::fill(std::begin(buffer_), std::end(buffer_), minus_infinity<T>());
    std::fill(weights_, weights_ + kWidth<T>, 0);
  }

  double sum(int64_t index) {
    const ClassPart part = part_of(loss_, index);
    logits_ = static_cast<const T*>(loss_.logits) + part.image * loss_.strides.batch +
              part.anchor * loss_.strides.anchor;
    first_ = part.image * loss_.anchors + part.anchor;
    double negatives = layout_ == ClassLayout::kRows ? sum_rows(part) : sum_columns(part);
    double total = product(negative_factor(loss_), negatives);
    for (const Positive* p = part.positives; p != part.positives_end; ++p) {
      const double z = widened(*place(p->anchor - first_, p->label));
      total += product(weight_of(loss_, p->label), loss_of(loss_, *p, z).loss);
    }
    return total;
  }

 private:
  const T* place(int64_t anchor, int64_t label) const {
    return logits_ + anchor * loss_.strides.anchor + label * loss_.strides.label;
  }

  double sum_columns(const ClassPart& part) {
    by_label_.assign(part.positives, part.positives_end);
    std::stable_sort(by_label_.begin(), by_label_.end(),
                     [](const Positive& a, const Positive& b) { return a.label < b.label; });
    const Positive* positive = by_label_.data();
    const Positive* end = positive + by_label_.size();
    double total = 0;
    for (int64_t label = 0; label < loss_.classes; ++label) {
      const T* line = place(0, label);
      if (layout_ == ClassLayout::kStrided || (positive != end && positive->label == label)) {
        line = copied(line, part.anchors, loss_.strides.anchor);
        for (; positive != end && positive->label == label; ++positive) {
          buffer_[positive->anchor - first_] = minus_infinity<T>();
        }
      }
      const double* weight = loss_.class_weight ? loss_.class_weight + label : nullptr;
      total += sum_line(line, part.anchors, weight);
      if (weight) total += sums_.take(weight, 0);
    }
    return loss_.class_weight ? total : total + sums_.take(nullptr, 0);
  }

  const T* copied(const T* line, int count, int64_t stride) {
    for (int i = 0; i < count; ++i) buffer_[i] = line[i * stride];
    return buffer_;
  }

  // What was taken from the sums; the rest is still in there.
  double sum_line(const T* line, int count, const double* weight) {
    double total = 0;
    int i = 0;
    for (; i + kStep <= count; i += kStep) {
      V z[kUnroll];
      DFL_UNROLL for (int v = 0; v < kUnroll; ++v) z[v] = load_vector(line + i + v * kWidth<T>);
      sums_.add(z);
      if (sums_.full()) total += sums_.take(weight, 0);
    }
    if (i < count) {
      T rest[kStep];
      std::fill(std::copy(line + i, line + count, rest), rest + kStep, minus_infinity<T>());
      V z[kUnroll];
      DFL_UNROLL for (int v = 0; v < kUnroll; ++v) z[v] = load_vector(rest + v * kWidth<T>);
      sums_.add(z);
      if (sums_.full()) total += sums_.take(weight, 0);
    }
    return total;
  }

  double sum_rows(const ClassPart& part) {
    double total = 0;
    const Positive* positive = part.positives;
    for (int begin = 0; begin < part.anchors; begin += kRowAnchors) {
      const int count = std::min(kRowAnchors, part.anchors - begin);
      const Positive* end = positive;
      while (end != part.positives_end && end->anchor < first_ + begin + count) ++end;
      for (int64_t label = 0; label < loss_.classes; label += kWidth<T>) {
        total += sum_block(begin, count, label, positive, end);
      }
      positive = end;
    }
    return total;
  }

  // Of neighbouring classes, as many as a vector holds, of the anchors from `begin` on.
  double sum_block(int begin, int count, int64_t label, const Positive* positive,
                   const Positive* end) {
    const int lanes = static_cast<int>(std::min<int64_t>(kWidth<T>, loss_.classes - label));
    const T* rows[kRowAnchors];
    for (int i = 0; i < count; ++i) {
      rows[i] = place(begin + i, label);
      if (lanes < kWidth<T>) rows[i] = row_copied(rows[i], i, lanes);
    }
    for (; positive != end; ++positive) {
      if (positive->label < label || positive->label >= label + lanes) continue;
      const int i = static_cast<int>(positive->anchor - first_) - begin;
      rows[i] = row_copied(rows[i], i, lanes);
      buffer_[i * kWidth<T> + positive->label - label] = minus_infinity<T>();
    }
    for (int i = count; i % kUnroll; ++i) rows[i] = nothing();
    for (int i = 0; i < count; i += kUnroll) {
      V z[kUnroll];
      DFL_UNROLL for (int v = 0; v < kUnroll; ++v) z[v] = load_vector(rows[i + v]);
      sums_.add(z);
    }
    if (!loss_.class_weight) return sums_.take(nullptr, 0);
    std::fill(std::copy_n(loss_.class_weight + label, lanes, weights_), weights_ + kWidth<T>, 0);
    return sums_.take(weights_, 1);
  }

  const T* row_copied(const T* row, int i, int lanes) {
    T* to = buffer_ + i * kWidth<T>;
    std::fill(std::copy_n(row, lanes, to), to + kWidth<T>, minus_infinity<T>());
    return to;
  }
  const T* nothing() const { return buffer_ + kRowAnchors * kWidth<T>; }  // never written to

  const ClassLoss& loss_;
  const ClassLayout layout_;
  Sums<F, kModulated> sums_;
  const T* logits_ = nullptr;
  int64_t first_ = 0;
  std::vector<Positive> by_label_;
  double weights_[kWidth<T>];
  alignas(kVectorBytes) T buffer_[kColumnAnchors + 2 * kVectorBytes];
};

}  // namespace

void sum_class_losses(const ClassLoss& loss, int64_t begin, int64_t end, double* sums) {
  with_storage(loss.storage, [&](auto type) {
    with_modulation(loss, [&](auto modulated) {
      Forward<decltype(type), modulated()> forward(loss);
      for (int64_t part = begin; part < end; ++part) sums[part] = forward.sum(part);
    });
  });
}

}  // namespace dflkern
