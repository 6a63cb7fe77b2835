// exp_nonpositive() of several vectors, in loops that have the constants of it at hand.

#pragma once

#include "vec.h"

namespace dflkern {

template <class V>
struct Exps {
  template <int N>
  DFL_INLINE void operator()(V (&x)[N]) const {
    DFL_UNROLL for (int i = 0; i < N; ++i) x[i] = exp_nonpositive(x[i]);
  }
};

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)

// With the constants in registers, of which there are just enough: GCC would read them from memory
// at each use, which takes longer than the arithmetic. And step by step of all vectors: one vector
// after another would fill the processor's queue with operations that wait.
template <>
class Exps<VecF> {
  using C = Constants<float>;
  static_assert(C::kLn2Rest == 0, "left out");

  static DFL_INLINE VecF held(float constant) {
    VecF x = splat<VecF>(constant);
    __asm__("" : "+x"(x));
    return x;
  }
  template <int N, class Step>
  static DFL_INLINE void each(Step step) {
    DFL_UNROLL for (int i = 0; i < N; ++i) step(i);
  }

 public:
  template <int N>
  DFL_INLINE void operator()(VecF (&x)[N]) const {
    VecF shifted[N], core[N];
    each<N>([&](int i) { x[i] = larger(lowest_, x[i]); });
    each<N>([&](int i) { shifted[i] = fma(x[i], log2e_, rounder_); });
    each<N>([&](int i) { x[i] = fma(shifted[i] - rounder_, minus_ln2_, x[i]); });
    each<N>([&](int i) { core[i] = fma(c5_, x[i], c4_); });
    each<N>([&](int i) { core[i] = fma(core[i], x[i], c3_); });
    each<N>([&](int i) { core[i] = fma(core[i], x[i], c2_); });
    each<N>([&](int i) { core[i] = fma(core[i], x[i], c1_); });
    each<N>([&](int i) { core[i] = fma(core[i], x[i], c0_); });
    each<N>([&](int i) {
      x[i] = core[i] * bits_as<VecF>(bits_as<Bits<VecF>>(shifted[i]) << C::kMantissaBits);
    });
  }

 private:
  const VecF lowest_ = held(C::kLowest), log2e_ = held(C::kLog2e), rounder_ = held(C::kRounder),
             minus_ln2_ = held(-C::kLn2), c0_ = held(C::kExp[0]), c1_ = held(C::kExp[1]),
             c2_ = held(C::kExp[2]), c3_ = held(C::kExp[3]), c4_ = held(C::kExp[4]),
             c5_ = held(C::kExp[5]);
};

#endif

}  // namespace dflkern
