// Forward and backward over a block of neighbouring distributions, one per lane.

#pragma once

#include "exps.h"

namespace dflkern {

constexpr int kMaxBins = 256;
// Lanes computed together, two vectors of float; a block's lanes are padded to a multiple.
constexpr int kStep = kVectorBytes / 2;
constexpr int kMaxLanes = 64;

// Lanes between what is computed and what is fetched from memory. Each bin is a stream of its own,
// and hardware follows fewer streams than there are bins. What is fetched too early has left the
// L1 cache again; narrower vectors take longer for the same lanes.
constexpr int kAhead = kVectorBytes == 64 ? 256 : 96;
constexpr int kCacheLine = 64;

// Finding where a page lies may take longer than reading a line, and holds up all that is read from
// that page; so rows ask for one line of it so many bytes ahead.
constexpr int kPage = 1 << 12, kPageAhead = 1 << 15;

// Bin k of lane i lies at logits[k * logits_stride + i]; everything else has a value per lane.
template <class F>
struct Block {
  int lanes;
  const F* logits;
  int64_t logits_stride;
  const F* max;  // of each distribution, or null if not known yet
  F* gradient;   // may be the logits
  int64_t gradient_stride;
  const F* target;
  const F* grad_loss;
  const F* grad_position;
  F* loss;
  F* position;
};

template <class F>
using BlockFunction = void (*)(const Block<F>&, const Bins<F>&, const F* positions);

// What a step's vectors have in common: U of them make kStep lanes.
template <class F>
struct Step {
  using V = Vec<F>;
  static constexpr int kWidth = sizeof(V) / sizeof(F);
  static constexpr int U = kStep / kWidth;
};

template <class F>
DFL_INLINE void fetch_ahead(const F* step) {
  const char* line = reinterpret_cast<const char*>(step + kAhead);
  for (size_t i = 0; i < kStep * sizeof(F); i += kCacheLine) __builtin_prefetch(line + i);
}

// Unrolled loops over bins leave no registers for the constants of exp, whose loads then take
// longer than the arithmetic; hence loops over bins stay loops, even where their count is known.
#define DFL_LOOP _Pragma("GCC unroll 1")
#if defined(__AVX512F__)  // twice as many registers
#define DFL_EXP_LOOP _Pragma("GCC unroll 2")
#else
#define DFL_EXP_LOOP DFL_LOOP
#endif

template <class F>
DFL_INLINE void find_max(const Block<F>& block, int lane, int bins, Vec<F> (&max)[Step<F>::U]) {
  using S = Step<F>;
  const F* from = (block.max ? block.max : block.logits) + lane;
  DFL_UNROLL for (int u = 0; u < S::U; ++u) max[u] = load<Vec<F>>(from + u * S::kWidth);
  if (block.max) return;
  _Pragma("GCC unroll 4") for (int k = 1; k < bins; ++k) {
    from += block.logits_stride;
    DFL_UNROLL for (int u = 0; u < S::U; ++u) {
      max[u] = larger(max[u], load<Vec<F>>(from + u * S::kWidth));
    }
  }
}

// Writes the two bins of kStep targets, and the logits of those bins.
template <class F>
struct Picked {
  F left_weight[kStep], right_weight[kStep], left_logit[kStep], right_logit[kStep];
};

template <class F>
DFL_INLINE void pick(const F* logits, int64_t stride, const F* target, const Bins<F>& bins,
                     Picked<F>& picked) {
  using S = Step<F>;
  alignas(64) Integer<F> left[kStep];
  DFL_UNROLL for (int u = 0; u < S::U; ++u) {
    const auto y = two_bins(load<Vec<F>>(target + u * S::kWidth), bins);
    const Integer<Vec<F>> index = Lanes<Vec<F>>::truncated(y.left);
    std::memcpy(left + u * S::kWidth, &index, sizeof(index));
    store(picked.left_weight + u * S::kWidth, y.left_weight);
    store(picked.right_weight + u * S::kWidth, y.right_weight);
  }
  DFL_LOOP for (int i = 0; i < kStep; ++i) {
    const F* at = logits + left[i] * stride + i;
    picked.left_logit[i] = at[0];
    picked.right_logit[i] = at[stride];
  }
}

// Sums over bins of e = exp(z - max) and of e W.
template <class F>
struct Sums {
  Vec<F> mass[Step<F>::U] = {}, moment[Step<F>::U] = {};
};

// The sums over all bins, in chunks, which rounds less than one long sum. The exponentials are also
// kept if kKeep.
template <class F, bool kPosition, bool kKeep>
DFL_INLINE Sums<F> sum_exps(const F* logits, int64_t stride, int bins, const F* positions,
                            const Vec<F> (&max)[Step<F>::U], F (*exps)[kStep]) {
  using S = Step<F>;
  using V = Vec<F>;
  constexpr int kChunk = 16;
  const Exps<V> exp;
  Sums<F> total;
  for (int begin = 0; begin < bins; begin += kChunk) {
    Sums<F> chunk;
    const int end = bins - begin < kChunk ? bins : begin + kChunk;
    DFL_EXP_LOOP for (int k = begin; k < end; ++k, logits += stride) {
      V e[S::U];
      DFL_UNROLL for (int u = 0; u < S::U; ++u) e[u] = load<V>(logits + u * S::kWidth) - max[u];
      exp(e);
      DFL_UNROLL for (int u = 0; u < S::U; ++u) {
        if constexpr (kKeep) store(&exps[k][u * S::kWidth], e[u]);
        chunk.mass[u] += e[u];
        if (kPosition) chunk.moment[u] = fma(e[u], splat<V>(positions[k]), chunk.moment[u]);
      }
      fetch_ahead(logits);
    }
    DFL_UNROLL for (int u = 0; u < S::U; ++u) {
      total.mass[u] += chunk.mass[u];
      if (kPosition) total.moment[u] += chunk.moment[u];
    }
  }
  return total;
}

template <class F, int kBins, bool kLoss, bool kPosition>
void forward(const Block<F>& block, const Bins<F>& bins, const F* positions) {
  using S = Step<F>;
  using V = Vec<F>;
  const int count = kBins ? kBins : bins.count;
  for (int lane = 0; lane < block.lanes; lane += kStep) {
    const F* logits = block.logits + lane;
    V max[S::U];
    find_max(block, lane, count, max);
    Picked<F> picked;
    if (kLoss) pick(logits, block.logits_stride, block.target + lane, bins, picked);
    const Sums<F> sums =
        sum_exps<F, kPosition, false>(logits, block.logits_stride, count, positions, max, nullptr);
    DFL_UNROLL for (int u = 0; u < S::U; ++u) {
      const int i = u * S::kWidth;
      if (kPosition) store(block.position + lane + i, sums.moment[u] / sums.mass[u]);
      if (kLoss) {
        const TwoBins<V> y{V{}, load<V>(picked.left_weight + i), load<V>(picked.right_weight + i)};
        store(block.loss + lane + i,
              loss_of(sums.mass[u], y, load<V>(picked.left_logit + i) - max[u],
                      load<V>(picked.right_logit + i) - max[u]));
      }
    }
  }
}

template <class F, int kBins, bool kLoss, bool kPosition>
void backward(const Block<F>& block, const Bins<F>& bins, const F* positions) {
  using S = Step<F>;
  using V = Vec<F>;
  const int count = kBins ? kBins : bins.count;
  alignas(64) F exps[kBins ? kBins : kMaxBins][kStep];
  for (int lane = 0; lane < block.lanes; lane += kStep) {
    V max[S::U];
    find_max(block, lane, count, max);
    const Sums<F> sums = sum_exps<F, kPosition, true>(block.logits + lane, block.logits_stride,
                                                      count, positions, max, exps);
    DFL_UNROLL for (int u = 0; u < S::U; ++u) {
      const int i = lane + u * S::kWidth;
      V inverse = 1 / sums.mass[u];
      TwoBins<V> y;
      V grad_loss, grad_position;
      if (kLoss) {
        y = two_bins(load<V>(block.target + i), bins);
        inverse += y.right_weight * 0;  // a NaN target makes the whole row NaN
        grad_loss = load<V>(block.grad_loss + i);
      }
      if (kPosition) grad_position = load<V>(block.grad_position + i);
      const V expected = sums.moment[u] * inverse;
      V k_as_number = {}, right = {};
      F* to = block.gradient + i;
      _Pragma("GCC unroll 2") for (int k = 0; k < count; ++k) {
        const V p = load<V>(&exps[k][u * S::kWidth]) * inverse;
        V gradient;
        if (kLoss) {
          const auto is_left = y.left == k_as_number;
          const V weight = is_left ? y.left_weight : right;
          right = is_left ? y.right_weight : V{};
          gradient = grad_loss * (p - weight);
          k_as_number += 1;
        }
        if (kPosition) {
          const V scaled = grad_position * p, distance = positions[k] - expected;
          gradient = kLoss ? fma(scaled, distance, gradient) : scaled * distance;
        }
        store(to, gradient);
        __builtin_prefetch(to + kAhead, 1);
        to += block.gradient_stride;
      }
    }
  }
}

}  // namespace dflkern
