// Eight logits at a time: conversion, and squares of 8 x 8 between rows of memory and columns.

#pragma once

#include "convert.h"

namespace dflkern {

#if defined(__AVX2__) && defined(__F16C__)

template <class T>
constexpr bool kHasEights = sizeof(T) < 8;

DFL_INLINE __m128i load_bits(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
DFL_INLINE void store_bits(void* to, __m128i bits) {
  _mm_storeu_si128(static_cast<__m128i*>(to), bits);
}

// bf16 in the upper halves of words. A NaN that arithmetic made has its quiet bit among the bits
// that are kept, so not rounding it keeps it a NaN.
DFL_INLINE __m256i rounded_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_add_epi32(bits, _mm256_andnot_si256(is_nan, half));
}

DFL_INLINE __m256 load8(const float* from) { return _mm256_loadu_ps(from); }
DFL_INLINE __m256 load8(const Half* from) { return _mm256_cvtph_ps(load_bits(from)); }
DFL_INLINE __m256 load8(const BFloat16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(from)), 16));
}

DFL_INLINE void store8(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
DFL_INLINE void store8(Half* to, __m256 x) {
  store_bits(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
DFL_INLINE void store8(BFloat16* to, __m256 x) {
  const __m256i words = _mm256_srli_epi32(rounded_to_bf16(x), 16);
  store_bits(to,
             _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// A pair is two rows a and b of eight: low holds a0..a3 b0..b3, high a4..a7 b4..b7. Made while
// converting, it leaves only transpositions within 128 bits.
DFL_INLINE void load_pair(const float* a, const float* b, __m256& low, __m256& high) {
  const __m256 x = _mm256_loadu_ps(a), y = _mm256_loadu_ps(b);
  low = _mm256_permute2f128_ps(x, y, 0x20);
  high = _mm256_permute2f128_ps(x, y, 0x31);
}
DFL_INLINE void load_pair(const Half* a, const Half* b, __m256& low, __m256& high) {
  const __m128i a_bits = load_bits(a), b_bits = load_bits(b);
  low = _mm256_cvtph_ps(_mm_unpacklo_epi64(a_bits, b_bits));
  high = _mm256_cvtph_ps(_mm_unpackhi_epi64(a_bits, b_bits));
}
DFL_INLINE void load_pair(const BFloat16* a, const BFloat16* b, __m256& low, __m256& high) {
  const __m256i bits =
      _mm256_inserti128_si256(_mm256_castsi128_si256(load_bits(a)), load_bits(b), 1);
  low = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), bits));
  high = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), bits));
}

DFL_INLINE void store_pair(float* a, float* b, __m256 low, __m256 high) {
  _mm256_storeu_ps(a, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(b, _mm256_permute2f128_ps(low, high, 0x31));
}
DFL_INLINE void store_pair(Half* a, Half* b, __m256 low, __m256 high) {
  const __m128i low_bits = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high_bits = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
  store_bits(a, _mm_unpacklo_epi64(low_bits, high_bits));
  store_bits(b, _mm_unpackhi_epi64(low_bits, high_bits));
}
DFL_INLINE void store_pair(BFloat16* a, BFloat16* b, __m256 low, __m256 high) {
  const __m256i bits = _mm256_packus_epi32(_mm256_srli_epi32(rounded_to_bf16(low), 16),
                                           _mm256_srli_epi32(rounded_to_bf16(high), 16));
  store_bits(a, _mm256_castsi256_si128(bits));
  store_bits(b, _mm256_extracti128_si256(bits, 1));
}

// Transposes the two 4 x 4 squares in the halves of four vectors.
DFL_INLINE void transpose4(__m256 (&r)[4]) {
  const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
  r[0] = _mm256_shuffle_ps(a, c, 0x44);
  r[1] = _mm256_shuffle_ps(a, c, 0xee);
  r[2] = _mm256_shuffle_ps(b, d, 0x44);
  r[3] = _mm256_shuffle_ps(b, d, 0xee);
}

// Reads elements 0 to 7 of eight rows into columns: element k of row i to columns[k * width + i].
template <class T>
DFL_INLINE __m256 load_square(const T* const (&rows)[8], int64_t at, float* columns, int64_t width,
                              __m256 max) {
  __m256 low[4], high[4];
  for (int i = 0; i < 4; ++i) load_pair(rows[i] + at, rows[i + 4] + at, low[i], high[i]);
  transpose4(low);
  transpose4(high);
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(columns + i * width, low[i]);
    _mm256_storeu_ps(columns + (i + 4) * width, high[i]);
  }
  const __m256 a = _mm256_max_ps(low[0], low[1]), b = _mm256_max_ps(low[2], low[3]);
  const __m256 c = _mm256_max_ps(high[0], high[1]), d = _mm256_max_ps(high[2], high[3]);
  return _mm256_max_ps(max, _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
}

template <class T>
DFL_INLINE void store_square(T* const (&rows)[8], int64_t at, const float* columns, int64_t width) {
  __m256 low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    low[i] = _mm256_loadu_ps(columns + i * width);
    high[i] = _mm256_loadu_ps(columns + (i + 4) * width);
  }
  transpose4(low);
  transpose4(high);
  for (int i = 0; i < 4; ++i) store_pair(rows[i] + at, rows[i + 4] + at, low[i], high[i]);
}

#else

template <class T>
constexpr bool kHasEights = false;

#endif

}  // namespace dflkern
