// Forward and backward over distributions that lie in memory as rows, each a few whole vectors:
// nothing is transposed, and only sums and maxima cross lanes.

#pragma once

#include <algorithm>

#include "block.h"
#include "columns.h"
#include "row_vectors.h"

namespace dflkern {

// Elements between what is computed and what is fetched from memory.
constexpr int kAheadInRow = kVectorBytes == 64 ? 2048 : 1024;

// Row i begins at logits + offsets[i]; `lanes`, a multiple of kRows, can be read, and the gradients
// of `count` are written. Everything else has a value per row. What is fetched meanwhile begins
// `ahead` elements after row i of `next` and `gradient_next`.
template <class T>
struct Rows {
  int lanes, count;
  const T* logits;
  const int64_t* offsets;
  T* gradient;
  const int64_t* gradient_offsets;
  const int64_t *next, *gradient_next;
  int64_t ahead;
  const float* target;
  const float* grad_loss;
  const float* grad_position;
  float* loss;
  float* position;
};

template <class T>
using RowsFunction = void (*)(const Rows<T>&, const Bins<float>&, const float* positions);

struct Call;

// The function that serves a call, or null if its logits are no such rows.
template <class T>
RowsFunction<T> rows_function(const Call& call);

#if defined(__AVX2__) && defined(__F16C__)

// Rows whose exponentials are computed before these are added up, and how the loop is unrolled.
#if defined(__AVX512F__)
constexpr int kExpRows = kRows;
#define DFL_ROW_LOOP _Pragma("GCC unroll 8")
#else
constexpr int kExpRows = kMaxLanes;
#define DFL_ROW_LOOP DFL_LOOP
#endif

// The maxima of a block's rows. This, the exponentials and what follows them are loops of their
// own, since one step of all of it is longer than what a processor looks ahead.
template <int R, class T>
DFL_INLINE void find_row_maxima(const Rows<T>& it, float* max) {
  if (it.ahead) {
    __builtin_prefetch(reinterpret_cast<const char*>(it.logits + it.offsets[0]) + kPageAhead);
  }
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    Vectors<R> z;
    DFL_UNROLL for (int i = 0; i < kRows; ++i) {
      const T* row = it.logits + it.offsets[lane + i];
      DFL_UNROLL for (int r = 0; r < R; ++r) z[i][r] = load_vector(row + r * kRows);
    }
    store(max + lane, over_rows<R>(z, [](VecF a, VecF b) { return larger(a, b); }));
  }
}

// exp(z - max) of rows begin to begin + count.
template <int R, class T>
DFL_INLINE void exps_of_rows(const Rows<T>& it, int begin, int count, const float* max,
                             VecF (*e)[R]) {
  const Exps<VecF> exp;
  DFL_ROW_LOOP for (int i = 0; i < count; ++i) {
    const T* row = it.logits + it.offsets[begin + i];
    __builtin_prefetch(it.logits + it.next[begin + i] + it.ahead);
    DFL_UNROLL for (int r = 0; r < R; ++r) e[i][r] = load_vector(row + r * kRows) - max[begin + i];
    exp(e[i]);
  }
}

// The sums of e, and those of e W if kMoment.
template <int R, bool kMoment>
DFL_INLINE void sum_rows(const VecF (*e)[R], const Bins<float>& bins, const float* positions,
                         VecF& sum, VecF& moment) {
  const auto add = [](VecF a, VecF b) { return a + b; };
  if constexpr (kMoment && R == 1) {
    if (bins.positions == nullptr) return sum_and_moment<false>(e[0], e[0], sum, moment);
  }
  sum = over_rows<R>(e, add);
  if constexpr (kMoment) {
    Vectors<R> scaled;
    DFL_UNROLL for (int i = 0; i < kRows; ++i) {
      DFL_UNROLL for (int r = 0; r < R; ++r) {
        scaled[i][r] = e[i][r] * load<VecF>(positions + r * kRows);
      }
    }
    moment = over_rows<R>(scaled, add);
  }
}

// The logits of the two bins of each row.
struct PickedRows {
  VecF left, right;
};

// Copies the two logits of each row to where load_picked() wants them.
template <class T>
DFL_INLINE void pick(const T* logits, const int64_t* offsets, const TwoBins<VecF>& y,
                     T (&pairs)[2 * kRows]) {
  alignas(64) int32_t left[kRows];
  const Integer<VecF> index = Lanes<VecF>::truncated(y.left);
  std::memcpy(left, &index, sizeof(index));
  const int32_t* l = in_register(static_cast<const int32_t*>(left));
  DFL_UNROLL for (int i = 0; i < kRows; ++i) {
    const int pair = i / 4 * 2 + i % 2 + (i & 2 ? kRows / 2 : 0);
    std::memcpy(pairs + 2 * pair, logits + offsets[i] + l[i], 2 * sizeof(T));
  }
}

template <class T>
DFL_INLINE PickedRows load_picked(const T (&pairs)[2 * kRows]) {
  const VecF a = load_vector(pairs), b = load_vector(pairs + kRows);
  return {even_lanes(a, b), odd_lanes(a, b)};
}

#if defined(__AVX512F__)

// The mass of every row, and its position if kPosition.
template <int R, bool kPosition, class T>
DFL_INLINE void sum_exps_of_rows(const Rows<T>& it, const Bins<float>& bins, const float* positions,
                                 const float* max, float* mass) {
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    VecF e[kRows][R], sum, moment;
    exps_of_rows<R>(it, lane, kRows, max, e);
    sum_rows<R, kPosition>(e, bins, positions, sum, moment);
    store(mass + lane, sum);
    if (kPosition) store(it.position + lane, moment / sum);
  }
}

#else

// The mass of every row, and its position if kPosition; kWhole says that bins are whole numbers.
template <int R, bool kPosition, bool kWhole, class T>
DFL_INLINE void sum_exps_of_rows(const Rows<T>& it, const float* positions, const float* max,
                                 float* mass) {
  static_assert(R <= 2, "a lower and an upper half");
  VecF sums[kMaxLanes], moments[kMaxLanes];  // or the upper half, which says enough
  {
    const Exps<VecF> exp;
    DFL_ROW_LOOP for (int i = 0; i < it.lanes; ++i) {
      const T* row = it.logits + it.offsets[i];
      __builtin_prefetch(it.logits + it.next[i] + it.ahead);
      VecF e[R];
      DFL_UNROLL for (int r = 0; r < R; ++r) e[r] = load_vector(row + r * kRows) - max[i];
      exp(e);
      sums[i] = R == 1 ? e[0] : e[0] + e[R - 1];
      if (kPosition && kWhole && R == 2) moments[i] = e[R - 1];
      if (kPosition && !kWhole) {
        moments[i] = e[0] * load<VecF>(positions);
        if (R == 2) moments[i] = fma(e[R - 1], load<VecF>(positions + kRows), moments[i]);
      }
    }
  }
  const auto add = [](VecF a, VecF b) { return a + b; };
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    VecF sum, moment;
    if constexpr (kPosition && kWhole) {
      sum_and_moment<R == 2>(sums + lane, moments + lane, sum, moment);
    } else {
      sum = across(sums + lane, add);
      if (kPosition) moment = across(moments + lane, add);
    }
    store(mass + lane, sum);
    if (kPosition) store(it.position + lane, moment / sum);
  }
}

template <int R, bool kPosition, class T>
DFL_INLINE void sum_exps_of_rows(const Rows<T>& it, const Bins<float>& bins, const float* positions,
                                 const float* max, float* mass) {
  if (kPosition && bins.positions != nullptr) {
    return sum_exps_of_rows<R, kPosition, false>(it, positions, max, mass);
  }
  sum_exps_of_rows<R, kPosition, true>(it, positions, max, mass);
}

#endif

template <class T, int R, bool kLoss, bool kPosition>
void forward_rows(const Rows<T>& it, const Bins<float>& bins, const float* positions) {
  alignas(64) float max[kMaxLanes], mass[kMaxLanes];
  find_row_maxima<R>(it, max);
  sum_exps_of_rows<R, kPosition>(it, bins, positions, max, mass);
  for (int lane = 0; kLoss && lane < it.lanes; lane += kRows) {
    alignas(64) T pairs[2 * kRows];
    const TwoBins<VecF> y = two_bins(load<VecF>(it.target + lane), bins);
    pick(it.logits, it.offsets + lane, y, pairs);
    const PickedRows logit = load_picked(pairs);
    const VecF m = load<VecF>(max + lane);
    store(it.loss + lane, loss_of(load<VecF>(mass + lane), y, logit.left - m, logit.right - m));
  }
}

// What every bin of a row is multiplied with, and what is taken from its two bins.
struct Slopes {
  float loss[kMaxLanes], position[kMaxLanes], expected[kMaxLanes];
  float left[kMaxLanes], right[kMaxLanes], at_left[kMaxLanes], at_right[kMaxLanes];
};

template <class T, int R, bool kLoss, bool kPosition>
void backward_rows(const Rows<T>& it, const Bins<float>& bins, const float* positions) {
  VecF number[R];
  DFL_UNROLL for (int r = 0; r < R; ++r) {
    for (int i = 0; i < kRows; ++i) number[r][i] = static_cast<float>(r * kRows + i);
  }
  VecF e[kMaxLanes][R];
  alignas(64) Slopes slopes;
  alignas(64) float max[kMaxLanes];
  find_row_maxima<R>(it, max);
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    if (lane % kExpRows == 0) {
      const int count = kExpRows == kRows ? kRows : it.lanes - lane;
      exps_of_rows<R>(it, lane, count, max, e + lane);
    }
    VecF sum, moment;
    sum_rows<R, kPosition>(e + lane, bins, positions, sum, moment);
    VecF inverse = 1 / sum;
    if (kLoss) {
      const TwoBins<VecF> y = two_bins(load<VecF>(it.target + lane), bins);
      const VecF upstream = load<VecF>(it.grad_loss + lane);
      inverse += y.right_weight * 0;  // a NaN target makes the whole row NaN
      store(slopes.loss + lane, upstream * inverse);
      store(slopes.left + lane, y.left);
      store(slopes.right + lane, y.left + 1);
      store(slopes.at_left + lane, upstream * y.left_weight);
      store(slopes.at_right + lane, upstream * y.right_weight);
    }
    if (kPosition) {
      store(slopes.position + lane, load<VecF>(it.grad_position + lane) * inverse);
      store(slopes.expected + lane, moment * inverse);
    }
  }
  T* const gradients = it.gradient;
  const int64_t* const offsets = it.gradient_offsets;
  const int count = it.count;
  if (it.ahead) {
    __builtin_prefetch(reinterpret_cast<char*>(gradients + offsets[0]) + kPageAhead, 1);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < count; ++i) {
    T* to = gradients + offsets[i];
    __builtin_prefetch(gradients + it.gradient_next[i] + it.ahead, 1);
    DFL_UNROLL for (int r = 0; r < R; ++r) {
      const VecF mass = e[i][r];
      VecF gradient;
      if (kLoss) {
        gradient = mass * slopes.loss[i];
        gradient = number[r] == slopes.left[i] ? gradient - slopes.at_left[i] : gradient;
        gradient = number[r] == slopes.right[i] ? gradient - slopes.at_right[i] : gradient;
      }
      if (kPosition) {
        const VecF scaled = mass * slopes.position[i];
        const VecF distance = load<VecF>(positions + r * kRows) - slopes.expected[i];
        gradient = kLoss ? fma(scaled, distance, gradient) : scaled * distance;
      }
      store_vector(to + r * kRows, gradient);
    }
  }
}

#endif

}  // namespace dflkern
