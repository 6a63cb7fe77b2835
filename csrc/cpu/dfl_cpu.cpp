// The CPU operators on single distributions, without Python: _cpu_<name> computes what the function
// <name> of dflkern/reference does, for logits of any strides.

#include <string>
#include <tuple>

#include "dfl_reductions.h"
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

Tensor dfl_loss(Tensor logits, Tensor target, MaybeTensor weight, MaybeTensor normalizer,
                MaybeTensor project, int64_t dim, double margin, std::string name) {
  const Reduction reduction = reduction_of(name, normalizer, logits, weight, dim);
  Tensor loss = run_forward(logits, target, project, dim, margin, false, reduction.in_kernel).loss;
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
