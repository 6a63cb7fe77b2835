// The parameters of the kernels on boxes, in the order of dflkern/kernels/cuda_box_plans.py.

#pragma once

#include "entries.cuh"

// Lengths and strides of the logits. `bins` counts where the kernel's name says 0.
#define DFL_BOX_SIDES                                                                           \
  int64_t n, int64_t bins, int64_t granules, int64_t batch_stride, int64_t anchor_stride,       \
      int64_t side_stride, int64_t bin_stride
#define DFL_BOX_SIDES_VALUES \
  n, bins, granules, batch_stride, anchor_stride, side_stride, bin_stride
#define DFL_BOX_GRADS                                                                           \
  int64_t grad_batch_stride, int64_t grad_anchor_stride, int64_t grad_side_stride,              \
      int64_t grad_bin_stride
#define DFL_BOX_GRADS_VALUES \
  grad_batch_stride, grad_anchor_stride, grad_side_stride, grad_bin_stride
#define DFL_BOX_STRIDES \
  int64_t cxcywh, int64_t box_batch_stride, int64_t box_anchor_stride, int64_t box_side_stride
#define DFL_BOX_STRIDES_VALUES cxcywh, box_batch_stride, box_anchor_stride, box_side_stride
#define DFL_BOX_WEIGHT                                                                          \
  int64_t iou, int64_t weight_type, int64_t classes, int64_t weight_batch_stride,               \
      int64_t weight_anchor_stride, int64_t weight_class_stride
#define DFL_BOX_WEIGHT_VALUES                                                                   \
  iou, weight_type, classes, weight_batch_stride, weight_anchor_stride, weight_class_stride

#define DFL_DECODE_FORWARD(T)                                                                   \
  const T *__restrict__ logits, const Compute<T>*__restrict__ points,                           \
      const Compute<T>*__restrict__ stride, const Compute<T>*__restrict__ project,              \
      Compute<T>*__restrict__ boxes, Compute<T> bound, DFL_BOX_SIDES, DFL_BOX_STRIDES
#define DFL_DECODE_FORWARD_VALUES \
  logits, points, stride, project, boxes, bound, DFL_BOX_SIDES_VALUES, DFL_BOX_STRIDES_VALUES
#define DFL_DECODE_BACKWARD(T)                                                                  \
  const T *__restrict__ logits, const Compute<T>*__restrict__ stride,                           \
      const Compute<T>*__restrict__ project, const Compute<T>*__restrict__ grad_boxes,          \
      T*__restrict__ grad_logits, Compute<T> bound, DFL_BOX_SIDES, DFL_BOX_STRIDES, DFL_BOX_GRADS
#define DFL_DECODE_BACKWARD_VALUES                                                              \
  logits, stride, project, grad_boxes, grad_logits, bound, DFL_BOX_SIDES_VALUES,                \
      DFL_BOX_STRIDES_VALUES, DFL_BOX_GRADS_VALUES
#define DFL_LOSS_INPUTS(T)                                                                      \
  const T *__restrict__ logits, const Compute<T>*__restrict__ points,                           \
      const Compute<T>*__restrict__ target_boxes, const void*__restrict__ weight,               \
      const uint8_t*__restrict__ foreground, const Compute<T>*__restrict__ project
#define DFL_LOSS_INPUTS_VALUES logits, points, target_boxes, weight, foreground, project
#define DFL_LOSS_FORWARD(T)                                                                     \
  DFL_LOSS_INPUTS(T), Compute<T>*__restrict__ partials, Compute<T>*__restrict__ anchor_weight,  \
      Compute<T> bound, DFL_BOX_SIDES, DFL_BOX_WEIGHT, int64_t programs
#define DFL_LOSS_FORWARD_VALUES \
  DFL_LOSS_INPUTS_VALUES, partials, anchor_weight, bound, DFL_BOX_SIDES_VALUES,                 \
      DFL_BOX_WEIGHT_VALUES, programs
#define DFL_LOSS_BACKWARD(T)                                                                    \
  DFL_LOSS_INPUTS(T), const Compute<T>*__restrict__ normalizer,                                 \
      const Compute<T>*__restrict__ grad_iou, const Compute<T>*__restrict__ grad_dfl,           \
      T*__restrict__ grad_logits, Compute<T> bound, DFL_BOX_SIDES, DFL_BOX_WEIGHT, DFL_BOX_GRADS
#define DFL_LOSS_BACKWARD_VALUES                                                                \
  DFL_LOSS_INPUTS_VALUES, normalizer, grad_iou, grad_dfl, grad_logits, bound,                   \
      DFL_BOX_SIDES_VALUES, DFL_BOX_WEIGHT_VALUES, DFL_BOX_GRADS_VALUES
constexpr int kDecodeForwardNumbers = 7 + 4, kDecodeBackwardNumbers = 7 + 4 + 4;
constexpr int kLossForwardNumbers = 7 + 6 + 1, kLossBackwardNumbers = 7 + 6 + 4;

// X(bins) for every kernel; doubles have the one for any number of bins.
#define DFL_NARROW_fp16 1
#define DFL_NARROW_bf16 1
#define DFL_NARROW_fp32 1
#define DFL_NARROW_fp64 0
#if DFL_JOIN(DFL_NARROW_, DFL_ELEMENT)
#define DFL_EACH_BOX_BINS(X) X(0) X(8) X(16) X(17) X(33)
#else
#define DFL_EACH_BOX_BINS(X) X(0)
#endif
