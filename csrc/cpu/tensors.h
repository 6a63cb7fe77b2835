// Between torch's tensors and the kernels' plain calls, on LibTorch's stable ABI.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "call.h"
#include "common/iou.h"
#include "matched.h"

namespace dflkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Fewer bins than this are not worth waking a thread for.
constexpr int64_t kBinsPerThread = 1 << 14;

inline Storage storage_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "dflkern: ", name, " must be fp16, bf16, fp32 or fp64");
  }
}

inline Iou iou_of(const std::string& name) {
  if (name == "iou") return Iou::kIou;
  if (name == "giou") return Iou::kGiou;
  if (name == "diou") return Iou::kDiou;
  STD_TORCH_CHECK(name == "ciou", "dflkern: there is no IoU of kind ", name);
  return Iou::kCiou;
}

// Whether a tensor of integers is one of int64, and not of int32.
inline bool is_wide(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(tensor.is_cpu() && (type == ScalarType::Int || type == ScalarType::Long),
                  "dflkern: ", name, " must be int32 or int64 on the CPU");
  return type == ScalarType::Long;
}

// A tensor of two axes, the anchors of each image.
inline MatchedObjects matched_objects(const Tensor& matched) {
  const auto strides = matched.strides();
  return {matched.const_data_ptr(), is_wide("matched", matched), strides[0], strides[1]};
}

inline ScalarType compute_type(const Call& call) {
  return call.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
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
inline Call describe(const Tensor& logits, int64_t dim, double margin, OutputShape& output) {
  Call call{};
  const auto sizes = logits.sizes(), strides = logits.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(logits.is_cpu(), "dflkern: logits must be on the CPU");
  STD_TORCH_CHECK(0 <= dim && dim < dims && dims <= kMaxAxes, "dflkern: dim is out of range");
  STD_TORCH_CHECK(2 <= sizes[dim] && sizes[dim] <= kMaxBins, "dflkern: there must be 2 to ",
                  kMaxBins, " bins, not ", sizes[dim]);
  call.storage = storage_of("logits", logits);
  call.logits = logits.const_data_ptr();
  call.bins = static_cast<int>(sizes[dim]);
  call.bin_stride = strides[dim];
  call.margin = margin;
  call.count = 1;
  output.dims = dims - 1;
  // As torch has it, an axis without elements takes the stride of one with a single element
  for (int64_t a = dims - 1, o = output.dims, stride = 1; a >= 0; --a) {
    if (a == dim) continue;
    output.sizes[--o] = sizes[a];
    output.strides[o] = stride;
    call.axis[o] = {sizes[a], strides[a], stride, 0};
    call.count *= sizes[a];
    stride *= std::max<int64_t>(sizes[a], 1);
  }
  call.axes = static_cast<int>(output.dims);
  return call;
}

// The tensor in a type, contiguous; itself where it is so already.
inline Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
  const Tensor same = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

inline void set_project(Call& call, MaybeTensor& project) {
  if (!project) return;
  STD_TORCH_CHECK(project->is_cpu() && project->numel() == call.bins,
                  "dflkern: project needs a position for each of the ", call.bins, " bins");
  project = contiguous_as(*project, compute_type(call));
  call.project = project->const_data_ptr();
}

// Calls function(begin, end) for pieces that make up 0 to count, on as many threads as have at
// least `grain` to do. Each thread takes the next piece when it is done with one: cores are seldom
// equally fast, and halves would wait for the slower one.
template <class Function>
void in_parallel(int64_t count, int64_t grain, const Function& function) {
  constexpr int64_t kPiecesPerThread = 32;
  const int64_t most = torch::stable::get_num_threads();
  const int64_t threads = std::min(most, (count + grain - 1) / grain);
  if (threads <= 1) {
    if (count > 0) function(0, count);
    return;
  }
  const int64_t piece = std::max({int64_t(1), grain / 2, count / (threads * kPiecesPerThread)});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) {
      function(begin, std::min(begin + piece, count));
    }
  });
}

inline void execute(Call& call) {
  if (call.count == 0) return;
  plan(call);
  const int64_t grain = std::max<int64_t>(1, kBinsPerThread / (call.bins * call.lanes));
  in_parallel(call.lines * call.blocks_per_line, grain,
              [&call](int64_t begin, int64_t end) { run(call, begin, end); });
}

// Memory for the gradient of the logits, with the strides of torch.empty_like.
inline Tensor empty_gradient(const Tensor& logits) {
  if (!logits.is_contiguous()) return torch::stable::empty_like(logits);
  const auto sizes = logits.sizes();
  return empty(sizes.data(), logits.strides().data(), sizes.size(), logits.scalar_type());
}

// Lets a described call write there.
inline void set_gradient(Call& call, Tensor& gradient, int64_t dim) {
  const auto strides = gradient.strides();
  call.gradient = gradient.mutable_data_ptr();
  call.gradient_bin_stride = strides[dim];
  for (int a = 0; a < call.axes; ++a) call.axis[a].gradient = strides[a < dim ? a : a + 1];
}

}  // namespace dflkern
