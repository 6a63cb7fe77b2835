// Whole vectors between memory in the storage type of the logits and the type of the arithmetic.

#pragma once

#include "eights.h"

namespace dflkern {

// How many numbers a vector of the arithmetic for T holds.
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(Compute<T>);

template <class T>
DFL_INLINE Vec<Compute<T>> load_vector(const T* from) {
  using F = Compute<T>;
  if constexpr (sizeof(T) == sizeof(F)) {
    return load<Vec<F>>(from);
  } else {
#if defined(__AVX512F__) && defined(__F16C__)
    return bits_as<VecF>(_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(load8(from))),
                                            _mm256_castps_pd(load8(from + 8)), 1));
#elif defined(__AVX2__) && defined(__F16C__)
    return load8(from);
#else
    VecF x;
    for (int i = 0; i < kWidth<T>; ++i) x[i] = widened(from[i]);
    return x;
#endif
  }
}

template <class T>
DFL_INLINE void store_vector(T* to, Vec<Compute<T>> x) {
  using F = Compute<T>;
  if constexpr (sizeof(T) == sizeof(F)) {
    store(to, x);
  } else {
#if defined(__AVX512F__) && defined(__F16C__)
    const __m512d bits = bits_as<__m512d>(x);
    store8(to, _mm256_castpd_ps(_mm512_castpd512_pd256(bits)));
    store8(to + 8, _mm256_castpd_ps(_mm512_extractf64x4_pd(bits, 1)));
#elif defined(__AVX2__) && defined(__F16C__)
    store8(to, x);
#else
    for (int i = 0; i < kWidth<T>; ++i) narrow(x[i], to[i]);
#endif
  }
}

// Whether stream_vector() goes past the caches.
template <class T>
#if defined(__AVX2__)
constexpr bool kStreams = sizeof(T) == sizeof(Compute<T>);
#else
constexpr bool kStreams = false;
#endif

// Stores to memory that is aligned for a vector and is not read again soon.
template <class T>
DFL_INLINE void stream_vector(T* to, Vec<Compute<T>> x) {
#if defined(__AVX512F__)
  if constexpr (kStreams<T>) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits_as<__m512i>(x));
  }
#elif defined(__AVX2__)
  if constexpr (kStreams<T>) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_as<__m256i>(x));
  }
#endif
  store_vector(to, x);
}

// Other threads see what this one streamed only after this; waiting for it once is enough.
inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace dflkern
