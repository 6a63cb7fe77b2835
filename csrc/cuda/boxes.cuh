// One side of an anchor's box in one thread: its bins in registers or, for any number of them, in
// memory; loss, expected position and gradient.

#pragma once

#include "distribution.cuh"

namespace dflkern {

// Where the sides of an anchor lie: bins, neighbouring bins and neighbouring sides in elements.
// `granules`: each side is whole 16-byte granules from a multiple of 16 bytes on.
struct SideStrides {
  int bins;
  int64_t bin, side;
  bool granules;
};

// K bins in registers.
template <class T, int K>
struct SideRow : RegisterRow<Compute<T>, K> {
  __device__ __forceinline__ SideRow(const T* from, const SideStrides& at) {
    using G = Packed<T, 16>;
    if constexpr (K % G::kLanes == 0) {
      if (at.granules) {
#pragma unroll
        for (int g = 0; g < K / G::kLanes; ++g) {
          const G granule(__ldg(reinterpret_cast<const uint4*>(from) + g));
#pragma unroll
          for (int i = 0; i < G::kLanes; ++i) {
            this->bin[g * G::kLanes + i] = widen(granule.element[i]);
          }
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) this->bin[k] = widen(load(from + k * at.bin));
  }
};

// Any number of bins, read anew at each use.
template <class T>
struct SideRow<T, 0> {
  using F = Compute<T>;
  const T* from;
  int64_t stride;
  int bins;

  __device__ __forceinline__ SideRow(const T* from, const SideStrides& at)
      : from(from), stride(at.bin), bins(at.bins) {}
  __device__ __forceinline__ int size() const { return bins; }
  __device__ __forceinline__ F get(int k) const { return widen(load(from + k * stride)); }
  __device__ __forceinline__ void set(int, F) const {}
  __device__ __forceinline__ F exponential(int k, F largest) const {
    return Unit<F>::exp(shifted(get(k), largest));
  }
};

template <class F>
struct SideResult {
  F loss, expected;
};

template <class T, int K, bool kLoss>
__device__ __forceinline__ SideResult<Compute<T>> measure_side(const T* logits,
                                                               const SideStrides& at,
                                                               const Bins<Compute<T>>& bins,
                                                               Compute<T> target) {
  using F = Compute<T>;
  SideRow<T, K> row(logits, at);
  TwoBins<F> y{};
  if (kLoss) y = find_bins(target, bins);
  const int left = static_cast<int>(y.left);
  F left_shifted = 0, right_shifted = 0;
  const auto softmax = exponentiate<false>(row, bins.positions, true, [&](int k, F x) {
    if (kLoss && k == left) left_shifted = x;
    if (kLoss && k == left + 1) right_shifted = x;
  });
  SideResult<F> result{F(0), expected(softmax)};
  if (kLoss) result.loss = loss_of(softmax, y, left_shifted, right_shifted);
  return result;
}

// Writes the gradient of a side if it is active, else zeros, so that a warp stores as one.
template <class T, int K, bool kLoss>
__device__ __forceinline__ void write_side(const T* logits, const SideStrides& at, T* gradient,
                                           const SideStrides& to, const Bins<Compute<T>>& bins,
                                           bool active, Compute<T> target, Compute<T> by_loss,
                                           Compute<T> by_position) {
  using F = Compute<T>;
  using G = Packed<T, 16>;
  const auto bin_gradient = [&](F e, const Slope<F>& slope, const TwoBins<F>& y, int k, F number) {
    F taken = 0;
    if (kLoss) {
      const int left = static_cast<int>(y.left);
      if (k == left) taken = by_loss * y.left_weight;
      if (k == left + 1) taken = by_loss * y.right_weight;
    }
    return slope.gradient(e, position_of(k, number, bins.positions), taken);
  };
  if constexpr (K > 0) {
    F values[K] = {};
    if (active) {
      SideRow<T, K> row(logits, at);
      TwoBins<F> y{};
      if (kLoss) y = find_bins(target, bins);
      const auto softmax = exponentiate<true>(row, bins.positions, true, [](int, F) {});
      const auto slope = slope_of(softmax, by_loss, by_position, y.right_weight, true);
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = bin_gradient(row.bin[k], slope, y, k, F(k));
    }
    if constexpr (K % G::kLanes == 0) {
      if (to.granules) {
#pragma unroll
        for (int g = 0; g < K / G::kLanes; ++g) {
          G granule;
#pragma unroll
          for (int i = 0; i < G::kLanes; ++i) {
            granule.element[i] = narrow<T>(values[g * G::kLanes + i]);
          }
          // An intrinsic, as the compiler makes two stores of an assignment
          __stwb(reinterpret_cast<uint4*>(gradient) + g, granule.word);
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) gradient[k * to.bin] = narrow<T>(values[k]);
  } else {
    SideRow<T, 0> row(logits, at);
    TwoBins<F> y{};
    Softmax<F> softmax{F(0), F(1), F(0)};
    if (active) {
      if (kLoss) y = find_bins(target, bins);
      softmax = exponentiate<true>(row, bins.positions, true, [](int, F) {});
    }
    const auto slope = slope_of(softmax, by_loss, by_position, y.right_weight, true);
    for (int k = 0; k < at.bins; ++k) {
      F value = 0;
      if (active) {
        value = bin_gradient(row.exponential(k, softmax.largest), slope, y, k, F(k));
      }
      gradient[k * to.bin] = narrow<T>(value);
    }
  }
}

}  // namespace dflkern
