// The CPU operators that decode boxes: _cpu_<name> computes what the function <name> of
// dflkern/reference does, for logits (B, A, 4, K) with dim = 3 or (B, 4, K, A) with dim = 2, of any
// strides.

#include <string>

#include "box_tensors.h"

namespace dflkern {
namespace {

// Fewer anchors than this are not worth waking a thread for.
constexpr int64_t kAnchorsPerThread = 2048;

// Whether boxes are centre and size, and not corners.
bool is_centred(const std::string& box_format) {
  STD_TORCH_CHECK(box_format == "xyxy" || box_format == "cxcywh",
                  "dflkern: there is no box format ", box_format);
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

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cpu_decode_boxes(Tensor logits, Tensor anchor_points, Tensor? stride, Tensor? project, "
      "int dim, str box_format) -> Tensor");
  m.def(
      "_cpu_decode_boxes_backward(Tensor grad_boxes, Tensor logits, Tensor? stride, "
      "Tensor? project, int dim, str box_format) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflkern, CPU, m) {
  m.impl("_cpu_decode_boxes", TORCH_BOX(&dflkern::decode_boxes));
  m.impl("_cpu_decode_boxes_backward", TORCH_BOX(&dflkern::decode_boxes_backward));
}
