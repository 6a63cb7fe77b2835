// Copies between the logits in memory and a block's columns, where bin k of lane i is
// columns[k * width + i].

#pragma once

#include "block.h"
#include "eights.h"

namespace dflkern {

// Reads `width` distributions, a multiple of 8, that begin at logits + offsets[i].
template <class T>
void load_scattered(const T* logits, const int64_t* offsets, int64_t bin_stride, int bins,
                    Compute<T>* columns, int64_t width) {
  for (int k = 0; k < bins; ++k) {
    for (int i = 0; i < width; ++i) {
      columns[k * width + i] = widened(logits[offsets[i] + k * bin_stride]);
    }
  }
}

template <class T>
void store_scattered(T* gradient, const int64_t* offsets, int64_t bin_stride, int bins,
                     const Compute<T>* columns, int64_t width, int lanes) {
  for (int k = 0; k < bins; ++k) {
    for (int i = 0; i < lanes; ++i) {
      narrow(columns[k * width + i], gradient[offsets[i] + k * bin_stride]);
    }
  }
}

#if defined(__AVX2__) && defined(__F16C__)

// Bins that fill no square of eight are copied one by one if that few are left; otherwise a square
// that overlaps the one before costs less.
constexpr int kFewBins = 2;

// Keeps GCC from computing eight pointers as a vector, and then taking that to pieces.
template <class T>
DFL_INLINE T* in_register(T* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

// The same for rows of at least eight bins; also finds their maxima.
template <class T>
void load_rows(const T* logits, const int64_t* offsets, int bins, float* columns, int64_t width,
               float* max) {
  for (int lane = 0; lane < width; lane += 8) {
    const T* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = in_register(logits + offsets[lane + i]);
    float* to = columns + lane;
    __m256 largest = _mm256_set1_ps(-__builtin_inff());
    int k = 0;
    for (; k + kFewBins < bins; k += 8) {
      if (k + 8 > bins) k = bins - 8;
      largest = load_square(rows, k, to + k * width, width, largest);
    }
    for (; k < bins; ++k) {
      const __m256 column = _mm256_setr_ps(
          widened(rows[0][k]), widened(rows[1][k]), widened(rows[2][k]), widened(rows[3][k]),
          widened(rows[4][k]), widened(rows[5][k]), widened(rows[6][k]), widened(rows[7][k]));
      _mm256_storeu_ps(to + k * width, column);
      largest = _mm256_max_ps(largest, column);
    }
    _mm256_storeu_ps(max + lane, largest);
  }
}

template <class T>
void store_rows(T* gradient, const int64_t* offsets, int bins, const float* columns, int64_t width,
                int lanes) {
  int lane = 0;
  for (; lane + 8 <= lanes; lane += 8) {
    T* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = in_register(gradient + offsets[lane + i]);
    const float* from = columns + lane;
    int k = 0;
    for (; k + kFewBins < bins; k += 8) {
      if (k + 8 > bins) k = bins - 8;
      store_square(rows, k, from + k * width, width);
    }
    for (; k < bins; ++k) {
      for (int i = 0; i < 8; ++i) narrow(from[k * width + i], rows[i][k]);
    }
  }
  store_scattered(gradient, offsets + lane, 1, bins, columns + lane, width, lanes - lane);
}

// Reads `lanes` neighbouring distributions, bin after bin; the columns from there to `width` are 0.
template <class T>
void load_line(const T* logits, int64_t bin_stride, int bins, float* columns, int64_t width,
               int lanes, float* max) {
  for (int lane = 0; lane < width; lane += 16) {
    __m256 first = _mm256_set1_ps(-__builtin_inff()), second = first;
    for (int k = 0; k < bins; ++k) {
      const T* from = logits + k * bin_stride + lane;
      __builtin_prefetch(from + kAhead);
      T partial[16] = {};
      if (lane + 16 > lanes) {
        if (lane < lanes) std::memcpy(partial, from, (lanes - lane) * sizeof(T));
        from = partial;
      }
      const __m256 a = load8(from), b = load8(from + 8);
      float* to = columns + k * width + lane;
      _mm256_storeu_ps(to, a);
      _mm256_storeu_ps(to + 8, b);
      first = _mm256_max_ps(first, a);
      second = _mm256_max_ps(second, b);
    }
    _mm256_storeu_ps(max + lane, first);
    _mm256_storeu_ps(max + lane + 8, second);
  }
}

template <class T>
void store_line(T* gradient, int64_t bin_stride, int bins, const float* columns, int64_t width,
                int lanes) {
  for (int k = 0; k < bins; ++k) {
    const float* from = columns + k * width;
    T* to = gradient + k * bin_stride;
    int i = 0;
    for (; i + 8 <= lanes; i += 8) store8(to + i, load8(from + i));
    for (; i < lanes; ++i) narrow(from[i], to[i]);
  }
}

#endif

}  // namespace dflkern
