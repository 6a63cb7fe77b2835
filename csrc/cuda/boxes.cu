// Boxes, with logits of any strides: a thread owns an anchor and takes its four sides one after the
// other. The grid is (blocks of anchors, images). Kernels for 8, 16, 17 and 33 bins keep a side in
// registers; those for any number (0 in their name) read it anew for every pass.
//
// box_loss needs two launches: each block writes its sums, and one block adds those up in a fixed
// order.

#include "boxes.cuh"
#include "common/iou.h"

namespace dflkern {

constexpr int kSides = 4;

template <class F>
struct Anchor {
  F x, y;
  // The wanted distance of a side.
  __device__ __forceinline__ F to(int side, F edge) const {
    const F point = side % 2 ? y : x;
    return side < 2 ? point - edge : edge - point;
  }
};

template <class F>
__device__ __forceinline__ Anchor<F> anchor_at(const F* points, int64_t anchor) {
  return {__ldg(points + 2 * anchor), __ldg(points + 2 * anchor + 1)};
}

template <class F>
__device__ __forceinline__ Box<F> box_at(const F* boxes, int64_t index) {
  const F* at = boxes + kSides * index;
  return {__ldg(at), __ldg(at + 1), __ldg(at + 2), __ldg(at + 3)};
}

template <class F>
__device__ __forceinline__ Box<F> around(const Anchor<F>& anchor, const F (&distance)[kSides]) {
  return {anchor.x - distance[0], anchor.y - distance[1], anchor.x + distance[2],
          anchor.y + distance[3]};
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    boxes_decode_forward(const T* __restrict__ logits, const Compute<T>* __restrict__ anchor_points,
                         const Compute<T>* __restrict__ stride,
                         const Compute<T>* __restrict__ project, Compute<T>* __restrict__ boxes,
                         Compute<T> bound, int64_t n, int64_t bins, int64_t granules,
                         int64_t batch_stride, int64_t anchor_stride, int64_t side_stride,
                         int64_t bin_stride, int64_t cxcywh, int64_t box_batch_stride,
                         int64_t box_anchor_stride, int64_t box_side_stride) {
  using F = Compute<T>;
  const int64_t anchor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (anchor >= n) return;
  const SideStrides at{static_cast<int>(bins), bin_stride, side_stride, granules != 0};
  const auto all = bins_of(K ? K : at.bins, project, bound);
  logits += blockIdx.y * batch_stride + anchor * anchor_stride;
  boxes += blockIdx.y * box_batch_stride + anchor * box_anchor_stride;
  F distance[kSides];
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    distance[s] = measure_side<T, K, false>(logits + s * at.side, at, all, F(0)).expected;
  }
  Box<F> box = around(anchor_at(anchor_points, anchor), distance);
  if (cxcywh) {
    box = {(box.x1 + box.x2) * F(0.5), (box.y1 + box.y2) * F(0.5), box.x2 - box.x1,
           box.y2 - box.y1};
  }
  const F scale = stride ? __ldg(stride + anchor) : F(1);
  boxes[0] = box.x1 * scale;
  boxes[box_side_stride] = box.y1 * scale;
  boxes[2 * box_side_stride] = box.x2 * scale;
  boxes[3 * box_side_stride] = box.y2 * scale;
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    boxes_decode_backward(const T* __restrict__ logits, const Compute<T>* __restrict__ stride,
                          const Compute<T>* __restrict__ project,
                          const Compute<T>* __restrict__ grad_boxes, T* __restrict__ grad_logits,
                          Compute<T> bound, int64_t n, int64_t bins, int64_t granules,
                          int64_t batch_stride, int64_t anchor_stride, int64_t side_stride,
                          int64_t bin_stride, int64_t cxcywh, int64_t box_batch_stride,
                          int64_t box_anchor_stride, int64_t box_side_stride,
                          int64_t grad_batch_stride, int64_t grad_anchor_stride,
                          int64_t grad_side_stride, int64_t grad_bin_stride) {
  using F = Compute<T>;
  const int64_t anchor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (anchor >= n) return;
  const SideStrides at{static_cast<int>(bins), bin_stride, side_stride, granules != 0};
  const SideStrides to{at.bins, grad_bin_stride, grad_side_stride, granules != 0};
  const auto all = bins_of(K ? K : at.bins, project, bound);
  logits += blockIdx.y * batch_stride + anchor * anchor_stride;
  grad_logits += blockIdx.y * grad_batch_stride + anchor * grad_anchor_stride;
  grad_boxes += blockIdx.y * box_batch_stride + anchor * box_anchor_stride;
  const F scale = stride ? __ldg(stride + anchor) : F(1);
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    const F first = __ldg(grad_boxes + s % 2 * box_side_stride) * scale;
    const F second = __ldg(grad_boxes + (s % 2 + 2) * box_side_stride) * scale;
    // Centre = anchor + (rb - lt) / 2, size = lt + rb
    F by_position = s < 2 ? -first : second;
    if (cxcywh) by_position = s < 2 ? second - first * F(0.5) : second + first * F(0.5);
    write_side<T, K, false>(logits + s * at.side, at, grad_logits + s * to.side, to, all, true,
                            F(0), F(0), by_position);
  }
}

template <class F, class W>
__device__ __forceinline__ F sum_of(const void* weight, int64_t offset, int64_t classes,
                                    int64_t stride) {
  const W* from = static_cast<const W*>(weight) + offset;
  F sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += static_cast<F>(widen(load(from + c * stride)));
  return sum;
}

// The weight of an anchor: the sum of its class scores, whose type is a number of ELEMENTS in
// dflkern/kernels/cuda_box_plans.py; 0 in the background, where nothing is read.
template <class F>
__device__ __forceinline__ F weight_at(const uint8_t* foreground, const void* weight, int64_t type,
                                       int64_t index, int64_t offset, int64_t classes,
                                       int64_t stride) {
  if (foreground && !__ldg(foreground + index)) return F(0);
  if (type == 0) return sum_of<F, fp16>(weight, offset, classes, stride);
  if (type == 1) return sum_of<F, bf16>(weight, offset, classes, stride);
  if (type == 2) return sum_of<F, fp32>(weight, offset, classes, stride);
  return sum_of<F, fp64>(weight, offset, classes, stride);
}

template <class F>
__device__ __forceinline__ F iou_of(const Box<F>& a, const Box<F>& b, int64_t kind) {
  switch (static_cast<Iou>(kind)) {
    case Iou::kIou:
      return paired_iou<Iou::kIou>(a, b);
    case Iou::kGiou:
      return paired_iou<Iou::kGiou>(a, b);
    case Iou::kDiou:
      return paired_iou<Iou::kDiou>(a, b);
    default:
      return paired_iou<Iou::kCiou>(a, b);
  }
}

template <class F>
__device__ __forceinline__ Box<F> iou_gradient_of(const Box<F>& a, const Box<F>& b, int64_t kind) {
  switch (static_cast<Iou>(kind)) {
    case Iou::kIou:
      return paired_iou_gradient<Iou::kIou>(a, b);
    case Iou::kGiou:
      return paired_iou_gradient<Iou::kGiou>(a, b);
    case Iou::kDiou:
      return paired_iou_gradient<Iou::kDiou>(a, b);
    default:
      return paired_iou_gradient<Iou::kCiou>(a, b);
  }
}

// The sum over a block's threads, in an order that is always the same, in the first of them.
template <class F>
__device__ __forceinline__ F sum_of_block(F value) {
  __shared__ F warps[kThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, distance);
  }
  __syncthreads();  // what a sum before this one read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  F sum = warps[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) sum += warps[w];
  return sum;
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    boxes_loss_forward(const T* __restrict__ logits, const Compute<T>* __restrict__ anchor_points,
                       const Compute<T>* __restrict__ target_boxes, const void* __restrict__ weight,
                       const uint8_t* __restrict__ foreground,
                       const Compute<T>* __restrict__ project, Compute<T>* __restrict__ partials,
                       Compute<T>* __restrict__ anchor_weight, Compute<T> bound, int64_t n,
                       int64_t bins, int64_t granules, int64_t batch_stride, int64_t anchor_stride,
                       int64_t side_stride, int64_t bin_stride, int64_t iou, int64_t weight_type,
                       int64_t classes, int64_t weight_batch_stride, int64_t weight_anchor_stride,
                       int64_t weight_class_stride, int64_t programs) {
  using F = Compute<T>;
  const int64_t anchor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t index = blockIdx.y * n + anchor;
  F weight_here = 0, by_iou = 0, by_dfl = 0;
  if (anchor < n) {
    weight_here = weight_at<F>(foreground, weight, weight_type, index,
                               blockIdx.y * weight_batch_stride + anchor * weight_anchor_stride,
                               classes, weight_class_stride);
    if (anchor_weight) anchor_weight[index] = weight_here;
  }
  if (weight_here != 0) {
    const SideStrides at{static_cast<int>(bins), bin_stride, side_stride, granules != 0};
    const auto all = bins_of(K ? K : at.bins, project, bound);
    const Anchor<F> point = anchor_at(anchor_points, anchor);
    const Box<F> wanted = box_at(target_boxes, index);
    const F edges[kSides] = {wanted.x1, wanted.y1, wanted.x2, wanted.y2};
    logits += blockIdx.y * batch_stride + anchor * anchor_stride;
    F distance[kSides], dfl = 0;
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      const auto side =
          measure_side<T, K, true>(logits + s * at.side, at, all, point.to(s, edges[s]));
      distance[s] = side.expected;
      dfl += side.loss;
    }
    by_iou = weight_here * (1 - iou_of(around(point, distance), wanted, iou));
    by_dfl = weight_here * (dfl * F(0.25));
  }
  const F iou_sum = sum_of_block(by_iou), dfl_sum = sum_of_block(by_dfl);
  const F count = sum_of_block(weight_here != 0 ? F(1) : F(0));
  if (threadIdx.x > 0) return;
  partials += blockIdx.y * gridDim.x + blockIdx.x;
  partials[0] = iou_sum;
  partials[programs] = dfl_sum;
  partials[2 * programs] = count;
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    boxes_loss_sums(const F* __restrict__ partials, const F* __restrict__ normalizer,
                    F* __restrict__ iou_loss, F* __restrict__ dfl_loss, F bound, int64_t programs) {
  F sums[3] = {};
  for (int64_t i = threadIdx.x; i < programs; i += kThreads) {
#pragma unroll
    for (int s = 0; s < 3; ++s) sums[s] += __ldg(partials + s * programs + i);
  }
  const F iou = sum_of_block(sums[0]), dfl = sum_of_block(sums[1]), count = sum_of_block(sums[2]);
  if (threadIdx.x > 0) return;
  const F scale = __ldg(normalizer);
  *iou_loss = count > 0 ? iou / scale : F(0);
  *dfl_loss = count > 0 ? dfl / scale : F(0);
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) boxes_loss_backward(
    const T* __restrict__ logits, const Compute<T>* __restrict__ anchor_points,
    const Compute<T>* __restrict__ target_boxes, const void* __restrict__ weight,
    const uint8_t* __restrict__ foreground, const Compute<T>* __restrict__ project,
    const Compute<T>* __restrict__ normalizer, const Compute<T>* __restrict__ grad_iou,
    const Compute<T>* __restrict__ grad_dfl, T* __restrict__ grad_logits, Compute<T> bound,
    int64_t n, int64_t bins, int64_t granules, int64_t batch_stride, int64_t anchor_stride,
    int64_t side_stride, int64_t bin_stride, int64_t iou, int64_t weight_type, int64_t classes,
    int64_t weight_batch_stride, int64_t weight_anchor_stride, int64_t weight_class_stride,
    int64_t grad_batch_stride, int64_t grad_anchor_stride, int64_t grad_side_stride,
    int64_t grad_bin_stride) {
  using F = Compute<T>;
  const int64_t anchor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (anchor >= n) return;
  const int64_t index = blockIdx.y * n + anchor;
  const SideStrides at{static_cast<int>(bins), bin_stride, side_stride, granules != 0};
  const SideStrides to{at.bins, grad_bin_stride, grad_side_stride, granules != 0};
  const F weight_here =
      weight_at<F>(foreground, weight, weight_type, index,
                   blockIdx.y * weight_batch_stride + anchor * weight_anchor_stride, classes,
                   weight_class_stride);
  const bool active = weight_here != 0;
  const auto all = bins_of(K ? K : at.bins, project, bound);
  logits += blockIdx.y * batch_stride + anchor * anchor_stride;
  grad_logits += blockIdx.y * grad_batch_stride + anchor * grad_anchor_stride;
  F targets[kSides] = {}, by_position[kSides] = {}, by_loss = 0;
  if (active) {
    const Anchor<F> point = anchor_at(anchor_points, anchor);
    const Box<F> wanted = box_at(target_boxes, index);
    const F edges[kSides] = {wanted.x1, wanted.y1, wanted.x2, wanted.y2};
    F distance[kSides];
#pragma unroll
    for (int s = 0; s < kSides; ++s) {
      targets[s] = point.to(s, edges[s]);
      distance[s] = measure_side<T, K, false>(logits + s * at.side, at, all, F(0)).expected;
    }
    const F scale = weight_here / __ldg(normalizer);
    const F to_iou = -__ldg(grad_iou) * scale;
    by_loss = __ldg(grad_dfl) * scale * F(0.25);
    const Box<F> g = iou_gradient_of(around(point, distance), wanted, iou);
    by_position[0] = -to_iou * g.x1;
    by_position[1] = -to_iou * g.y1;
    by_position[2] = to_iou * g.x2;
    by_position[3] = to_iou * g.y2;
  }
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    write_side<T, K, true>(logits + s * at.side, at, grad_logits + s * to.side, to, all, active,
                           targets[s], by_loss, by_position[s]);
  }
}

}  // namespace dflkern
