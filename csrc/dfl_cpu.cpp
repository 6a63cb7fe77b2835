// The CPU operators, on LibTorch's stable ABI and without Python: _cpu_<name> computes what the
// function <name> of dflkern/reference.py does, for logits of any strides.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "call.h"

namespace dflkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Fewer bins than this are not worth waking a thread for.
constexpr int64_t kBinsPerThread = 1 << 14;

Storage storage_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "dflkern: logits must be fp16, bf16, fp32 or fp64");
  }
}

ScalarType compute_type(const Call& call) {
  return call.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
}

// A tensor of one value per distribution, or per mean, as the kernels read it. `kept` owns a copy
// if one is made: of other types, and of strides that are neither contiguous nor all 0, as after
// .sum().backward().
Values values_of(const char* name, Tensor& kept, const Call& call, bool mean = false) {
  STD_TORCH_CHECK(kept.is_cpu() && kept.numel() * (mean ? kSides : 1) == call.count, "dflkern: ", name, " has ",
                  kept.numel(), " values for ", call.count, " distributions, or is not on the CPU");
  if (kept.scalar_type() != compute_type(call)) kept = torch::stable::to(kept, compute_type(call));
  if (kept.is_contiguous()) return {kept.const_data_ptr(), 1, mean};
  const auto strides = kept.strides();
  if (std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s == 0; })) {
    return {kept.const_data_ptr(), 0, mean};
  }
  kept = torch::stable::contiguous(kept);
  return {kept.const_data_ptr(), 1, mean};
}

Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The shape of the logits without the bins, with contiguous strides.
struct OutputShape {
  int64_t dims = 0;
  int64_t sizes[kMaxAxes], strides[kMaxAxes];

  Tensor empty(const Call& call) const {
    return dflkern::empty(sizes, strides, dims, compute_type(call));
  }
};

// A call with the logits, the bins and, without strides of a gradient yet, the axes filled in.
Call describe(const Tensor& logits, int64_t dim, double margin, OutputShape& output) {
  Call call{};
  const auto sizes = logits.sizes(), strides = logits.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(logits.is_cpu(), "dflkern: logits must be on the CPU");
  STD_TORCH_CHECK(0 <= dim && dim < dims && dims <= kMaxAxes, "dflkern: dim is out of range");
  STD_TORCH_CHECK(2 <= sizes[dim] && sizes[dim] <= kMaxBins, "dflkern: there must be 2 to ",
                  kMaxBins, " bins, not ", sizes[dim]);
  call.storage = storage_of(logits);
  call.logits = logits.const_data_ptr();
  call.bins = static_cast<int>(sizes[dim]);
  call.bin_stride = strides[dim];
  call.margin = margin;
  call.count = 1;
  output.dims = dims - 1;
  for (int64_t a = dims - 1, o = output.dims; a >= 0; --a) {
    if (a == dim) continue;
    output.sizes[--o] = sizes[a];
    output.strides[o] = call.count;
    call.axis[o] = {sizes[a], strides[a], call.count, 0};
    call.count *= sizes[a];
  }
  call.axes = static_cast<int>(output.dims);
  return call;
}

void set_project(Call& call, MaybeTensor& project) {
  if (!project) return;
  STD_TORCH_CHECK(project->is_cpu() && project->numel() == call.bins,
                  "dflkern: project needs a position for each of the ", call.bins, " bins");
  if (project->scalar_type() != compute_type(call)) {
    project = torch::stable::to(*project, compute_type(call));
  }
  project = project->is_contiguous() ? *project : torch::stable::contiguous(*project);
  call.project = project->const_data_ptr();
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

void execute(Call& call) {
  if (call.count == 0) return;
  plan(call);
  const int64_t grain = std::max<int64_t>(1, kBinsPerThread / (call.bins * call.lanes));
  torch::stable::parallel_for(0, call.lines * call.blocks_per_line, grain,
                              [&call](int64_t begin, int64_t end) { run(call, begin, end); });
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
  const auto sizes = logits.sizes();
  Tensor gradient = logits.is_contiguous()
                        ? empty(sizes.data(), logits.strides().data(), sizes.size(),
                                logits.scalar_type())
                        : torch::stable::empty_like(logits);
  const auto strides = gradient.strides();
  call.gradient = gradient.mutable_data_ptr();
  call.gradient_bin_stride = strides[dim];
  for (int a = 0; a < call.axes; ++a) call.axis[a].gradient = strides[a < dim ? a : a + 1];
  execute(call);
  return gradient;
}

Tensor dfl_loss(Tensor logits, Tensor target, MaybeTensor project, int64_t dim, double margin,
                bool mean) {
  return run_forward(logits, target, project, dim, margin, false, mean).loss;
}
Tensor dfl_decode(Tensor logits, MaybeTensor project, int64_t dim) {
  return run_forward(logits, {}, project, dim, 0, true).position;
}
std::tuple<Tensor, Tensor> dfl_loss_and_decode(Tensor logits, Tensor target, MaybeTensor project,
                                               int64_t dim, double margin) {
  Results results = run_forward(logits, target, project, dim, margin, true);
  return {results.loss, results.position};
}
Tensor dfl_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, MaybeTensor project,
                         int64_t dim, double margin, bool mean) {
  return run_backward(grad_loss, {}, logits, target, project, dim, margin, mean);
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
      "_cpu_dfl_loss(Tensor logits, Tensor target, Tensor? project, int dim, float margin, "
      "bool mean=False) -> Tensor");
  m.def("_cpu_dfl_decode(Tensor logits, Tensor? project, int dim) -> Tensor");
  m.def(
      "_cpu_dfl_loss_and_decode(Tensor logits, Tensor target, Tensor? project, int dim, "
      "float margin) -> (Tensor, Tensor)");
  m.def(
      "_cpu_dfl_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? project, "
      "int dim, float margin, bool mean=False) -> Tensor");
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
