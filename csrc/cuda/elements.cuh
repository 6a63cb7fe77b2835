// The types that tensors are stored in, with their conversions and loads.
//
// NVRTC compiles the kernels, and has no header of the half-precision types built in; the kernels
// include nothing outside csrc.

#pragma once

#include "common/dfl_math.h"

namespace dflkern {

constexpr int kThreads = 128;  // the most in a block
constexpr int kMaxBins = 256;

struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
using fp32 = float;
using fp64 = double;

template <class T>
struct StoredAs {
  using Compute = float;
};
template <>
struct StoredAs<double> {
  using Compute = double;
};
// The type of the arithmetic, of targets and of results.
template <class T>
using Compute = typename StoredAs<T>::Compute;

__device__ __forceinline__ float widen(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(bf16 x) {
  float y;
  asm("mov.b32 %0, {0, %1};" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// Rounds to the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(Compute<T> x) {
  return x;
}
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  bf16 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t bits = __float_as_uint(x);
  y.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
#endif
  return y;
}

// A load through the read-only cache.
template <class T>
__device__ __forceinline__ T load(const T* from) {
  return __ldg(from);
}
template <>
__device__ __forceinline__ fp16 load(const fp16* from) {
  return {__ldg(&from->bits)};
}
template <>
__device__ __forceinline__ bf16 load(const bf16* from) {
  return {__ldg(&from->bits)};
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<4> {
  using Word = unsigned;
};
template <>
struct WordOf<8> {
  using Word = uint2;
};
template <>
struct WordOf<16> {
  using Word = uint4;
};

// Neighbouring elements that are read and written as one word of kBytes.
template <class T, int kBytes>
union Packed {
  using Word = typename WordOf<kBytes>::Word;
  static constexpr int kLanes = kBytes / sizeof(T);
  Word word;
  T element[kLanes];

  __device__ Packed() {}
  __device__ __forceinline__ explicit Packed(Word word) : word(word) {}
};

}  // namespace dflkern
