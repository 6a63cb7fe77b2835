// Vectors of numbers for CPUs, one distribution per lane. The compiler's vector extensions (GCC,
// Clang) do the arithmetic; intrinsics are used where those have no word for an operation.

#pragma once

#include "common/dfl_math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DFL_UNROLL _Pragma("GCC unroll 16")

namespace dflkern {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));

template <class V, class F, class SignedInteger, class UnsignedInteger>
struct VectorLanes {
  using Element = F;
  typedef SignedInteger Integer __attribute__((vector_size(kVectorBytes)));
  typedef UnsignedInteger Bits __attribute__((vector_size(kVectorBytes)));
  static DFL_INLINE Integer truncated(V x) { return __builtin_convertvector(x, Integer); }
  static DFL_INLINE V converted(Integer x) { return __builtin_convertvector(x, V); }
#if !defined(__FMA__)
  static DFL_INLINE V larger(V a, V b) { return a > b ? a : b; }
  static DFL_INLINE V fma(V a, V b, V c) {
    for (size_t i = 0; i < sizeof(V) / sizeof(F); ++i) c[i] = Lanes<F>::fma(a[i], b[i], c[i]);
    return c;
  }
#endif
};

template <>
struct Lanes<VecF> : VectorLanes<VecF, float, int32_t, uint32_t> {
#if defined(__AVX512F__)
  static DFL_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
  static DFL_INLINE VecF larger(VecF a, VecF b) { return _mm512_max_ps(a, b); }
#elif defined(__FMA__)
  static DFL_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
  static DFL_INLINE VecF larger(VecF a, VecF b) { return _mm256_max_ps(a, b); }
#endif
};
template <>
struct Lanes<VecD> : VectorLanes<VecD, double, int64_t, uint64_t> {
#if defined(__AVX512F__)
  static DFL_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
  static DFL_INLINE VecD larger(VecD a, VecD b) { return _mm512_max_pd(a, b); }
#elif defined(__FMA__)
  static DFL_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
  static DFL_INLINE VecD larger(VecD a, VecD b) { return _mm256_max_pd(a, b); }
#endif
};

template <class F>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = VecF;
};
template <>
struct VectorOf<double> {
  using Type = VecD;
};
template <class F>
using Vec = typename VectorOf<F>::Type;

template <class V>
DFL_INLINE V load(const Element<V>* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class V>
DFL_INLINE void store(Element<V>* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

}  // namespace dflkern
