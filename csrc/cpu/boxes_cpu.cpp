// The CPU operators on boxes: _cpu_<name> computes what the function <name> of dflkern/reference
// does, for logits (B, A, 4, K) with dim = 3 or (B, 4, K, A) with dim = 2, of any strides.

#include <functional>
#include <string>
#include <tuple>

#include "boxes.h"
#include "tensors.h"

namespace dflkern {
namespace {

// Fewer anchors than this are not worth waking a thread for.
constexpr int64_t kAnchorsPerThread = 2048;
constexpr int64_t kBytesPerThread = 1 << 17;

BoxLayout layout_of(const Tensor& logits, int64_t dim) {
  const auto sizes = logits.sizes();
  STD_TORCH_CHECK(sizes.size() == 4 && (dim == 2 || dim == 3) && sizes[dim - 1] == kSides,
                  "dflkern: boxes need logits (B, A, 4, bins) with dim 3 or (B, 4, bins, A) with 2");
  return {sizes[0], sizes[dim == 3 ? 1 : 3], dim == 3};
}

// A tensor of `count` numbers, contiguous in the type of the arithmetic.
Tensor numbers(const char* name, const Tensor& tensor, int64_t count, const Call& call) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == count, "dflkern: ", name, " has ",
                  tensor.numel(), " values, not ", count, ", or is not on the CPU");
  return contiguous_as(tensor, compute_type(call));
}

double number(const char* name, const Tensor& tensor, const Call& call) {
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

MaybeTensor stride_of(const MaybeTensor& stride, const BoxLayout& layout, const Call& call) {
  if (!stride) return {};
  return numbers("stride", *stride, layout.anchors, call);
}
const void* data_of(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// Whether boxes are centre and size, and not corners.
bool is_centred(const std::string& box_format) {
  STD_TORCH_CHECK(box_format == "xyxy" || box_format == "cxcywh", "dflkern: there is no box format ",
                  box_format);
  return box_format == "cxcywh";
}

Tensor decode_boxes(Tensor logits, Tensor anchor_points, MaybeTensor stride, MaybeTensor project,
                    int64_t dim, std::string box_format) {
  const bool cxcywh = is_centred(box_format);
  const BoxLayout layout = layout_of(logits, dim);
  OutputShape shape;
  Call call = describe(logits, dim, 0, shape);
  set_project(call, project);
  const Tensor points = numbers("anchor_points", anchor_points, 2 * layout.anchors, call);
  const MaybeTensor cells = stride_of(stride, layout, call);
  Tensor boxes = shape.empty(call);
  const BoxDecode decode{points.const_data_ptr(), data_of(cells), cxcywh, layout.anchors,
                         layout.sides_last};
  call.position = true;
  call.position_out = boxes.mutable_data_ptr();
  call.boxes = &decode;
  execute(call);
  if (gives_boxes(call)) return boxes;
  with_compute(call, [&](auto zero) {
    using F = decltype(zero);
    const auto convert = [&](int64_t begin, int64_t end) {
      to_boxes(layout, static_cast<const F*>(points.const_data_ptr()),
               static_cast<const F*>(data_of(cells)), cxcywh, begin, end,
               static_cast<F*>(boxes.mutable_data_ptr()));
    };
    in_parallel(layout.batch * layout.anchors, kAnchorsPerThread, convert);
  });
  return boxes;
}

Tensor decode_boxes_backward(Tensor grad_boxes, Tensor logits, MaybeTensor stride,
                             MaybeTensor project, int64_t dim, std::string box_format) {
  const bool cxcywh = is_centred(box_format);
  const BoxLayout layout = layout_of(logits, dim);
  OutputShape shape;
  Call call = describe(logits, dim, 0, shape);
  set_project(call, project);
  const Tensor upstream = numbers("grad_boxes", grad_boxes, call.count, call);
  const MaybeTensor cells = stride_of(stride, layout, call);
  Tensor distances = shape.empty(call), gradient = empty_gradient(logits);
  with_compute(call, [&](auto zero) {
    using F = decltype(zero);
    const auto convert = [&](int64_t begin, int64_t end) {
      const auto* from = static_cast<const F*>(upstream.const_data_ptr());
      to_distance_gradients(layout, static_cast<const F*>(data_of(cells)), cxcywh, begin, end, from,
                            static_cast<F*>(distances.mutable_data_ptr()));
    };
    in_parallel(layout.batch * layout.anchors, kAnchorsPerThread, convert);
  });
  call.backward = call.position = true;
  call.grad_position = {distances.const_data_ptr(), 1, false};
  set_gradient(call, gradient, dim);
  execute(call);
  return gradient;
}

// What a loss is told, and what owns what it reads.
struct OwnedBoxLoss {
  Tensor points, target_boxes;
  std::vector<int64_t> candidates;
  BoxLoss loss{};
};

BoxStrides strides_of(const Tensor& tensor, int64_t dim) {
  const auto strides = tensor.strides();
  return {strides[0], strides[dim == 3 ? 1 : 3], strides[dim - 1]};
}

void set_logits(OwnedBoxLoss& of, const Tensor& logits, const Tensor& anchor_points,
                MaybeTensor& project, int64_t dim, double margin, const std::string& iou) {
  const BoxLayout layout = layout_of(logits, dim);
  OutputShape shape;
  BoxLoss& loss = of.loss;
  loss.call = describe(logits, dim, margin, shape);
  set_project(loss.call, project);
  loss.batch = layout.batch;
  loss.anchors = layout.anchors;
  loss.logits = strides_of(logits, dim);
  of.points = numbers("anchor_points", anchor_points, 2 * layout.anchors, loss.call);
  loss.points = of.points.const_data_ptr();
  loss.iou = iou_of(iou);
}

void set_targets(OwnedBoxLoss& of, const Tensor& target_boxes, const Tensor& weight,
                 const MaybeTensor& foreground) {
  BoxLoss& loss = of.loss;
  of.target_boxes = numbers("target_boxes", target_boxes, loss.call.count, loss.call);
  loss.target_boxes = of.target_boxes.const_data_ptr();
  const auto sizes = weight.sizes(), strides = weight.strides();
  const bool scores = sizes.size() == 3;
  STD_TORCH_CHECK(weight.is_cpu() && (scores || sizes.size() == 2) && sizes[0] == loss.batch &&
                      sizes[1] == loss.anchors,
                  "dflkern: weight must be (B, A) or (B, A, classes) on the CPU");
  loss.weight = {storage_of("weight", weight), weight.const_data_ptr(), scores ? sizes[2] : 1,
                 strides[0], strides[1], scores ? strides[2] : 0};
  if (foreground) {
    STD_TORCH_CHECK(foreground->is_cpu() && foreground->scalar_type() == ScalarType::Bool &&
                        foreground->sizes().size() == 2 && foreground->sizes()[0] == loss.batch &&
                        foreground->sizes()[1] == loss.anchors,
                    "dflkern: foreground must be (B, A) of bool on the CPU");
    loss.foreground = static_cast<const uint8_t*>(foreground->const_data_ptr());
    loss.foreground_batch_stride = foreground->strides()[0];
    loss.foreground_anchor_stride = foreground->strides()[1];
  }
  of.candidates = find_candidates(loss);
  set_candidates(loss, of.candidates.data(), of.candidates.size());
}

int64_t chunks_per_thread(const BoxLoss& loss) {
  return std::max<int64_t>(1, kBinsPerThread / (loss.call.bins * kMaxLanes));
}

std::tuple<Tensor, Tensor> sum_losses(const BoxLoss& loss, const Tensor& normalizer) {
  std::vector<BoxSums> sums(loss.chunks);
  in_parallel(loss.chunks, chunks_per_thread(loss), [&](int64_t begin, int64_t end) {
    sum_box_losses(loss, begin, end, sums.data());
  });
  BoxSums total;
  for (const BoxSums& part : sums) {  // in one order, however many threads there are
    total.iou += part.iou;
    total.dfl += part.dfl;
    total.anchors += part.anchors;
  }
  Tensor iou_loss = empty(nullptr, nullptr, 0, compute_type(loss.call));
  Tensor dfl_loss = empty(nullptr, nullptr, 0, compute_type(loss.call));
  const double scale = total.anchors ? number("normalizer", normalizer, loss.call) : 1;
  with_compute(loss.call, [&](auto zero) {
    using F = decltype(zero);
    *static_cast<F*>(iou_loss.mutable_data_ptr()) = static_cast<F>(total.iou / scale);
    *static_cast<F*>(dfl_loss.mutable_data_ptr()) = static_cast<F>(total.dfl / scale);
  });
  return {iou_loss, dfl_loss};
}

Tensor gradient_of(BoxLoss& loss, const Tensor& grad_iou, const Tensor& grad_dfl,
                   const Tensor& logits, const Tensor& normalizer, int64_t dim) {
  Tensor gradient = empty_gradient(logits);
  set_gradient(loss.call, gradient, dim);
  loss.gradient = strides_of(gradient, dim);
  char* bytes = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t size = gradient.numel() * static_cast<int64_t>(gradient.element_size());
  if (loss.count == 0 || !gradient_in_order(loss)) {
    in_parallel(size, kBytesPerThread, [&](int64_t begin, int64_t end) {
      fill_zeros(bytes, size, begin, end);
      end_fills();
    });
    if (loss.count == 0) return gradient;
  }
  const double scale = number("normalizer", normalizer, loss.call);
  const BoxGradients upstream{number("grad_iou", grad_iou, loss.call) / scale,
                              number("grad_dfl", grad_dfl, loss.call) / scale};
  const int64_t anchors = loss.batch * loss.anchors;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread * anchors / size);
  in_parallel(anchors, grain, [&](int64_t begin, int64_t end) {
    write_box_gradients(loss, upstream, begin, end);
  });
  return gradient;
}

std::tuple<Tensor, Tensor> box_loss(Tensor logits, Tensor anchor_points, Tensor target_boxes,
                                    Tensor weight, Tensor normalizer, MaybeTensor foreground,
                                    MaybeTensor project, int64_t dim, double margin,
                                    std::string iou) {
  OwnedBoxLoss of;
  set_logits(of, logits, anchor_points, project, dim, margin, iou);
  set_targets(of, target_boxes, weight, foreground);
  return sum_losses(of.loss, normalizer);
}

// Also returns the candidates, and what is kept of them, for the backward below.
std::tuple<Tensor, Tensor, Tensor, Tensor> box_loss_keep(
    Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, Tensor normalizer,
    MaybeTensor foreground, MaybeTensor project, int64_t dim, double margin, std::string iou) {
  OwnedBoxLoss of;
  set_logits(of, logits, anchor_points, project, dim, margin, iou);
  set_targets(of, target_boxes, weight, foreground);
  const int64_t sizes[] = {of.loss.count, kKept}, strides[] = {kKept, 1};
  Tensor candidates = empty(sizes, strides + 1, 1, ScalarType::Long);
  Tensor kept = empty(sizes, strides, 2, compute_type(of.loss.call));
  std::copy(of.candidates.begin(), of.candidates.end(),
            static_cast<int64_t*>(candidates.mutable_data_ptr()));
  of.loss.keep = kept.mutable_data_ptr();
  auto [iou_loss, dfl_loss] = sum_losses(of.loss, normalizer);
  return {iou_loss, dfl_loss, candidates, kept};
}

Tensor box_loss_backward(Tensor grad_iou, Tensor grad_dfl, Tensor logits, Tensor anchor_points,
                         Tensor target_boxes, Tensor weight, Tensor normalizer,
                         MaybeTensor foreground, MaybeTensor project, int64_t dim, double margin,
                         std::string iou) {
  OwnedBoxLoss of;
  set_logits(of, logits, anchor_points, project, dim, margin, iou);
  set_targets(of, target_boxes, weight, foreground);
  return gradient_of(of.loss, grad_iou, grad_dfl, logits, normalizer, dim);
}

Tensor box_loss_backward_kept(Tensor grad_iou, Tensor grad_dfl, Tensor logits,
                              Tensor anchor_points, Tensor candidates, Tensor kept,
                              Tensor normalizer, MaybeTensor project, int64_t dim, double margin,
                              std::string iou) {
  OwnedBoxLoss of;
  set_logits(of, logits, anchor_points, project, dim, margin, iou);
  const int64_t count = candidates.numel();
  STD_TORCH_CHECK(candidates.scalar_type() == ScalarType::Long && candidates.is_contiguous() &&
                      kept.scalar_type() == compute_type(of.loss.call) && kept.is_contiguous() &&
                      kept.numel() == kKept * count,
                  "dflkern: candidates and what is kept of them must be as box_loss made them");
  const auto* first = static_cast<const int64_t*>(candidates.const_data_ptr());
  // They are read and written by these indices
  const bool ascending = std::adjacent_find(first, first + count, std::greater_equal<int64_t>()) ==
                         first + count;
  STD_TORCH_CHECK(ascending && (count == 0 || (first[0] >= 0 &&
                                               first[count - 1] < of.loss.batch * of.loss.anchors)),
                  "dflkern: candidates must be ascending indices of anchors");
  of.loss.kept = kept.const_data_ptr();
  set_candidates(of.loss, first, count);
  return gradient_of(of.loss, grad_iou, grad_dfl, logits, normalizer, dim);
}

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cpu_decode_boxes(Tensor logits, Tensor anchor_points, Tensor? stride, Tensor? project, "
      "int dim, str box_format) -> Tensor");
  m.def(
      "_cpu_decode_boxes_backward(Tensor grad_boxes, Tensor logits, Tensor? stride, "
      "Tensor? project, int dim, str box_format) -> Tensor");
  m.def(
      "_cpu_box_loss(Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, "
      "Tensor normalizer, Tensor? foreground, Tensor? project, int dim, float margin, str iou) "
      "-> (Tensor, Tensor)");
  m.def(
      "_cpu_box_loss_keep(Tensor logits, Tensor anchor_points, Tensor target_boxes, "
      "Tensor weight, Tensor normalizer, Tensor? foreground, Tensor? project, int dim, "
      "float margin, str iou) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_cpu_box_loss_backward_kept(Tensor grad_iou, Tensor grad_dfl, Tensor logits, "
      "Tensor anchor_points, Tensor candidates, Tensor kept, Tensor normalizer, "
      "Tensor? project, int dim, float margin, str iou) -> Tensor");
  m.def(
      "_cpu_box_loss_backward(Tensor grad_iou, Tensor grad_dfl, Tensor logits, "
      "Tensor anchor_points, Tensor target_boxes, Tensor weight, Tensor normalizer, "
      "Tensor? foreground, Tensor? project, int dim, float margin, str iou) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflkern, CPU, m) {
  m.impl("_cpu_decode_boxes", TORCH_BOX(&dflkern::decode_boxes));
  m.impl("_cpu_decode_boxes_backward", TORCH_BOX(&dflkern::decode_boxes_backward));
  m.impl("_cpu_box_loss", TORCH_BOX(&dflkern::box_loss));
  m.impl("_cpu_box_loss_keep", TORCH_BOX(&dflkern::box_loss_keep));
  m.impl("_cpu_box_loss_backward", TORCH_BOX(&dflkern::box_loss_backward));
  m.impl("_cpu_box_loss_backward_kept", TORCH_BOX(&dflkern::box_loss_backward_kept));
}
