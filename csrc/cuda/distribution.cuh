// One distribution in one thread: exponentials, sums, loss and gradient.
//
// Every multiply-add is written as fma and the compiler may fuse no other (-fmad=false), and bins
// are added in their order: all kernels give a distribution the same bits.

#pragma once

#include "elements.cuh"

namespace dflkern {

// exp and log in the unit that is cheapest: powers of two for float, for which there are
// instructions, and natural ones for double.
template <class F>
struct Unit;

template <>
struct Unit<float> {
  static __device__ __forceinline__ float from_natural(float x) {
    return x * Constants<float>::kLog2e;
  }
  static __device__ __forceinline__ float to_natural(float x) { return x * Constants<float>::kLn2; }
  static __device__ __forceinline__ float exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float log(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};

template <>
struct Unit<double> {
  static __device__ __forceinline__ double from_natural(double x) { return x; }
  static __device__ __forceinline__ double to_natural(double x) { return x; }
  static __device__ __forceinline__ double exp(double x) { return exp_nonpositive(x); }
  static __device__ __forceinline__ double log(double x) { return log_at_least_one(x); }
  static __device__ __forceinline__ double reciprocal(double x) { return __drcp_rn(x); }
};

// What a kernel computes. kAsked leaves it to the launch: what has a pointer.
enum class What { loss = 1, decode = 2, both = 3, asked };

template <What what>
__device__ __forceinline__ bool wants_loss(const void* target) {
  return what == What::asked ? target != nullptr : what != What::decode;
}
template <What what>
__device__ __forceinline__ bool wants_position(const void* position) {
  return what == What::asked ? position != nullptr : what != What::loss;
}
template <What what, class F>
__device__ __forceinline__ const F* known(const F* project) {
  if (what != What::asked) return nullptr;
  __builtin_assume(project != nullptr);
  return project;
}

// The bins of a problem. `bound` is the highest target, or with positions the margin below W_{K-1}.
template <class F>
__device__ __forceinline__ Bins<F> bins_of(int count, const F* positions, F bound) {
  if (positions != nullptr) return make_bins(count, positions, bound);
  return {count, nullptr, F(0), bound};
}

// two_bins, where positions are searched by halves instead of one after the other.
template <class F>
__device__ __forceinline__ TwoBins<F> find_bins(F target, const Bins<F>& bins) {
  if (bins.positions == nullptr) return two_bins(target, bins);
  target = target < bins.lowest ? bins.lowest : target;
  target = target > bins.highest ? bins.highest : target;
  int left = 0;
#pragma unroll
  for (int step = kMaxBins / 2; step > 0; step /= 2) {
    const int next = left + step;
    if (next < bins.count - 1 && target >= __ldg(bins.positions + next)) left = next;
  }
  const F lower = __ldg(bins.positions + left), upper = __ldg(bins.positions + left + 1);
  const F right_weight = (target - lower) / (upper - lower);
  return {F(left), 1 - right_weight, right_weight};
}

template <class F>
__device__ __forceinline__ F position_of(int bin, F number, const F* positions) {
  return positions == nullptr ? number : __ldg(positions + bin);
}

// z - m, in the unit of exp.
template <class F>
__device__ __forceinline__ F shifted(F logit, F largest) {
  return Unit<F>::from_natural(logit - largest);
}

template <class F>
struct Softmax {
  F largest, sum, moment;  // m, sum e and sum e W with e = exp(z - m)
};

// A distribution in registers; one in shared memory is in general.cu.
template <class F, int K>
struct RegisterRow {
  F bin[K];
  static __device__ __forceinline__ constexpr int size() { return K; }
  __device__ __forceinline__ F get(int k) const { return bin[k]; }
  __device__ __forceinline__ void set(int k, F value) { bin[k] = value; }
};

// The sums over a row, whose logits become e if kKeep. `see(k, z - m)` is told of every bin.
template <bool kKeep, class Row, class F, class See>
__device__ __forceinline__ Softmax<F> exponentiate(Row& row, const F* positions, bool position,
                                                   See see) {
  Softmax<F> result{row.get(0), F(0), F(0)};
#pragma unroll
  for (int k = 1; k < row.size(); ++k) result.largest = fmax(result.largest, row.get(k));
  F number = 0;
#pragma unroll
  for (int k = 0; k < row.size(); ++k, number += 1) {
    const F x = shifted(row.get(k), result.largest);
    const F e = Unit<F>::exp(x);
    see(k, x);
    if (kKeep) row.set(k, e);
    result.sum += e;
    if (position) result.moment = fma(e, position_of(k, number, positions), result.moment);
  }
  return result;
}

template <class F>
__device__ __forceinline__ F expected(const Softmax<F>& softmax) {
  return softmax.moment * Unit<F>::reciprocal(softmax.sum);
}

// The loss, from z - m of the two bins in the unit of exp.
template <class F>
__device__ __forceinline__ F loss_of(const Softmax<F>& softmax, const TwoBins<F>& y, F left,
                                     F right) {
  return Unit<F>::to_natural(Unit<F>::log(softmax.sum) -
                             (weighted(y.left_weight, left) + weighted(y.right_weight, right)));
}

// The gradient of a bin is e (a (W - E) + b) - `taken`, which is grad_loss y. W - E is left to be
// subtracted bin by bin: folding a E into b would cancel more digits.
template <class F>
struct Slope {
  F a, b, expected;
  bool position;

  __device__ __forceinline__ F gradient(F e, F number, F taken) const {
    return fma(e, position ? fma(a, number - expected, b) : b, -taken);
  }
};

// `right_weight` carries the NaN of a target into every bin; it is 0 without a loss.
template <class F>
__device__ __forceinline__ Slope<F> slope_of(const Softmax<F>& softmax, F grad_loss,
                                             F grad_position, F right_weight, bool position) {
  const F r = Unit<F>::reciprocal(softmax.sum);
  return {grad_position * r, fma(grad_loss, r, right_weight * 0), softmax.moment * r, position};
}

}  // namespace dflkern
