#include "vector_rows.h"

#include "call.h"

namespace dflkern {
namespace {

#if defined(__AVX2__) && defined(__F16C__)

template <class T, int R>
RowsFunction<T> with_vectors(const Call& call) {
  if (call.backward) {
    if (!call.position) return backward_rows<T, R, true, false>;
    return call.loss ? backward_rows<T, R, true, true> : backward_rows<T, R, false, true>;
  }
  if (!call.position) return forward_rows<T, R, true, false>;
  return call.loss ? forward_rows<T, R, true, true> : forward_rows<T, R, false, true>;
}

template <class T>
RowsFunction<T> choose(const Call& call) {
  if (call.bin_stride != 1 || (call.backward && call.gradient_bin_stride != 1)) return nullptr;
  if (call.bins == kRows) return with_vectors<T, 1>(call);
  if (call.bins == 2 * kRows) return with_vectors<T, 2>(call);
  return nullptr;
}

#else

template <class T>
RowsFunction<T> choose(const Call&) {
  return nullptr;
}

#endif

}  // namespace

template <>
RowsFunction<float> rows_function<float>(const Call& call) {
  return choose<float>(call);
}
template <>
RowsFunction<Half> rows_function<Half>(const Call& call) {
  return choose<Half>(call);
}
template <>
RowsFunction<BFloat16> rows_function<BFloat16>(const Call& call) {
  return choose<BFloat16>(call);
}
template <>
RowsFunction<double> rows_function<double>(const Call&) {
  return nullptr;
}

}  // namespace dflkern
