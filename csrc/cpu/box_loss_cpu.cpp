// The CPU operators of the box losses: _cpu_<name> computes what the function <name> of
// dflkern/reference does, for logits (B, A, 4, K) with dim = 3 or (B, 4, K, A) with dim = 2, of any
// strides.

#include <functional>
#include <string>
#include <tuple>

#include "box_tensors.h"

namespace dflkern {
namespace {

constexpr int64_t kBytesPerThread = 1 << 17;

// What a loss is told, and what owns what it reads.
struct OwnedBoxLoss {
  Tensor points, target_boxes;
  MaybeTensor stride;
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

void check_anchors(const char* name, const Tensor& tensor, const BoxLoss& loss) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(
      tensor.is_cpu() && sizes.size() == 2 && sizes[0] == loss.batch && sizes[1] == loss.anchors,
      "dflkern: ", name, " must be (B, A) on the CPU");
}

void set_boxes(OwnedBoxLoss& of, const Tensor& target_boxes, const MaybeTensor& matched,
               const MaybeTensor& stride) {
  BoxLoss& loss = of.loss;
  if (matched) {
    check_anchors("matched", *matched, loss);
    loss.matched = matched_objects(*matched);
    loss.objects = target_boxes.sizes()[0];
  }
  const int64_t count = matched ? kSides * loss.objects : loss.call.count;
  of.target_boxes = numbers("target_boxes", target_boxes, count, loss.call);
  loss.target_boxes = of.target_boxes.const_data_ptr();
  if (stride) of.stride = numbers("stride", *stride, loss.anchors, loss.call);
  loss.stride = data_of(of.stride);
}

void set_weights(OwnedBoxLoss& of, const Tensor& weight, const MaybeTensor& foreground) {
  BoxLoss& loss = of.loss;
  const auto sizes = weight.sizes(), strides = weight.strides();
  const bool scores = sizes.size() == 3;
  STD_TORCH_CHECK(weight.is_cpu() && (scores || sizes.size() == 2) && sizes[0] == loss.batch &&
                      sizes[1] == loss.anchors,
                  "dflkern: weight must be (B, A) or (B, A, classes) on the CPU");
  loss.weight = {storage_of("weight", weight),
                 weight.const_data_ptr(),
                 scores ? sizes[2] : 1,
                 strides[0],
                 strides[1],
                 scores ? strides[2] : 0};
  if (foreground) {
    check_anchors("foreground", *foreground, loss);
    STD_TORCH_CHECK(foreground->scalar_type() == ScalarType::Bool,
                    "dflkern: foreground must be of bool");
    loss.foreground = static_cast<const uint8_t*>(foreground->const_data_ptr());
    loss.foreground_batch_stride = foreground->strides()[0];
    loss.foreground_anchor_stride = foreground->strides()[1];
  }
}

// The memory of a tensor, set to 0.
void* zeroed(const Tensor& tensor) {
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  fill_zeros(data, tensor.numel() * tensor.element_size(), 0,
             tensor.numel() * tensor.element_size());
  end_fills();
  return data;
}

int64_t chunks_per_thread(const BoxLoss& loss) {
  return std::max<int64_t>(1, kBinsPerThread / (loss.call.bins * kMaxLanes));
}

BoxSums sum_losses(const BoxLoss& loss) {
  std::vector<BoxSums> sums(loss.chunks);
  in_parallel(loss.chunks, chunks_per_thread(loss),
              [&](int64_t begin, int64_t end) { sum_box_losses(loss, begin, end, sums.data()); });
  BoxSums total;
  for (const BoxSums& part : sums) {  // in one order, however many threads there are
    total.iou += part.iou;
    total.dfl += part.dfl;
    total.anchors += part.anchors;
  }
  return total;
}

// Whether the losses of each anchor are wanted, and not their sums.
bool is_each(const std::string& reduction) {
  STD_TORCH_CHECK(reduction == "sum" || reduction == "none", "dflkern: there is no reduction ",
                  reduction);
  return reduction == "none";
}

double divisor(const MaybeTensor& normalizer, const Call& call) {
  return normalizer ? number("normalizer", *normalizer, call) : 1;
}

std::tuple<Tensor, Tensor> losses_of(OwnedBoxLoss& of, const MaybeTensor& normalizer,
                                     const std::string& reduction) {
  BoxLoss& loss = of.loss;
  const bool each = is_each(reduction);
  const int64_t sizes[] = {loss.batch, loss.anchors}, strides[] = {loss.anchors, 1};
  Tensor iou_loss = empty(sizes, strides, each ? 2 : 0, compute_type(loss.call));
  Tensor dfl_loss = empty(sizes, strides, each ? 2 : 0, compute_type(loss.call));
  if (each) {
    loss.iou_losses = zeroed(iou_loss);
    loss.dfl_losses = zeroed(dfl_loss);
    sum_losses(loss);
    return {iou_loss, dfl_loss};
  }
  const BoxSums total = sum_losses(loss);
  const double scale = total.anchors ? divisor(normalizer, loss.call) : 1;
  with_compute(loss.call, [&](auto zero) {
    using F = decltype(zero);
    *static_cast<F*>(iou_loss.mutable_data_ptr()) = static_cast<F>(total.iou / scale);
    *static_cast<F*>(dfl_loss.mutable_data_ptr()) = static_cast<F>(total.dfl / scale);
  });
  return {iou_loss, dfl_loss};
}

Tensor gradient_of(BoxLoss& loss, const Tensor& grad_iou, const Tensor& grad_dfl,
                   const Tensor& logits, const MaybeTensor& normalizer, int64_t dim,
                   const std::string& reduction) {
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
  const int64_t anchors = loss.batch * loss.anchors;
  Tensor iou_each, dfl_each;
  BoxGradients upstream{1, 1};
  if (is_each(reduction)) {
    iou_each = numbers("grad_iou", grad_iou, anchors, loss.call);
    dfl_each = numbers("grad_dfl", grad_dfl, anchors, loss.call);
    upstream.iou_each = iou_each.const_data_ptr();
    upstream.dfl_each = dfl_each.const_data_ptr();
  } else {
    const double scale = divisor(normalizer, loss.call);
    upstream = {number("grad_iou", grad_iou, loss.call) / scale,
                number("grad_dfl", grad_dfl, loss.call) / scale};
  }
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread * anchors / size);
  in_parallel(anchors, grain,
              [&](int64_t begin, int64_t end) { write_box_gradients(loss, upstream, begin, end); });
  return gradient;
}

OwnedBoxLoss described(const Tensor& logits, const Tensor& anchor_points,
                       const Tensor& target_boxes, const Tensor& weight,
                       const MaybeTensor& foreground, const MaybeTensor& matched,
                       const MaybeTensor& stride, MaybeTensor& project, int64_t dim, double margin,
                       const std::string& iou) {
  OwnedBoxLoss of;
  set_logits(of, logits, anchor_points, project, dim, margin, iou);
  set_boxes(of, target_boxes, matched, stride);
  set_weights(of, weight, foreground);
  of.candidates = find_candidates(of.loss);
  set_candidates(of.loss, of.candidates.data(), of.candidates.size());
  return of;
}

std::tuple<Tensor, Tensor> box_loss(Tensor logits, Tensor anchor_points, Tensor target_boxes,
                                    Tensor weight, MaybeTensor normalizer, MaybeTensor foreground,
                                    MaybeTensor matched, MaybeTensor stride, MaybeTensor project,
                                    int64_t dim, double margin, std::string iou,
                                    std::string reduction) {
  OwnedBoxLoss of = described(logits, anchor_points, target_boxes, weight, foreground, matched,
                              stride, project, dim, margin, iou);
  return losses_of(of, normalizer, reduction);
}

// Also returns the candidates, and what is kept of them, for the backward below.
std::tuple<Tensor, Tensor, Tensor, Tensor> box_loss_keep(
    Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, MaybeTensor normalizer,
    MaybeTensor foreground, MaybeTensor matched, MaybeTensor stride, MaybeTensor project,
    int64_t dim, double margin, std::string iou, std::string reduction) {
  OwnedBoxLoss of = described(logits, anchor_points, target_boxes, weight, foreground, matched,
                              stride, project, dim, margin, iou);
  const int64_t sizes[] = {of.loss.count, kKept}, strides[] = {kKept, 1};
  Tensor candidates = empty(sizes, strides + 1, 1, ScalarType::Long);
  Tensor kept = empty(sizes, strides, 2, compute_type(of.loss.call));
  std::copy(of.candidates.begin(), of.candidates.end(),
            static_cast<int64_t*>(candidates.mutable_data_ptr()));
  of.loss.keep = kept.mutable_data_ptr();
  auto [iou_loss, dfl_loss] = losses_of(of, normalizer, reduction);
  return {iou_loss, dfl_loss, candidates, kept};
}

Tensor box_loss_backward(Tensor grad_iou, Tensor grad_dfl, Tensor logits, Tensor anchor_points,
                         Tensor target_boxes, Tensor weight, MaybeTensor normalizer,
                         MaybeTensor foreground, MaybeTensor matched, MaybeTensor stride,
                         MaybeTensor project, int64_t dim, double margin, std::string iou,
                         std::string reduction) {
  OwnedBoxLoss of = described(logits, anchor_points, target_boxes, weight, foreground, matched,
                              stride, project, dim, margin, iou);
  return gradient_of(of.loss, grad_iou, grad_dfl, logits, normalizer, dim, reduction);
}

Tensor box_loss_backward_kept(Tensor grad_iou, Tensor grad_dfl, Tensor logits, Tensor anchor_points,
                              Tensor candidates, Tensor kept, MaybeTensor normalizer,
                              MaybeTensor project, int64_t dim, double margin, std::string iou,
                              std::string reduction) {
  OwnedBoxLoss of;
  set_logits(of, logits, anchor_points, project, dim, margin, iou);
  const int64_t count = candidates.numel();
  STD_TORCH_CHECK(candidates.scalar_type() == ScalarType::Long && candidates.is_contiguous() &&
                      kept.scalar_type() == compute_type(of.loss.call) && kept.is_contiguous() &&
                      kept.numel() == kKept * count,
                  "dflkern: candidates and what is kept of them must be as box_loss made them");
  const auto* first = static_cast<const int64_t*>(candidates.const_data_ptr());
  // They are read and written by these indices
  const bool ascending =
      std::adjacent_find(first, first + count, std::greater_equal<int64_t>()) == first + count;
  STD_TORCH_CHECK(ascending && (count == 0 || (first[0] >= 0 &&
                                               first[count - 1] < of.loss.batch * of.loss.anchors)),
                  "dflkern: candidates must be ascending indices of anchors");
  of.loss.kept = kept.const_data_ptr();
  set_candidates(of.loss, first, count);
  return gradient_of(of.loss, grad_iou, grad_dfl, logits, normalizer, dim, reduction);
}

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cpu_box_loss(Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, "
      "Tensor? normalizer, Tensor? foreground, Tensor? matched, Tensor? stride, "
      "Tensor? project, int dim, float margin, str iou, str reduction) "
      "-> (Tensor, Tensor)");
  m.def(
      "_cpu_box_loss_keep(Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, "
      "Tensor? normalizer, Tensor? foreground, Tensor? matched, Tensor? stride, "
      "Tensor? project, int dim, float margin, str iou, str reduction) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_cpu_box_loss_backward(Tensor grad_iou, Tensor grad_dfl, Tensor logits, "
      "Tensor anchor_points, Tensor target_boxes, Tensor weight, "
      "Tensor? normalizer, Tensor? foreground, Tensor? matched, Tensor? stride, "
      "Tensor? project, int dim, float margin, str iou, str reduction) "
      "-> Tensor");
  m.def(
      "_cpu_box_loss_backward_kept(Tensor grad_iou, Tensor grad_dfl, Tensor logits, "
      "Tensor anchor_points, Tensor candidates, Tensor kept, Tensor? normalizer, "
      "Tensor? project, int dim, float margin, str iou, str reduction) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflkern, CPU, m) {
  m.impl("_cpu_box_loss", TORCH_BOX(&dflkern::box_loss));
  m.impl("_cpu_box_loss_keep", TORCH_BOX(&dflkern::box_loss_keep));
  m.impl("_cpu_box_loss_backward", TORCH_BOX(&dflkern::box_loss_backward));
  m.impl("_cpu_box_loss_backward_kept", TORCH_BOX(&dflkern::box_loss_backward_kept));
}
