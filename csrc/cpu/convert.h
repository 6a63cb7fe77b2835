// Storage types of the logits, and their conversion to and from the type of the arithmetic,
// rounding to nearest even and keeping NaN.

#pragma once

#include "vec.h"

namespace dflkern {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of the arithmetic for logits of type T.
template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40);
}

#if defined(__F16C__)
inline float widened(Half x) { return _cvtsh_ss(x.bits); }
inline void narrow(float x, Half& to) { to.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float widened(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent's bias and makes subnormal numbers normal, exactly.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f));
}
inline void narrow(float x, Half& to) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000;
  const float magnitude = bits_as<float>(bits & 0x7fffffff);
  uint32_t result;
  if (magnitude != magnitude) {
    result = 0x7e00 | ((bits >> 13) & 0x1ff);
  } else if (magnitude >= 0x1.ffep15f) {
    result = 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // adding 1/2 rounds to a multiple of the subnormal step
    result = bits_as<uint32_t>(magnitude + 0.5f) - 0x3f000000;
  } else {
    const uint32_t b = bits & 0x7fffffff;
    result = (b + 0xfff + ((b >> 13) & 1) - 0x38000000) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | result);
}
#endif

}  // namespace dflkern
