// The weight, the reduction and the normalizer of dfl_loss, around kernels that compute a loss for
// each distribution, and around those of the gradient.

#pragma once

#include <numeric>
#include <string>
#include <vector>

#include "reduce.h"
#include "tensors.h"

namespace dflkern {

// Calls function(F(), ...) with F the type of the arithmetic.
template <class Function>
void in_compute_type(const Tensor& logits, const Function& function) {
  return logits.scalar_type() == ScalarType::Double ? function(double()) : function(float());
}

// The weight of each distribution, which broadcasts to the target's shape; a copy if its strides or
// its type ask for one.
template <class F>
Weights<F> weights_of(MaybeTensor& weight, const OutputShape& shape, int64_t count) {
  if (!weight) return {nullptr, 0};
  const ScalarType type = sizeof(F) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t dims = weight->dim();
  STD_TORCH_CHECK(weight->is_cpu() && dims <= shape.dims, "dflkern: the weight does not broadcast");
  weight = contiguous_as(*weight, type);
  if (weight->numel() == 1) return {static_cast<const F*>(weight->const_data_ptr()), 0};
  if (weight->numel() == count) return {static_cast<const F*>(weight->const_data_ptr()), 1};
  int64_t sizes[kMaxAxes], strides[kMaxAxes], stride = 1;
  for (int64_t o = shape.dims - 1, w = dims - 1; o >= 0; --o, --w) {
    const int64_t size = w < 0 ? 1 : weight->size(w);
    STD_TORCH_CHECK(size == 1 || size == shape.sizes[o], "dflkern: the weight does not broadcast");
    sizes[o] = shape.sizes[o];
    strides[o] = size == 1 ? 0 : stride;
    stride *= size;
  }
  Tensor all = empty(shape.sizes, shape.strides, shape.dims, type);
  const F* from = static_cast<const F*>(weight->const_data_ptr());
  F* to = static_cast<F*>(all.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    int64_t offset = 0, rest = i;
    for (int64_t o = shape.dims - 1; o >= 0; --o) {
      offset += rest % sizes[o] * strides[o];
      rest /= sizes[o];
    }
    to[i] = from[offset];
  }
  weight = all;
  return {to, 1};
}

// How dfl_loss reduces the losses of a call: the side_mean of four neighbouring sides in its
// kernel, everything else from a loss for each distribution.
struct Reduction {
  enum { kNone, kSum, kMean, kSideMean } kind;
  double divisor = 1;  // of a sum
  Sides sides{1, 1};
  bool in_kernel = false;
};

Reduction reduction_of(const std::string& name, MaybeTensor& normalizer, const Tensor& logits,
                       const MaybeTensor& weight, int64_t dim) {
  if (name == "none") return {Reduction::kNone};
  const auto sizes = logits.sizes();
  int64_t count = 1;
  for (size_t a = 0; a < sizes.size(); ++a) count *= static_cast<int64_t>(a) == dim ? 1 : sizes[a];
  if (name == "mean") return {Reduction::kMean, static_cast<double>(std::max<int64_t>(count, 1))};
  if (name == "sum") {
    Reduction sum{Reduction::kSum};
    if (normalizer && count) {
      STD_TORCH_CHECK(normalizer->is_cpu() && normalizer->numel() == 1,
                      "dflkern: the normalizer is one number on the CPU");
      const Tensor number = contiguous_as(*normalizer, ScalarType::Double);
      sum.divisor = *static_cast<const double*>(number.const_data_ptr());
    }
    return sum;
  }
  STD_TORCH_CHECK(name == "side_mean" && dim > 0, "dflkern: there is no reduction ", name);
  Reduction mean{Reduction::kSideMean};
  mean.sides.sides = sizes[dim - 1];
  for (size_t a = dim + 1; a < sizes.size(); ++a) mean.sides.inner *= sizes[a];
  mean.in_kernel = !weight && mean.sides.inner == 1 && mean.sides.sides == kSides &&
                   dim == static_cast<int64_t>(sizes.size()) - 1;
  return mean;
}

// The shape of the means over the sides.
OutputShape without_sides(const OutputShape& shape, int64_t dim) {
  OutputShape result;
  for (int64_t o = 0; o < shape.dims; ++o) {
    if (o != dim - 1) result.sizes[result.dims++] = shape.sizes[o];
  }
  int64_t stride = 1;
  for (int64_t o = result.dims - 1; o >= 0; --o) {
    result.strides[o] = stride;
    stride *= std::max<int64_t>(result.sizes[o], 1);
  }
  return result;
}

template <class F>
Tensor reduced(const Tensor& losses, const Weights<F>& weight, const Reduction& reduction,
               const OutputShape& shape, int64_t dim) {
  const ScalarType type = losses.scalar_type();
  const F* loss = static_cast<const F*>(losses.const_data_ptr());
  const int64_t count = losses.numel();
  if (reduction.kind == Reduction::kNone) {
    Tensor result = empty(shape.sizes, shape.strides, shape.dims, type);
    F* to = static_cast<F*>(result.mutable_data_ptr());
    in_parallel(count, kStage, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = weight(loss[i], i);
    });
    return result;
  }
  if (reduction.kind == Reduction::kSideMean) {
    const OutputShape means = without_sides(shape, dim);
    Tensor result = empty(means.sizes, means.strides, means.dims, type);
    F* to = static_cast<F*>(result.mutable_data_ptr());
    in_parallel(result.numel(), kStage, [&](int64_t begin, int64_t end) {
      side_means(loss, weight, reduction.sides, begin, end, to);
    });
    return result;
  }
  const int64_t stages = (count + kStage - 1) / kStage;
  std::vector<double> sums(stages);
  in_parallel(stages, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[i] = weighted_sum(loss, weight, i * kStage, std::min(count, (i + 1) * kStage));
    }
  });
  Tensor result = empty(nullptr, nullptr, 0, type);
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0) / reduction.divisor;
  *static_cast<F*>(result.mutable_data_ptr()) = static_cast<F>(total);
  return result;
}

// The upstream gradient of each loss, or one for all, from that of the reduced and weighted ones.
template <class F>
Tensor spread_out(Tensor grad, const Weights<F>& weight, const Reduction& reduction,
                  const OutputShape& shape, int64_t count) {
  const ScalarType type = sizeof(F) == 8 ? ScalarType::Double : ScalarType::Float;
  grad = contiguous_as(grad, type);
  const F* from = static_cast<const F*>(grad.const_data_ptr());
  const bool scalar = reduction.kind == Reduction::kSum || reduction.kind == Reduction::kMean;
  const F one = scalar ? static_cast<F>(*from / reduction.divisor) : F(0);
  const bool same = scalar && weight.data == nullptr;
  Tensor result =
      same ? empty(nullptr, nullptr, 0, type) : empty(shape.sizes, shape.strides, shape.dims, type);
  F* to = static_cast<F*>(result.mutable_data_ptr());
  if (same) {
    *to = one;
    return result;
  }
  in_parallel(count, kStage, [&](int64_t begin, int64_t end) {
    if (reduction.kind == Reduction::kSideMean) {
      return side_gradients(from, 1, weight, reduction.sides, begin, end, to);
    }
    for (int64_t i = begin; i < end; ++i) to[i] = weight(scalar ? one : from[i], i);
  });
  return result;
}

}  // namespace dflkern
