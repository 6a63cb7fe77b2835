// Distributions with 8, 16, 17 or 33 bins of any strides. Made for neighbouring distributions that
// are contiguous: a thread owns kWidth of them and reads a bin of all with one load.
//
// columns2 needs pairs: axis strides of 1, all others and n even, the logits aligned to a pair.

#include "distribution.cuh"

namespace dflkern {

// kWidth neighbouring elements.
template <class T, int kWidth>
struct Neighbours;

template <class T>
struct Neighbours<T, 1> {
  static __device__ __forceinline__ void load(const T* from, Compute<T> (&to)[1]) {
    to[0] = widen(dflkern::load(from));
  }
  static __device__ __forceinline__ void store(T* to, const Compute<T> (&from)[1]) {
    *to = narrow<T>(from[0]);
  }
};

template <class T>
struct Neighbours<T, 2> {
  using Pair = Packed<T, 2 * sizeof(T)>;
  using Word = typename Pair::Word;
  static __device__ __forceinline__ void load(const T* from, Compute<T> (&to)[2]) {
    const Pair pair(__ldg(reinterpret_cast<const Word*>(from)));
    to[0] = widen(pair.element[0]);
    to[1] = widen(pair.element[1]);
  }
  static __device__ __forceinline__ void store(T* to, const Compute<T> (&from)[2]) {
    Pair pair;
    pair.element[0] = narrow<T>(from[0]);
    pair.element[1] = narrow<T>(from[1]);
    // An intrinsic, as the compiler makes two stores of an assignment
    __stwb(reinterpret_cast<Word*>(to), pair.word);
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
__global__ void __launch_bounds__(kThreads)
    columns_forward(const T* __restrict__ logits, const Compute<T>* __restrict__ target,
                    const Compute<T>* __restrict__ project, Compute<T>* __restrict__ loss,
                    Compute<T>* __restrict__ position, Compute<T> bound, int64_t n,
                    int64_t bin_stride, int64_t axis_stride, int64_t middle_stride,
                    int64_t outer_stride, int64_t axis_output_stride, int64_t middle_output_stride,
                    int64_t outer_output_stride) {
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
__global__ void __launch_bounds__(kThreads)
    columns_backward(const T* __restrict__ logits, const Compute<T>* __restrict__ target,
                     const Compute<T>* __restrict__ project,
                     const Compute<T>* __restrict__ grad_loss,
                     const Compute<T>* __restrict__ grad_position, T* __restrict__ grad_logits,
                     Compute<T> bound, int64_t n, int64_t bin_stride, int64_t axis_stride,
                     int64_t middle_stride, int64_t outer_stride, int64_t axis_output_stride,
                     int64_t middle_output_stride, int64_t outer_output_stride,
                     int64_t grad_bin_stride, int64_t axis_grad_stride, int64_t middle_grad_stride,
                     int64_t outer_grad_stride) {
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

}  // namespace dflkern
