// The CPU operator _cpu_task_aligned_assign: what task_aligned_assign of dflkern/reference
// computes, for class logits (B, A, C) and boxes (B, A, 4) with dim = 2, or (B, C, A) and (B, 4, A)
// with dim = 1, of any strides.

#include <limits>
#include <string>
#include <tuple>

#include "assign.h"
#include "tensors.h"

namespace dflkern {
namespace {

// Fewer objects or images than this are not worth waking a thread for.
constexpr int64_t kObjectsPerThread = 8, kImagesPerThread = 2;

AnchorStrides strides_of(const Tensor& tensor, int64_t dim) {
  const auto strides = tensor.strides();
  return {strides[0], strides[3 - dim], strides[dim]};
}

// A tensor of `count` numbers, contiguous in a type.
Tensor numbers(const char* name, const Tensor& tensor, int64_t count, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == count, "dflkern: ", name, " has ",
                  tensor.numel(), " values, not ", count, ", or is not on the CPU");
  return contiguous_as(tensor, type);
}

Indices indices(const char* name, const Tensor& tensor, int64_t count) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.sizes().size() == 1 && tensor.numel() == count &&
                      (wide || tensor.scalar_type() == ScalarType::Int),
                  "dflkern: ", name, " must be ", count, " int32 or int64 on the CPU");
  return {tensor.const_data_ptr(), wide, tensor.strides()[0]};
}

Conflicts conflicts_of(const std::string& name) {
  if (name == "inside") return Conflicts::kInside;
  if (name == "claimed") return Conflicts::kClaimed;
  STD_TORCH_CHECK(name == "all", "dflkern: conflicts cannot be settled as ", name);
  return Conflicts::kAll;
}

Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  const int64_t strides[] = {sizes.size() == 2 ? std::max<int64_t>(sizes.begin()[1], 1) : 1, 1};
  return empty(sizes.begin(), strides, static_cast<int64_t>(sizes.size()), type);
}

// Checks the shapes that addresses follow from, and fills in sizes and strides.
void set_shapes(AssignCall& call, const Tensor& logits, const Tensor& boxes, const Tensor& objects,
                int64_t dim) {
  const auto sizes = logits.sizes(), box_sizes = boxes.sizes();
  STD_TORCH_CHECK(
      (dim == 1 || dim == 2) && sizes.size() == 3 && box_sizes.size() == 3 &&
          box_sizes[0] == sizes[0] && box_sizes[3 - dim] == sizes[3 - dim] &&
          box_sizes[dim] == kSides && logits.is_cpu() && boxes.is_cpu(),
      "dflkern: class logits (B, A, C) and boxes (B, A, 4) with dim 2, or (B, C, A) and "
      "(B, 4, A) with dim 1, are needed on the CPU");
  call.batch = sizes[0];
  call.anchors = sizes[3 - dim];
  call.classes = sizes[dim];
  call.objects = objects.numel() / kSides;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  STD_TORCH_CHECK(call.anchors < kMost && call.objects < kMost,
                  "dflkern: there are too many anchors or objects for int32");
  call.logit_strides = strides_of(logits, dim);
}

std::tuple<Tensor, Tensor, Tensor> task_aligned_assign(
    Tensor class_logits, Tensor boxes, Tensor anchor_points, Tensor stride, Tensor gt_boxes,
    Tensor gt_labels, Tensor gt_image, int64_t dim, int64_t topk, int64_t topk2, double alpha,
    double beta, std::string iou, double min_side, std::string conflicts, double eps) {
  AssignCall call{};
  set_shapes(call, class_logits, boxes, gt_boxes, dim);
  call.storage = storage_of("class_logits", class_logits);
  const ScalarType type = call.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  call.logits = class_logits.const_data_ptr();
  const Tensor found = boxes.scalar_type() == type ? boxes : torch::stable::to(boxes, type);
  call.boxes = found.const_data_ptr();
  call.box_strides = strides_of(found, dim);
  const Tensor points = numbers("anchor_points", anchor_points, 2 * call.anchors, type);
  const Tensor cells = numbers("stride", stride, call.anchors, type);
  const Tensor objects = numbers("gt_boxes", gt_boxes, kSides * call.objects, type);
  call.points = points.const_data_ptr();
  call.cells = cells.const_data_ptr();
  call.gt_boxes = objects.const_data_ptr();
  call.labels = indices("gt_labels", gt_labels, call.objects);
  call.images = indices("gt_image", gt_image, call.objects);
  STD_TORCH_CHECK(topk >= 1 && topk2 >= 1, "dflkern: topk and topk2 must be at least 1");
  call.topk = topk;
  call.topk2 = topk2;
  call.alpha = alpha;
  call.beta = beta;
  call.min_side = min_side;
  call.eps = eps;
  call.iou = iou_of(iou);
  call.conflicts = conflicts_of(conflicts);
  Tensor matched = new_tensor({call.batch, call.anchors}, ScalarType::Int);
  Tensor score = new_tensor({call.batch, call.anchors}, type), sum = new_tensor({}, type);
  call.matched = static_cast<int32_t*>(matched.mutable_data_ptr());
  call.score = score.mutable_data_ptr();

  const std::unique_ptr<Assigner> assigner = make_assigner(call);
  in_parallel(assigner->objects(), kObjectsPerThread,
              [&](int64_t begin, int64_t end) { assigner->claim(begin, end); });
  in_parallel(call.batch, kImagesPerThread,
              [&](int64_t begin, int64_t end) { assigner->settle(begin, end); });
  if (type == ScalarType::Double) {
    *static_cast<double*>(sum.mutable_data_ptr()) = assigner->total();
  } else {
    *static_cast<float*>(sum.mutable_data_ptr()) = static_cast<float>(assigner->total());
  }
  return {matched, score, sum};
}

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cpu_task_aligned_assign(Tensor class_logits, Tensor boxes, Tensor anchor_points, "
      "Tensor stride, Tensor gt_boxes, Tensor gt_labels, Tensor gt_image, int dim, int topk, "
      "int topk2, float alpha, float beta, str iou, float min_side, str conflicts, float eps) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dflkern, CPU, m) {
  m.impl("_cpu_task_aligned_assign", TORCH_BOX(&dflkern::task_aligned_assign));
}
