// Forward and backward over distributions that lie in memory as rows, each a few whole vectors:
// nothing is transposed, and only sums and maxima cross lanes.

#pragma once

#include "block.h"
#include "columns.h"

namespace dflkern {

// Rows computed together: as many as their maxima fill a vector.
constexpr int kRows = kVectorBytes / sizeof(float);

// Elements between what is computed and what is fetched from memory.
constexpr int kAheadInRow = 2048;

// Row i begins at logits + offsets[i]; `lanes`, a multiple of kRows, can be read, and the gradients
// of `count` are written. Everything else has a value per row.
template <class T>
struct Rows {
  int lanes, count;
  const T* logits;
  const int64_t* offsets;
  T* gradient;
  const int64_t* gradient_offsets;
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

#if defined(__AVX512F__)

template <class T>
constexpr bool kHasRows = sizeof(T) < 8;

DFL_INLINE VecF load_vector(const float* from) { return load<VecF>(from); }
DFL_INLINE VecF load_vector(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
DFL_INLINE VecF load_vector(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
DFL_INLINE void store_vector(float* to, VecF x) { store(to, x); }
template <class T>
DFL_INLINE void store_vector(T* to, VecF x) {
  store8(to, _mm512_castps512_ps256(x));
  store8(to + 8, _mm512_extractf32x8_ps(x, 1));
}

// The operation over pairs: of two vectors (lanes in fours, a0..a3) and (b0..b3), the halves of
// both side by side, so that one operation on (first, second) halves what is left to combine.
DFL_INLINE VecF low_pairs(VecF a, VecF b) { return _mm512_unpacklo_ps(a, b); }
DFL_INLINE VecF high_pairs(VecF a, VecF b) { return _mm512_unpackhi_ps(a, b); }
DFL_INLINE VecF low_halves(VecF a, VecF b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
DFL_INLINE VecF high_halves(VecF a, VecF b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
DFL_INLINE VecF even_lanes(VecF a, VecF b) { return _mm512_shuffle_ps(a, b, 0x88); }
DFL_INLINE VecF odd_lanes(VecF a, VecF b) { return _mm512_shuffle_ps(a, b, 0xdd); }

// Lane i of the result combines all lanes of vectors[i].
template <class Combine>
DFL_INLINE VecF across(const VecF (&vectors)[kRows], Combine combine) {
  VecF fours[4];
  DFL_UNROLL for (int i = 0; i < 4; ++i) {
    const VecF* v = vectors + 4 * i;
    const VecF a = combine(low_pairs(v[0], v[1]), high_pairs(v[0], v[1]));
    const VecF b = combine(low_pairs(v[2], v[3]), high_pairs(v[2], v[3]));
    fours[i] = combine(low_halves(a, b), high_halves(a, b));
  }
  const VecF a = combine(VecF(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44)),
                         VecF(_mm512_shuffle_f32x4(fours[0], fours[1], 0xee)));
  const VecF b = combine(VecF(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44)),
                         VecF(_mm512_shuffle_f32x4(fours[2], fours[3], 0xee)));
  return combine(VecF(_mm512_shuffle_f32x4(a, b, 0x88)), VecF(_mm512_shuffle_f32x4(a, b, 0xdd)));
}

#elif defined(__AVX2__) && defined(__F16C__)

template <class T>
constexpr bool kHasRows = sizeof(T) < 8;

template <class T>
DFL_INLINE VecF load_vector(const T* from) { return load8(from); }
template <class T>
DFL_INLINE void store_vector(T* to, VecF x) { store8(to, x); }

DFL_INLINE VecF low_pairs(VecF a, VecF b) { return _mm256_unpacklo_ps(a, b); }
DFL_INLINE VecF high_pairs(VecF a, VecF b) { return _mm256_unpackhi_ps(a, b); }
DFL_INLINE VecF low_halves(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0x44); }
DFL_INLINE VecF high_halves(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0xee); }
DFL_INLINE VecF even_lanes(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0x88); }
DFL_INLINE VecF odd_lanes(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0xdd); }

template <class Combine>
DFL_INLINE VecF across(const VecF (&vectors)[kRows], Combine combine) {
  VecF fours[2];
  DFL_UNROLL for (int i = 0; i < 2; ++i) {
    const VecF* v = vectors + 4 * i;
    const VecF a = combine(low_pairs(v[0], v[1]), high_pairs(v[0], v[1]));
    const VecF b = combine(low_pairs(v[2], v[3]), high_pairs(v[2], v[3]));
    fours[i] = combine(low_halves(a, b), high_halves(a, b));
  }
  return combine(VecF(_mm256_permute2f128_ps(fours[0], fours[1], 0x20)),
                 VecF(_mm256_permute2f128_ps(fours[0], fours[1], 0x31)));
}

#else

template <class T>
constexpr bool kHasRows = false;

#endif

#if defined(__AVX2__) && defined(__F16C__)

// What is left of four vectors: sums over the lanes of each four, and those of 0, 1, 2, 3 times them.
DFL_INLINE void halve_pairs(const VecF* v, VecF& sum, VecF& moment) {
  VecF sums[2], upper[2];
  DFL_UNROLL for (int i = 0; i < 2; ++i) {
    upper[i] = high_pairs(v[2 * i], v[2 * i + 1]);
    sums[i] = low_pairs(v[2 * i], v[2 * i + 1]) + upper[i];
  }
  const VecF high = high_halves(sums[0], sums[1]);
  sum = low_halves(sums[0], sums[1]) + high;
  moment = fma(splat<VecF>(2), low_halves(upper[0], upper[1]) + high_halves(upper[0], upper[1]),
               high);
}

// Lane i of `sum` is the sum of all lanes of rows[i], lane i of `moment` that of lane number
// times lane: what is added from the upper part of a vector adds its distance from the lower one.
DFL_INLINE void sum_and_moment(const VecF (&rows)[kRows][1], VecF& sum, VecF& moment) {
  VecF sums[kRows / 4], moments[kRows / 4];
  DFL_UNROLL for (int i = 0; i < kRows / 4; ++i) halve_pairs(rows[4 * i], sums[i], moments[i]);
#if defined(__AVX512F__)
  VecF halved[2], upper[2];
  DFL_UNROLL for (int i = 0; i < 2; ++i) {
    const VecF high = _mm512_shuffle_f32x4(sums[2 * i], sums[2 * i + 1], 0xee);
    halved[i] = VecF(_mm512_shuffle_f32x4(sums[2 * i], sums[2 * i + 1], 0x44)) + high;
    upper[i] = fma(splat<VecF>(8), high,
                   VecF(_mm512_shuffle_f32x4(moments[2 * i], moments[2 * i + 1], 0x44)) +
                       VecF(_mm512_shuffle_f32x4(moments[2 * i], moments[2 * i + 1], 0xee)));
  }
  const VecF high = _mm512_shuffle_f32x4(halved[0], halved[1], 0xdd);
  sum = VecF(_mm512_shuffle_f32x4(halved[0], halved[1], 0x88)) + high;
  moment = fma(splat<VecF>(4), high,
               VecF(_mm512_shuffle_f32x4(upper[0], upper[1], 0x88)) +
                   VecF(_mm512_shuffle_f32x4(upper[0], upper[1], 0xdd)));
#else
  const VecF high = _mm256_permute2f128_ps(sums[0], sums[1], 0x31);
  sum = VecF(_mm256_permute2f128_ps(sums[0], sums[1], 0x20)) + high;
  moment = fma(splat<VecF>(4), high,
               VecF(_mm256_permute2f128_ps(moments[0], moments[1], 0x20)) +
                   VecF(_mm256_permute2f128_ps(moments[0], moments[1], 0x31)));
#endif
}

// kRows rows of R vectors each.
template <int R>
using Vectors = VecF[kRows][R];

template <int R, class Combine>
DFL_INLINE VecF over_rows(const Vectors<R>& rows, Combine combine) {
  VecF folded[kRows];
  DFL_UNROLL for (int i = 0; i < kRows; ++i) {
    folded[i] = rows[i][0];
    DFL_UNROLL for (int r = 1; r < R; ++r) folded[i] = combine(folded[i], rows[i][r]);
  }
  return across(folded, combine);
}

// The maxima of a block's rows. This, the exponentials and what follows them are loops of their own,
// since one step of all of it is longer than what a processor looks ahead.
template <int R, class T>
DFL_INLINE void find_row_maxima(const Rows<T>& it, float* max) {
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    Vectors<R> z;
    DFL_UNROLL for (int i = 0; i < kRows; ++i) {
      const T* row = it.logits + it.offsets[lane + i];
      DFL_UNROLL for (int r = 0; r < R; ++r) z[i][r] = load_vector(row + r * kRows);
    }
    store(max + lane, over_rows<R>(z, [](VecF a, VecF b) { return larger(a, b); }));
  }
}

// exp(z - max) of kRows rows.
template <int R, class T>
DFL_INLINE void exps_of_rows(const T* logits, const int64_t* offsets, const float* max,
                             Vectors<R>& e) {
  _Pragma("GCC unroll 8") for (int i = 0; i < kRows; ++i) {
    const T* row = logits + offsets[i];
    __builtin_prefetch(row + kAheadInRow);
    DFL_UNROLL for (int r = 0; r < R; ++r) {
      e[i][r] = exp_nonpositive(load_vector(row + r * kRows) - max[i]);
    }
  }
}

// The sums of e, and those of e W if kMoment.
template <int R, bool kMoment>
DFL_INLINE void sum_rows(const Vectors<R>& e, const Bins<float>& bins, const float* positions,
                         VecF& sum, VecF& moment) {
  const auto add = [](VecF a, VecF b) { return a + b; };
  if constexpr (kMoment && R == 1) {
    if (bins.positions == nullptr) return sum_and_moment(e, sum, moment);
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

template <class T, int R, bool kLoss, bool kPosition>
void forward_rows(const Rows<T>& it, const Bins<float>& bins, const float* positions) {
  alignas(64) float max[kMaxLanes], mass[kMaxLanes];
  find_row_maxima<R>(it, max);
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    Vectors<R> e;
    VecF sum, moment;
    exps_of_rows<R>(it.logits, it.offsets + lane, max + lane, e);
    sum_rows<R, kPosition>(e, bins, positions, sum, moment);
    store(mass + lane, sum);
    if (kPosition) store(it.position + lane, moment / sum);
  }
  for (int lane = 0; kLoss && lane < it.lanes; lane += kRows) {
    alignas(64) T pairs[2 * kRows];
    const TwoBins<VecF> y = two_bins(load<VecF>(it.target + lane), bins);
    pick(it.logits, it.offsets + lane, y, pairs);
    const PickedRows logit = load_picked(pairs);
    const VecF m = load<VecF>(max + lane);
    store(it.loss + lane,
          loss_of(load<VecF>(mass + lane), y, logit.left - m, logit.right - m));
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
  Vectors<R> e[kMaxLanes / kRows];
  alignas(64) Slopes slopes;
  alignas(64) float max[kMaxLanes];
  find_row_maxima<R>(it, max);
  for (int lane = 0; lane < it.lanes; lane += kRows) {
    Vectors<R>& own = e[lane / kRows];
    VecF sum, moment;
    exps_of_rows<R>(it.logits, it.offsets + lane, max + lane, own);
    sum_rows<R, kPosition>(own, bins, positions, sum, moment);
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
  _Pragma("GCC unroll 4") for (int i = 0; i < count; ++i) {
    T* to = gradients + offsets[i];
    __builtin_prefetch(to + kAheadInRow, 1);
    DFL_UNROLL for (int r = 0; r < R; ++r) {
      const VecF mass = e[i / kRows][i % kRows][r];
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
