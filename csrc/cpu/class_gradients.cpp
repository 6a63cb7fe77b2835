// The backward pass of the classification loss.

#include "class_parts.h"

namespace dflkern {
namespace {

template <class T, bool kModulated>
class Backward {
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int kStep = kUnroll * kWidth<T>;
  // A gradient larger than this leaves the caches before it is read.
  static constexpr int64_t kCached = 1 << 22, kBytes = sizeof(T);

 public:
  Backward(const ClassLoss& loss, double scale)
      : loss_(loss),
        layout_(layout_of(loss)),
        scale_(scale),
        gamma_(static_cast<F>(loss.gamma)),
        slope_(loss.detach_modulation ? F(0) : gamma_),
        streams_(kStreams<T> && loss.batch * loss.anchors * loss.classes > kCached / kBytes) {
    const double negatives = scale * negative_factor(loss);
    for (int64_t label = 0; label < loss.classes; ++label) {
      scales_.push_back(static_cast<F>(negatives * weight_of(loss, label)));
    }
  }

  void write(int64_t index) {
    const ClassPart part = part_of(loss_, index);
    const ClassStrides &from = loss_.strides, &to = loss_.gradient_strides;
    logits_ =
        static_cast<const T*>(loss_.logits) + part.image * from.batch + part.anchor * from.anchor;
    gradient_ = static_cast<T*>(loss_.gradient) + part.image * to.batch + part.anchor * to.anchor;
    if (layout_ == ClassLayout::kRows) {
      write_rows(part);
    } else {
      for (int64_t label = 0; label < loss_.classes; ++label) {
        write_line(logits_ + label * from.label, from.anchor, gradient_ + label * to.label,
                   to.anchor, part.anchors, scales_.data() + label, false);
      }
    }
    const int64_t first = part.image * loss_.anchors + part.anchor;
    for (const Positive* p = part.positives; p != part.positives_end; ++p) {
      const int64_t anchor = p->anchor - first;
      const double z = widened(logits_[anchor * from.anchor + p->label * from.label]);
      const double gradient = weight_of(loss_, p->label) * loss_of(loss_, *p, z).gradient;
      narrow(static_cast<F>(scale_ * gradient),
             gradient_[anchor * to.anchor + p->label * to.label]);
    }
  }

 private:
  void write_rows(const ClassPart& part) {
    const ClassStrides &from = loss_.strides, &to = loss_.gradient_strides;
    const bool dense = from.anchor == loss_.classes && to.anchor == loss_.classes && to.label == 1;
    if (dense && !loss_.class_weight) {
      write_line(logits_, 1, gradient_, 1, part.anchors * loss_.classes, scales_.data(), false);
      return;
    }
    for (int a = 0; a < part.anchors; ++a) {
      write_line(logits_ + a * from.anchor, 1, gradient_ + a * to.anchor, to.label, loss_.classes,
                 scales_.data(), true);
    }
  }

  // The gradients of `count` logits, each with its own scale if `scaled`.
  void write_line(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count,
                  const F* scales, bool scaled) {
    const auto rest = [&](int64_t begin, int64_t end) {
      write_rest(from + begin * from_stride, from_stride, to + begin * to_stride, to_stride,
                 end - begin, scales + (scaled ? begin : 0), scaled);
    };
    int64_t i = 0;
    if (from_stride == 1 && to_stride == 1) {
      alignas(kVectorBytes) F same[kWidth<T>];
      std::fill(same, same + kWidth<T>, scales[0]);
      const F* first = scaled ? scales : same;
      if (streams_) {
        i = std::min(before_aligned(to), count);
        rest(0, i);
        i += write_steps<kStreams<T>>(from + i, to + i, count - i, scaled ? first + i : first,
                                      scaled);
      } else {
        i = write_steps<false>(from, to, count, first, scaled);
      }
    }
    for (; i < count; i += kStep) rest(i, std::min(i + kStep, count));
  }

  // Elements in front of the first that is aligned for a vector.
  static int64_t before_aligned(const T* to) {
    const auto over = reinterpret_cast<uintptr_t>(to) % kVectorBytes;
    return over ? static_cast<int64_t>((kVectorBytes - over) / sizeof(T)) : 0;
  }

  // Returns how many of the logits it took.
  template <bool kStream>
  int64_t write_steps(const T* from, T* to, int64_t count, const F* scales, bool scaled) const {
    const int between = scaled ? kWidth<T> : 0;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      step<kStream>(from + i, to + i, scaled ? scales + i : scales, between);
    }
    return i;
  }

  // Of fewer logits than a step has.
  void write_rest(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count,
                  const F* scales, bool scaled) const {
    T in[kStep], out[kStep];
    F each[kStep];
    for (int k = 0; k < kStep; ++k) {
      in[k] = k < count ? from[k * from_stride] : minus_infinity<T>();
      each[k] = k < count ? scales[scaled ? k : 0] : F(0);
    }
    step<false>(in, out, each, kWidth<T>);
    for (int k = 0; k < count; ++k) to[k * to_stride] = out[k];
  }

  template <bool kStream>
  DFL_INLINE void step(const T* from, T* to, const F* scales, int between) const {
    V z[kUnroll], e[kUnroll];
    DFL_UNROLL for (int v = 0; v < kUnroll; ++v) z[v] = load_vector(from + v * kWidth<T>);
    DFL_UNROLL for (int v = 0; v < kUnroll; ++v) e[v] = minus_magnitude(z[v]);
    exps_(e);
    DFL_UNROLL for (int v = 0; v < kUnroll; ++v) {
      const V gradient = gradient_of(z[v], e[v]) * load<V>(scales + v * between);
      if constexpr (kStream) {
        stream_vector(to + v * kWidth<T>, gradient);
      } else {
        store_vector(to + v * kWidth<T>, gradient);
      }
    }
  }

  DFL_INLINE V gradient_of(V z, V e) const {
    if constexpr (!kModulated) {
      const V half = reciprocal(1 + e);
      return z > V{} ? half : e * half;
    } else {
      const Sigmoid<V> s = sigmoid_of(z, e);
      const V slope = s.rest == 0 ? V{} : slope_ * s.rest * s.softplus;
      return power_of(z, s, gamma_) * (s.p + slope);
    }
  }

  const ClassLoss& loss_;
  const ClassLayout layout_;
  const double scale_;
  const F gamma_, slope_;  // of the modulation; 0 for a constant one
  const bool streams_;
  const Exps<V> exps_{};
  std::vector<F> scales_;
  const T* logits_ = nullptr;
  T* gradient_ = nullptr;
};

}  // namespace

void write_class_gradients(const ClassLoss& loss, double scale, int64_t begin, int64_t end) {
  with_storage(loss.storage, [&](auto type) {
    with_modulation(loss, [&](auto modulated) {
      Backward<decltype(type), modulated()> backward(loss, scale);
      for (int64_t part = begin; part < end; ++part) backward.write(part);
      end_streams();
    });
  });
}

}  // namespace dflkern
