// Distributions with any number of bins, any strides, any dtype: a thread keeps its distribution in
// shared memory, in the compute type.
//
// rows     bins of stride 1: the block copies its rows together, 2^lanes_log2 threads a row
// columns  any strides: every thread copies its own distribution
//
// The block is as small as shared memory demands; `rows` threads of it own a distribution.

#include "distribution.cuh"

namespace dflkern {

enum class Layout { rows, columns };

// A distribution in shared memory, with 0 <= k < bins at begin[k * stride].
template <class F>
struct SharedRow {
  F* begin;
  int bins, stride;
  __device__ __forceinline__ int size() const { return bins; }
  __device__ __forceinline__ F get(int k) const { return begin[k * stride]; }
  __device__ __forceinline__ void set(int k, F value) const { begin[k * stride] = value; }
};

// The block's distributions in shared memory, and its threads' part in copying them.
template <class F, Layout layout>
struct Block {
  F* stage;
  int bins, rows, live, lanes_log2;

  // An odd stride keeps the threads of a warp on banks of their own.
  __device__ __forceinline__ int row_stride() const {
    return layout == Layout::rows ? bins | 1 : 1;
  }
  __device__ __forceinline__ int bin_stride() const { return layout == Layout::rows ? 1 : rows; }
  __device__ __forceinline__ SharedRow<F> row(int i) const {
    return {stage + i * row_stride(), bins, bin_stride()};
  }

  // Calls move(slot in shared memory, offset in global memory) for every element that this thread
  // copies, given the strides in global memory.
  template <class Move>
  __device__ __forceinline__ void each(int64_t axis_stride, int64_t bin_step, Move move) const {
    const int thread = threadIdx.x;
    if (layout == Layout::columns) {
      if (thread >= live) return;
      F* slot = stage + thread;
      int64_t offset = thread * axis_stride;
#pragma unroll 4
      for (int k = 0; k < bins; ++k, slot += rows, offset += bin_step) move(slot, offset);
    } else {
      const int lanes = 1 << lanes_log2, step = blockDim.x >> lanes_log2;
      const int first = thread >> lanes_log2;
      for (int k = thread & (lanes - 1); k < bins; k += lanes) {
        F* slot = stage + first * row_stride() + k;
        int64_t offset = first * axis_stride + k;
#pragma unroll 4
        for (int i = first; i < live; i += step) {
          move(slot, offset);
          slot += step * row_stride();
          offset += step * axis_stride;
        }
      }
    }
  }
};

template <class F, Layout layout>
__device__ __forceinline__ Block<F, layout> make_block(int64_t n, int64_t bins, int64_t rows,
                                                       int64_t lanes_log2) {
  extern __shared__ double shared[];  // double, for its alignment
  const int64_t left = n - blockIdx.x * rows;
  return {reinterpret_cast<F*>(shared), static_cast<int>(bins), static_cast<int>(rows),
          static_cast<int>(left < rows ? left : rows), static_cast<int>(lanes_log2)};
}

template <class T, Layout layout>
__global__ void __launch_bounds__(kThreads)
    general_forward(const T* __restrict__ logits, const Compute<T>* __restrict__ target,
                    const Compute<T>* __restrict__ project, Compute<T>* __restrict__ loss,
                    Compute<T>* __restrict__ position, Compute<T> bound, int64_t bins, int64_t rows,
                    int64_t lanes_log2, int64_t n, int64_t bin_stride, int64_t axis_stride,
                    int64_t middle_stride, int64_t outer_stride, int64_t axis_output_stride,
                    int64_t middle_output_stride, int64_t outer_output_stride) {
  using F = Compute<T>;
  const auto block = make_block<F, layout>(n, bins, rows, lanes_log2);
  const int thread = threadIdx.x;
  const int64_t first = blockIdx.x * rows;
  const T* source =
      logits + first * axis_stride + blockIdx.y * middle_stride + blockIdx.z * outer_stride;
  block.each(axis_stride, bin_stride,
             [&](F* slot, int64_t offset) { *slot = widen(load(source + offset)); });
  if (layout == Layout::rows) __syncthreads();
  if (thread >= block.live) return;
  const int64_t place = (first + thread) * axis_output_stride + blockIdx.y * middle_output_stride +
                        blockIdx.z * outer_output_stride;
  auto row = block.row(thread);
  const auto softmax = exponentiate<false>(row, project, position != nullptr, [](int, F) {});
  if (target != nullptr) {
    const auto y = find_bins(__ldg(target + place), bins_of(block.bins, project, bound));
    const int left = static_cast<int>(y.left);
    loss[place] = loss_of(softmax, y, shifted(row.get(left), softmax.largest),
                          shifted(row.get(left + 1), softmax.largest));
  }
  if (position != nullptr) position[place] = expected(softmax);
}

template <class T, Layout layout>
__global__ void __launch_bounds__(kThreads)
    general_backward(const T* __restrict__ logits, const Compute<T>* __restrict__ target,
                     const Compute<T>* __restrict__ project,
                     const Compute<T>* __restrict__ grad_loss,
                     const Compute<T>* __restrict__ grad_position, T* __restrict__ grad_logits,
                     Compute<T> bound, int64_t bins, int64_t rows, int64_t lanes_log2, int64_t n,
                     int64_t bin_stride, int64_t axis_stride, int64_t middle_stride,
                     int64_t outer_stride, int64_t axis_output_stride, int64_t middle_output_stride,
                     int64_t outer_output_stride, int64_t grad_bin_stride, int64_t axis_grad_stride,
                     int64_t middle_grad_stride, int64_t outer_grad_stride) {
  using F = Compute<T>;
  const auto block = make_block<F, layout>(n, bins, rows, lanes_log2);
  const int thread = threadIdx.x;
  const int64_t first = blockIdx.x * rows;
  const T* source =
      logits + first * axis_stride + blockIdx.y * middle_stride + blockIdx.z * outer_stride;
  block.each(axis_stride, bin_stride,
             [&](F* slot, int64_t offset) { *slot = widen(load(source + offset)); });
  if (layout == Layout::rows) __syncthreads();
  if (thread < block.live) {
    const int64_t place = (first + thread) * axis_output_stride +
                          blockIdx.y * middle_output_stride + blockIdx.z * outer_output_stride;
    auto row = block.row(thread);
    const auto softmax = exponentiate<true>(row, project, grad_position != nullptr, [](int, F) {});
    TwoBins<F> y{};
    F by_loss = 0, by_position = 0;
    if (target != nullptr) {
      y = find_bins(__ldg(target + place), bins_of(block.bins, project, bound));
      by_loss = __ldg(grad_loss + place);
    }
    if (grad_position != nullptr) by_position = __ldg(grad_position + place);
    const auto slope =
        slope_of(softmax, by_loss, by_position, y.right_weight, grad_position != nullptr);
    const int left = static_cast<int>(y.left);
    F number = 0;
    for (int k = 0; k < block.bins; ++k, number += 1) {
      F taken = 0;
      if (k == left) taken = by_loss * y.left_weight;
      if (k == left + 1) taken = by_loss * y.right_weight;
      row.set(k, slope.gradient(row.get(k), position_of(k, number, project), taken));
    }
  }
  if (layout == Layout::rows) __syncthreads();
  T* destination = grad_logits + first * axis_grad_stride + blockIdx.y * middle_grad_stride +
                   blockIdx.z * outer_grad_stride;
  block.each(axis_grad_stride, grad_bin_stride,
             [&](F* slot, int64_t offset) { destination[offset] = narrow<T>(*slot); });
}

}  // namespace dflkern
