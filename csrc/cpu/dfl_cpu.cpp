// The CPU operators on single distributions, without Python: _cpu_<name> computes what the function
// <name> of dflkern/reference does, for logits of any strides.

#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "reduce.h"
#include "tensors.h"

namespace dflkern {
namespace {

// A tensor of one value per distribution, or per mean, as the kernels read it. `kept` owns a copy
// if one is made: of other types, and of strides that are neither contiguous nor all 0, as after
// .sum().backward().
Values values_of(const char* name, Tensor& kept, const Call& call, bool mean = false) {
  const int64_t expected = mean ? call.count / kSides : call.count;
  const bool one = kept.numel() == 1 && kept.dim() == 0;
  STD_TORCH_CHECK(kept.is_cpu() && (one || kept.numel() == expected), "dflkern: ", name, " has ",
                  kept.numel(), " values for ", call.count, " distributions, or is not on the CPU");
  if (kept.scalar_type() != compute_type(call)) kept = torch::stable::to(kept, compute_type(call));
  if (one) return {kept.const_data_ptr(), 0, mean};
  if (kept.is_contiguous()) return {kept.const_data_ptr(), 1, mean};
  const auto strides = kept.strides();
  if (std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s == 0; })) {
    return {kept.const_data_ptr(), 0, mean};
  }
  kept = torch::stable::contiguous(kept);
  return {kept.const_data_ptr(), 1, mean};
}

// Each loss becomes the mean over the last axis of the outputs, the last but one of the logits.
void set_mean(Call& call, int64_t dim, OutputShape& output) {
  const bool sides_last = dim == output.dims && dim > 0 && output.sizes[dim - 1] == kSides;
  STD_TORCH_CHECK(sides_last, "dflkern: a mean over the sides needs logits of (..., ", kSides,
                  ", bins)");
  call.mean = true;
  --output.dims;
  for (int64_t o = 0; o < output.dims; ++o) output.strides[o] /= kSides;
}

struct Results {
  Tensor loss, position;
};

Results run_forward(Tensor logits, MaybeTensor target, MaybeTensor project, int64_t dim,
                    double margin, bool position, bool mean = false) {
  OutputShape shape;
  Call call = describe(logits, dim, margin, shape);
  if (mean) set_mean(call, dim, shape);
  set_project(call, project);
  Results results;
  if (target) {
    call.loss = true;
    call.target = values_of("target", *target, call);
    results.loss = shape.empty(call);
    call.loss_out = results.loss.mutable_data_ptr();
  }
  if (position) {
    call.position = true;
    results.position = shape.empty(call);
    call.position_out = results.position.mutable_data_ptr();
  }
  execute(call);
  return results;
}

Tensor run_backward(MaybeTensor grad_loss, MaybeTensor grad_position, Tensor logits,
                    MaybeTensor target, MaybeTensor project, int64_t dim, double margin,
                    bool mean = false) {
  OutputShape shape;
  Call call = describe(logits, dim, margin, shape);
  if (mean) set_mean(call, dim, shape);
  set_project(call, project);
  call.backward = true;
  if (grad_loss) {
    call.loss = true;
    call.grad_loss = values_of("grad_loss", *grad_loss, call, call.mean);
    call.target = values_of("target", *target, call);
  }
  if (grad_position) {
    call.position = true;
    call.grad_position = values_of("grad_position", *grad_position, call);
  }
  Tensor gradient = empty_gradient(logits);
  set_gradient(call, gradient, dim);
  execute(call);
  return gradient;
}

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
  Tensor result = same ? empty(nullptr, nullptr, 0, type)
                       : empty(shape.sizes, shape.strides, shape.dims, type);
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

Tensor dfl_loss(Tensor logits, Tensor target, MaybeTensor weight, MaybeTensor normalizer,
                MaybeTensor project, int64_t dim, double margin, std::string name) {
  const Reduction reduction = reduction_of(name, normalizer, logits, weight, dim);
  Tensor loss =
      run_forward(logits, target, project, dim, margin, false, reduction.in_kernel).loss;
  if (reduction.in_kernel || (reduction.kind == Reduction::kNone && !weight)) return loss;
  OutputShape shape;
  describe(logits, dim, margin, shape);
  in_compute_type(logits, [&](auto zero) {
    using F = decltype(zero);
    const Weights<F> weights = weights_of<F>(weight, shape, loss.numel());
    loss = reduced<F>(loss, weights, reduction, shape, dim);
  });
  return loss;
}

Tensor dfl_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, MaybeTensor weight,
                         MaybeTensor normalizer, MaybeTensor project, int64_t dim, double margin,
                         std::string name) {
  const Reduction reduction = reduction_of(name, normalizer, logits, weight, dim);
  if (!reduction.in_kernel && (reduction.kind != Reduction::kNone || weight)) {
    OutputShape shape;
    const int64_t count = describe(logits, dim, margin, shape).count;
    in_compute_type(logits, [&](auto zero) {
      using F = decltype(zero);
      const Weights<F> weights = weights_of<F>(weight, shape, count);
      grad_loss = spread_out<F>(grad_loss, weights, reduction, shape, count);
    });
  }
  return run_backward(grad_loss, {}, logits, target, project, dim, margin, reduction.in_kernel);
}

Tensor dfl_decode(Tensor logits, MaybeTensor project, int64_t dim) {
  return run_forward(logits, {}, project, dim, 0, true).position;
}
std::tuple<Tensor, Tensor> dfl_loss_and_decode(Tensor logits, Tensor target, MaybeTensor project,
                                               int64_t dim, double margin) {
  Results results = run_forward(logits, target, project, dim, margin, true);
  return {results.loss, results.position};
}
Tensor dfl_decode_backward(Tensor grad_position, Tensor logits, MaybeTensor project, int64_t dim) {
  return run_backward({}, grad_position, logits, {}, project, dim, 0);
}
Tensor dfl_loss_and_decode_backward(Tensor grad_loss, Tensor grad_position, Tensor logits,
                                    Tensor target, MaybeTensor project, int64_t dim,
                                    double margin) {
  return run_backward(grad_loss, grad_position, logits, target, project, dim, margin);
}

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cpu_dfl_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? normalizer, "
      "Tensor? project, int dim, float margin, str reduction) -> Tensor");
  m.def("_cpu_dfl_decode(Tensor logits, Tensor? project, int dim) -> Tensor");
  m.def(
      "_cpu_dfl_loss_and_decode(Tensor logits, Tensor target, Tensor? project, int dim, "
      "float margin) -> (Tensor, Tensor)");
  m.def(
      "_cpu_dfl_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor? normalizer, Tensor? project, int dim, float margin, str reduction) -> Tensor");
  m.def(
      "_cpu_dfl_decode_backward(Tensor grad_position, Tensor logits, Tensor? project, int dim) "
      "-> Tensor");
  m.def(
      "_cpu_dfl_loss_and_decode_backward(Tensor grad_loss, Tensor grad_position, Tensor logits, "
      "Tensor target, Tensor? project, int dim, float margin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflkern, CPU, m) {
  m.impl("_cpu_dfl_loss", TORCH_BOX(&dflkern::dfl_loss));
  m.impl("_cpu_dfl_decode", TORCH_BOX(&dflkern::dfl_decode));
  m.impl("_cpu_dfl_loss_and_decode", TORCH_BOX(&dflkern::dfl_loss_and_decode));
  m.impl("_cpu_dfl_loss_backward", TORCH_BOX(&dflkern::dfl_loss_backward));
  m.impl("_cpu_dfl_decode_backward", TORCH_BOX(&dflkern::dfl_decode_backward));
  m.impl("_cpu_dfl_loss_and_decode_backward", TORCH_BOX(&dflkern::dfl_loss_and_decode_backward));
}
