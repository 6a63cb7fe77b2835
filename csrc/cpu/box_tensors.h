// Arguments of the operators on boxes, as the kernels take them.

#pragma once

#include "boxes.h"
#include "tensors.h"

namespace dflkern {

inline BoxLayout layout_of(const Tensor& logits, int64_t dim) {
  const auto sizes = logits.sizes();
  STD_TORCH_CHECK(
      sizes.size() == 4 && (dim == 2 || dim == 3) && sizes[dim - 1] == kSides,
      "dflkern: boxes need logits (B, A, 4, bins) with dim 3 or (B, 4, bins, A) with 2");
  return {sizes[0], sizes[dim == 3 ? 1 : 3], dim == 3};
}

// A tensor of `count` numbers, contiguous in the type of the arithmetic.
inline Tensor numbers(const char* name, const Tensor& tensor, int64_t count, const Call& call) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == count, "dflkern: ", name, " has ",
                  tensor.numel(), " values, not ", count, ", or is not on the CPU");
  return contiguous_as(tensor, compute_type(call));
}

inline double number(const char* name, const Tensor& tensor, const Call& call) {
  const Tensor kept = numbers(name, tensor, 1, call);
  return call.storage == Storage::kDouble ? *static_cast<const double*>(kept.const_data_ptr())
                                          : *static_cast<const float*>(kept.const_data_ptr());
}

// Calls function with a number in the type of the arithmetic.
template <class Function>
void with_compute(const Call& call, Function function) {
  if (call.storage == Storage::kDouble) return function(double());
  function(float());
}

inline MaybeTensor stride_of(const MaybeTensor& stride, const BoxLayout& layout, const Call& call) {
  if (!stride) return {};
  return numbers("stride", *stride, layout.anchors, call);
}
inline const void* data_of(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace dflkern
