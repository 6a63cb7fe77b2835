// Rows of a few whole vectors: how they are read and written, and what combines them across lanes.

#pragma once

#include "eights.h"
#include "vec.h"

namespace dflkern {

// Rows computed together: as many as their maxima fill a vector.
constexpr int kRows = kVectorBytes / sizeof(float);

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

#elif defined(__AVX2__) && defined(__F16C__)

template <class T>
constexpr bool kHasRows = sizeof(T) < 8;

template <class T>
DFL_INLINE VecF load_vector(const T* from) {
  return load8(from);
}
template <class T>
DFL_INLINE void store_vector(T* to, VecF x) {
  store8(to, x);
}

DFL_INLINE VecF low_pairs(VecF a, VecF b) { return _mm256_unpacklo_ps(a, b); }
DFL_INLINE VecF high_pairs(VecF a, VecF b) { return _mm256_unpackhi_ps(a, b); }
DFL_INLINE VecF low_halves(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0x44); }
DFL_INLINE VecF high_halves(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0xee); }
DFL_INLINE VecF even_lanes(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0x88); }
DFL_INLINE VecF odd_lanes(VecF a, VecF b) { return _mm256_shuffle_ps(a, b, 0xdd); }

#else

template <class T>
constexpr bool kHasRows = false;

#endif

#if defined(__AVX2__) && defined(__F16C__)

// Lane i of the result combines all lanes of vectors[i].
template <class Combine>
DFL_INLINE VecF across(const VecF* vectors, Combine combine) {
  VecF fours[kRows / 4];
  DFL_UNROLL for (int i = 0; i < kRows / 4; ++i) {
    const VecF* v = vectors + 4 * i;
    const VecF a = combine(low_pairs(v[0], v[1]), high_pairs(v[0], v[1]));
    const VecF b = combine(low_pairs(v[2], v[3]), high_pairs(v[2], v[3]));
    fours[i] = combine(low_halves(a, b), high_halves(a, b));
  }
#if defined(__AVX512F__)
  const VecF a = combine(VecF(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44)),
                         VecF(_mm512_shuffle_f32x4(fours[0], fours[1], 0xee)));
  const VecF b = combine(VecF(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44)),
                         VecF(_mm512_shuffle_f32x4(fours[2], fours[3], 0xee)));
  return combine(VecF(_mm512_shuffle_f32x4(a, b, 0x88)), VecF(_mm512_shuffle_f32x4(a, b, 0xdd)));
#else
  return combine(VecF(_mm256_permute2f128_ps(fours[0], fours[1], 0x20)),
                 VecF(_mm256_permute2f128_ps(fours[0], fours[1], 0x31)));
#endif
}

// What is left of four vectors: sums over the lanes of each four, and those of 0, 1, 2, 3 times
// them.
// If they are sums of lower and upper halves of rows, the upper halves, whose lanes count kRows
// more, are given too.
template <bool kUpper>
DFL_INLINE void halve_pairs(const VecF* v, const VecF* uppers, VecF& sum, VecF& moment) {
  VecF sums[2], upper[2];
  DFL_UNROLL for (int i = 0; i < 2; ++i) {
    upper[i] = high_pairs(v[2 * i], v[2 * i + 1]);
    sums[i] = low_pairs(v[2 * i], v[2 * i + 1]) + upper[i];
    if constexpr (kUpper) {
      const VecF* u = uppers + 2 * i;
      const VecF both = low_pairs(u[0], u[1]) + high_pairs(u[0], u[1]);
      upper[i] = fma(splat<VecF>(kRows / 2), both, upper[i]);
    }
  }
  const VecF high = high_halves(sums[0], sums[1]);
  sum = low_halves(sums[0], sums[1]) + high;
  moment =
      fma(splat<VecF>(2), low_halves(upper[0], upper[1]) + high_halves(upper[0], upper[1]), high);
}

// Lane i of `sum` is the sum of all lanes of rows[i], lane i of `moment` that of lane number
// times lane: what is added from the upper part of a vector adds its distance from the lower one.
template <bool kUpper>
DFL_INLINE void sum_and_moment(const VecF* rows, const VecF* uppers, VecF& sum, VecF& moment) {
  VecF sums[kRows / 4], moments[kRows / 4];
  DFL_UNROLL for (int i = 0; i < kRows / 4; ++i) {
    halve_pairs<kUpper>(rows + 4 * i, uppers + 4 * i, sums[i], moments[i]);
  }
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
DFL_INLINE VecF over_rows(const VecF (*rows)[R], Combine combine) {
  VecF folded[kRows];
  DFL_UNROLL for (int i = 0; i < kRows; ++i) {
    folded[i] = rows[i][0];
    DFL_UNROLL for (int r = 1; r < R; ++r) folded[i] = combine(folded[i], rows[i][r]);
  }
  return across(folded, combine);
}

#endif

}  // namespace dflkern
