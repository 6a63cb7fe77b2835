// Distributions with 8, 16, 17 or 33 bins of any strides. Made for neighbouring distributions that
// are contiguous: a thread owns kWidth of them and reads a bin of all with one load.
//
// columns2 needs pairs: axis strides of 1, all others and n even, the logits aligned to a pair.

#include "distribution.cuh"
#include "entries.cuh"

namespace dflkern {

__device__ __forceinline__ __half2 pair_of(fp16 x, fp16 y) { return {x, y}; }
__device__ __forceinline__ __nv_bfloat162 pair_of(bf16 x, bf16 y) { return {x, y}; }
__device__ __forceinline__ float2 pair_of(float x, float y) { return make_float2(x, y); }

namespace {

// kWidth neighbouring elements.
template <class T, int kWidth>
struct Neighbours;

template <class T>
struct Neighbours<T, 1> {
  static __device__ __forceinline__ void load(const T* from, Compute<T> (&to)[1]) {
    to[0] = widen(__ldg(from));
  }
  static __device__ __forceinline__ void store(T* to, const Compute<T> (&from)[1]) {
    *to = narrow<T>(from[0]);
  }
};

template <class T>
struct Neighbours<T, 2> {
  using Pair = decltype(pair_of(T(), T()));
  static __device__ __forceinline__ void load(const T* from, Compute<T> (&to)[2]) {
    const Pair pair = __ldg(reinterpret_cast<const Pair*>(from));
    to[0] = widen(pair.x);
    to[1] = widen(pair.y);
  }
  static __device__ __forceinline__ void store(T* to, const Compute<T> (&from)[2]) {
    // An intrinsic, as the compiler makes two stores of an assignment
    __stwb(reinterpret_cast<Pair*>(to), pair_of(narrow<T>(from[0]), narrow<T>(from[1])));
  }
};

template <class T, int K, int kWidth>
__device__ __forceinline__ void read(RegisterRow<Compute<T>, K> (&rows)[kWidth], const T* logits,
                                     int64_t bin_stride) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    Compute<T> bin[kWidth];
    Neighbours<T, kWidth>::load(logits + k * bin_stride, bin);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) rows[v].bin[k] = bin[v];
  }
}

template <class T, int K, What what, int kWidth>
__device__ __forceinline__ void forward(DFL_FORWARD_POINTERS(T), DFL_AXES) {
  using F = Compute<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (i >= n) return;
  const int64_t place = i * (kWidth > 1 ? 1 : axis_output_stride) +
                        blockIdx.y * middle_output_stride + blockIdx.z * outer_output_stride;
  const bool with_loss = wants_loss<what>(target), with_position = wants_position<what>(position);
  const F* positions = known<what>(project);
  F wanted[kWidth] = {}, losses[kWidth], expectations[kWidth];
  if (with_loss) Neighbours<F, kWidth>::load(target + place, wanted);
  RegisterRow<F, K> rows[kWidth];
  read<T, K, kWidth>(rows,
                     logits + i * (kWidth > 1 ? 1 : axis_stride) + blockIdx.y * middle_stride +
                         blockIdx.z * outer_stride,
                     bin_stride);
  const auto bins = bins_of(K, positions, bound);
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    TwoBins<F> y{};
    if (with_loss) y = find_bins(wanted[v], bins);
    const int left = static_cast<int>(y.left);
    F left_shifted = 0, right_shifted = 0;
    const auto softmax = exponentiate<false>(rows[v], positions, with_position, [&](int k, F x) {
      if (k == left) left_shifted = x;
      if (k == left + 1) right_shifted = x;
    });
    losses[v] = loss_of(softmax, y, left_shifted, right_shifted);
    expectations[v] = expected(softmax);
  }
  if (with_loss) Neighbours<F, kWidth>::store(loss + place, losses);
  if (with_position) Neighbours<F, kWidth>::store(position + place, expectations);
}

template <class T, int K, What what, int kWidth>
__device__ __forceinline__ void backward(DFL_BACKWARD_POINTERS(T), DFL_GRAD_AXES) {
  using F = Compute<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (i >= n) return;
  const int64_t place = i * (kWidth > 1 ? 1 : axis_output_stride) +
                        blockIdx.y * middle_output_stride + blockIdx.z * outer_output_stride;
  const bool with_loss = wants_loss<what>(target);
  const bool with_position = wants_position<what>(grad_position);
  const F* positions = known<what>(project);
  F wanted[kWidth] = {}, by_loss[kWidth] = {}, by_position[kWidth] = {};
  if (with_loss) {
    Neighbours<F, kWidth>::load(target + place, wanted);
    Neighbours<F, kWidth>::load(grad_loss + place, by_loss);
  }
  if (with_position) Neighbours<F, kWidth>::load(grad_position + place, by_position);
  RegisterRow<F, K> rows[kWidth];
  read<T, K, kWidth>(rows,
                     logits + i * (kWidth > 1 ? 1 : axis_stride) + blockIdx.y * middle_stride +
                         blockIdx.z * outer_stride,
                     bin_stride);
  const auto bins = bins_of(K, positions, bound);
  TwoBins<F> y[kWidth] = {};
  Slope<F> slope[kWidth];
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    if (with_loss) y[v] = find_bins(wanted[v], bins);
    const auto softmax = exponentiate<true>(rows[v], positions, with_position, [](int, F) {});
    slope[v] = slope_of(softmax, by_loss[v], by_position[v], y[v].right_weight, with_position);
  }
  T* destination = grad_logits + i * (kWidth > 1 ? 1 : axis_grad_stride) +
                   blockIdx.y * middle_grad_stride + blockIdx.z * outer_grad_stride;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    F gradient[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      const int left = static_cast<int>(y[v].left);
      F taken = 0;
      if (k == left) taken = by_loss[v] * y[v].left_weight;
      if (k == left + 1) taken = by_loss[v] * y[v].right_weight;
      const F number = position_of(k, F(k), positions);
      gradient[v] = slope[v].gradient(rows[v].bin[k], number, taken);
    }
    Neighbours<T, kWidth>::store(destination + k * grad_bin_stride, gradient);
  }
}

}  // namespace
}  // namespace dflkern

using namespace dflkern;

#define DFL_WIDTH_columns1 1
#define DFL_WIDTH_columns2 2
#define DFL_DEFINE(structure, what, k)                                                        \
  DFL_ENTRY_POINT DFL_NAME(structure, what, forward, k)(DFL_FORWARD_POINTERS(DFL_ELEMENT),    \
                                                        DFL_AXES) {                           \
    forward<DFL_ELEMENT, k, What::what, DFL_WIDTH_##structure>(DFL_FORWARD_VALUES,            \
                                                               DFL_AXES_VALUES);              \
  }                                                                                           \
  DFL_ENTRY_POINT DFL_NAME(structure, what, backward, k)(DFL_BACKWARD_POINTERS(DFL_ELEMENT),  \
                                                         DFL_GRAD_AXES) {                     \
    backward<DFL_ELEMENT, k, What::what, DFL_WIDTH_##structure>(DFL_BACKWARD_VALUES,          \
                                                                DFL_GRAD_AXES_VALUES);        \
  }
DFL_EACH(DFL_DEFINE, columns1)
DFL_EACH_PAIR(DFL_DEFINE)

#define DFL_ENTRIES(structure, what, k)                                           \
  DFL_FORWARD_ENTRY(DFL_NAME(structure, what, forward, k), kAxesNumbers)          \
  DFL_BACKWARD_ENTRY(DFL_NAME(structure, what, backward, k), kGradAxesNumbers)
DFL_TABLE(columns, DFL_EACH(DFL_ENTRIES, columns1) DFL_EACH_PAIR(DFL_ENTRIES))
