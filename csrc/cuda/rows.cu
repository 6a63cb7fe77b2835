// Distributions with 8, 16, 17 or 33 bins that are one contiguous range of memory, row after row,
// from a multiple of 16 bytes on.
//
// A block copies its 128 rows through shared memory in 16-byte granules, and each thread then owns
// a row: coalesced traffic without shuffles. The two bins of a target are looked up in shared
// memory instead of being searched among registers.

#include "distribution.cuh"

namespace dflkern {

constexpr int kGranule = 16;  // bytes; 8 of them cover the 32 banks once

// Where the element (row, bin) of a block lies in shared memory. Rows of whole granules are read by
// granules, and a granule of padding after every 8 keeps them off each other's banks; odd rows are
// read by elements and need none.
template <class T, int K>
struct Stage {
  static constexpr int kLanes = kGranule / sizeof(T);
  static constexpr bool kWhole = K % kLanes == 0;
  static constexpr int kGranulesPerRow = K / kLanes;
  static constexpr int kGranules = kThreads * K / kLanes;
  static constexpr int kPadded = kGranules + (kWhole ? kGranules / 8 : 0);
  static_assert(!kWhole || 8 % kGranulesPerRow == 0, "a row may not lie across padding");

  static __device__ __forceinline__ int granule(int g) { return kWhole ? g + g / 8 : g; }
  static __device__ __forceinline__ int element(int i) {
    return kWhole ? i + i / (8 * kLanes) * kLanes : i;
  }
};

// Calls copy(granule) for every whole granule of the rows that falls to this thread, and
// rest(element) for what a last block of odd rows leaves.
template <class T, int K, class Copy, class Rest>
__device__ __forceinline__ void share(int rows, Copy copy, Rest rest) {
  using S = Stage<T, K>;
  const int thread = threadIdx.x, granules = rows * K / S::kLanes;
#pragma unroll
  for (int g = 0; g < S::kGranules; g += kThreads) {
    if (g + thread < granules) copy(g + thread);
  }
  if (!S::kWhole && granules * S::kLanes + thread < rows * K) rest(granules * S::kLanes + thread);
}

template <class T, int K>
__device__ __forceinline__ void copy_in(uint4* stage, const T* source, int rows) {
  share<T, K>(
      rows,
      [&](int g) {
        stage[Stage<T, K>::granule(g)] = __ldg(reinterpret_cast<const uint4*>(source) + g);
      },
      [&](int i) { reinterpret_cast<T*>(stage)[i] = load(source + i); });
}

template <class T, int K>
__device__ __forceinline__ void copy_out(T* destination, const uint4* stage, int rows) {
  share<T, K>(
      rows,
      [&](int g) { reinterpret_cast<uint4*>(destination)[g] = stage[Stage<T, K>::granule(g)]; },
      [&](int i) { destination[i] = reinterpret_cast<const T*>(stage)[i]; });
}

template <class T, int K>
__device__ __forceinline__ RegisterRow<Compute<T>, K> read(const T* row) {
  using S = Stage<T, K>;
  RegisterRow<Compute<T>, K> result;
  if constexpr (S::kWhole) {
#pragma unroll
    for (int g = 0; g < S::kGranulesPerRow; ++g) {
      const Packed<T, kGranule> granule(reinterpret_cast<const uint4*>(row)[g]);
#pragma unroll
      for (int i = 0; i < S::kLanes; ++i) result.bin[g * S::kLanes + i] = widen(granule.element[i]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) result.bin[k] = widen(row[k]);
  }
  return result;
}

template <class T, int K>
__device__ __forceinline__ void write(T* row, const RegisterRow<Compute<T>, K>& values) {
  using S = Stage<T, K>;
  if constexpr (S::kWhole) {
#pragma unroll
    for (int g = 0; g < S::kGranulesPerRow; ++g) {
      Packed<T, kGranule> granule;
#pragma unroll
      for (int i = 0; i < S::kLanes; ++i) {
        granule.element[i] = narrow<T>(values.bin[g * S::kLanes + i]);
      }
      reinterpret_cast<uint4*>(row)[g] = granule.word;
    }
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) row[k] = narrow<T>(values.bin[k]);
  }
}

template <class T, int K, What what>
__global__ void __launch_bounds__(kThreads)
    rows_forward(const T* __restrict__ logits, const Compute<T>* __restrict__ target,
                 const Compute<T>* __restrict__ project, Compute<T>* __restrict__ loss,
                 Compute<T>* __restrict__ position, Compute<T> bound, int64_t n) {
  using F = Compute<T>;
  using S = Stage<T, K>;
  __shared__ uint4 stage[S::kPadded];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int rows = static_cast<int>(n - first < kThreads ? n - first : kThreads);
  const int thread = threadIdx.x;
  const bool live = thread < rows;
  const bool with_loss = wants_loss<what>(target), with_position = wants_position<what>(position);
  const F* positions = known<what>(project);
  F wanted = 0;
  if (with_loss && live) wanted = __ldg(target + first + thread);
  copy_in<T, K>(stage, logits + first * K, rows);
  __syncthreads();
  if (!live) return;
  const T* row = reinterpret_cast<const T*>(stage) + S::element(thread * K);
  auto bins = read<T, K>(row);
  const auto softmax = exponentiate<false>(bins, positions, with_position, [](int, F) {});
  if (with_loss) {
    const auto y = find_bins(wanted, bins_of(K, positions, bound));
    const T* left = row + static_cast<int>(y.left);
    loss[first + thread] = loss_of(softmax, y, shifted(widen(left[0]), softmax.largest),
                                   shifted(widen(left[1]), softmax.largest));
  }
  if (with_position) position[first + thread] = expected(softmax);
}

template <class T, int K, What what>
__global__ void __launch_bounds__(kThreads)
    rows_backward(const T* __restrict__ logits, const Compute<T>* __restrict__ target,
                  const Compute<T>* __restrict__ project, const Compute<T>* __restrict__ grad_loss,
                  const Compute<T>* __restrict__ grad_position, T* __restrict__ grad_logits,
                  Compute<T> bound, int64_t n) {
  using F = Compute<T>;
  using S = Stage<T, K>;
  __shared__ uint4 stage[S::kPadded];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int rows = static_cast<int>(n - first < kThreads ? n - first : kThreads);
  const int thread = threadIdx.x;
  const bool live = thread < rows;
  const bool with_loss = wants_loss<what>(target);
  const bool with_position = wants_position<what>(grad_position);
  const F* positions = known<what>(project);
  F wanted = 0, by_loss = 0, by_position = 0;
  if (with_loss && live) {
    wanted = __ldg(target + first + thread);
    by_loss = __ldg(grad_loss + first + thread);
  }
  if (with_position && live) by_position = __ldg(grad_position + first + thread);
  copy_in<T, K>(stage, logits + first * K, rows);
  __syncthreads();
  if (live) {
    T* row = reinterpret_cast<T*>(stage) + S::element(thread * K);
    auto bins = read<T, K>(row);
    const auto softmax = exponentiate<true>(bins, positions, with_position, [](int, F) {});
    TwoBins<F> y{};
    T* left = row;
    F left_e = 0, right_e = 0;
    if (with_loss) {
      y = find_bins(wanted, bins_of(K, positions, bound));
      left = row + static_cast<int>(y.left);
      left_e = Unit<F>::exp(shifted(widen(left[0]), softmax.largest));
      right_e = Unit<F>::exp(shifted(widen(left[1]), softmax.largest));
    }
    const auto slope = slope_of(softmax, by_loss, by_position, y.right_weight, with_position);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      bins.bin[k] = slope.gradient(bins.bin[k], position_of(k, F(k), positions), F(0));
    }
    write<T, K>(row, bins);
    if (with_loss) {
      const int k = static_cast<int>(y.left);
      left[0] = narrow<T>(
          slope.gradient(left_e, position_of(k, y.left, positions), by_loss * y.left_weight));
      left[1] = narrow<T>(slope.gradient(right_e, position_of(k + 1, y.left + 1, positions),
                                         by_loss * y.right_weight));
    }
  }
  __syncthreads();
  copy_out<T, K>(grad_logits + first * K, stage, rows);
}

}  // namespace dflkern
