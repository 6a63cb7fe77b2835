// The CPU operators of the classification loss: _cpu_<name> computes what the function <name> of
// dflkern/reference does, for logits (B, A, C) with dim = 2 or (B, C, A) with dim = 1, of any
// strides.

#include <string>

#include "class_loss.h"
#include "tensors.h"

namespace dflkern {
namespace {

// Fewer logits than this are not worth waking a thread for.
constexpr int64_t kLogitsPerThread = 1 << 14;

// What a loss is told, and what owns what it reads.
struct OwnedClassLoss {
  Tensor labels;
  MaybeTensor class_weight;
  std::vector<Positive> positives;
  ClassLoss loss{};
};

ClassStrides strides_of(const Tensor& tensor, int64_t dim) {
  const auto strides = tensor.strides();
  return {strides[0], strides[3 - dim], strides[dim]};
}

void set_logits(ClassLoss& loss, const Tensor& logits, int64_t dim) {
  const auto sizes = logits.sizes();
  STD_TORCH_CHECK(logits.is_cpu() && sizes.size() == 3 && (dim == 1 || dim == 2),
                  "dflkern: logits must be (B, A, C) with dim 2 or (B, C, A) with 1, on the CPU");
  loss.storage = storage_of("logits", logits);
  loss.logits = logits.const_data_ptr();
  loss.batch = sizes[0];
  loss.anchors = sizes[3 - dim];
  loss.classes = sizes[dim];
  loss.strides = strides_of(logits, dim);
}

void check_anchors(const char* name, const Tensor& tensor, const ClassLoss& loss) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(
      tensor.is_cpu() && sizes.size() == 2 && sizes[0] == loss.batch && sizes[1] == loss.anchors,
      "dflkern: ", name, " must be (B, A) on the CPU");
}

void set_targets(OwnedClassLoss& of, const Tensor& matched, const Tensor& score,
                 const Tensor& gt_labels) {
  ClassLoss& loss = of.loss;
  check_anchors("matched", matched, loss);
  check_anchors("score", score, loss);
  loss.matched = matched_objects(matched);
  loss.score = {storage_of("score", score), score.const_data_ptr(), score.strides()[0],
                score.strides()[1]};
  is_wide("gt_labels", gt_labels);
  of.labels = contiguous_as(gt_labels, ScalarType::Long);
  loss.labels = static_cast<const int64_t*>(of.labels.const_data_ptr());
  loss.objects = of.labels.numel();
}

void set_weight(OwnedClassLoss& of, const MaybeTensor& class_weight) {
  if (!class_weight) return;
  STD_TORCH_CHECK(class_weight->is_cpu() && class_weight->numel() == of.loss.classes,
                  "dflkern: class_weight needs a value for each class, on the CPU");
  const ScalarType type =
      of.loss.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  of.class_weight = contiguous_as(contiguous_as(*class_weight, type), ScalarType::Double);
  of.loss.class_weight = static_cast<const double*>(of.class_weight->const_data_ptr());
}

ClassLossKind kind_of(const std::string& name) {
  if (name == "bce") return ClassLossKind::kBce;
  if (name == "varifocal") return ClassLossKind::kVarifocal;
  STD_TORCH_CHECK(name == "quality", "dflkern: there is no class loss of kind ", name);
  return ClassLossKind::kQuality;
}

OwnedClassLoss described(const Tensor& logits, const Tensor& matched, const Tensor& score,
                         const Tensor& gt_labels, const MaybeTensor& class_weight, int64_t dim,
                         const std::string& kind, double alpha, double gamma,
                         bool detach_modulation) {
  OwnedClassLoss of;
  set_logits(of.loss, logits, dim);
  set_targets(of, matched, score, gt_labels);
  set_weight(of, class_weight);
  of.loss.kind = kind_of(kind);
  of.loss.alpha = alpha;
  of.loss.gamma = gamma;
  of.loss.detach_modulation = detach_modulation;
  of.positives = find_positives(of.loss);
  of.loss.positives = of.positives.data();
  of.loss.positive_count = static_cast<int64_t>(of.positives.size());
  return of;
}

int64_t parts_per_thread(const ClassLoss& loss) {
  return std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, class_loss_part_size(loss)));
}

// A tensor of one number, of any floating-point type.
double number(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, "dflkern: ", name,
                  " must be a single number on the CPU");
  const Tensor wide = contiguous_as(tensor, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

Tensor class_loss(Tensor logits, Tensor matched, Tensor score, Tensor gt_labels, Tensor normalizer,
                  MaybeTensor class_weight, int64_t dim, std::string kind, double alpha,
                  double gamma, bool detach_modulation) {
  const OwnedClassLoss of = described(logits, matched, score, gt_labels, class_weight, dim, kind,
                                      alpha, gamma, detach_modulation);
  std::vector<double> sums(class_loss_parts(of.loss));
  in_parallel(sums.size(), parts_per_thread(of.loss), [&](int64_t begin, int64_t end) {
    sum_class_losses(of.loss, begin, end, sums.data());
  });
  double total = 0;
  for (double part : sums) total += part;  // in one order, however many threads there are
  if (!sums.empty()) total /= number("normalizer", normalizer);
  const bool wide = of.loss.storage == Storage::kDouble;
  Tensor result = empty(nullptr, nullptr, 0, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *static_cast<double*>(result.mutable_data_ptr()) = total;
  } else {
    *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(total);
  }
  return result;
}

Tensor class_loss_backward(Tensor grad_loss, Tensor logits, Tensor matched, Tensor score,
                           Tensor gt_labels, Tensor normalizer, MaybeTensor class_weight,
                           int64_t dim, std::string kind, double alpha, double gamma,
                           bool detach_modulation) {
  OwnedClassLoss of = described(logits, matched, score, gt_labels, class_weight, dim, kind, alpha,
                                gamma, detach_modulation);
  Tensor gradient = empty_gradient(logits);
  if (logits.numel() == 0) return gradient;
  of.loss.gradient = gradient.mutable_data_ptr();
  of.loss.gradient_strides = strides_of(gradient, dim);
  const double scale = number("grad_loss", grad_loss) / number("normalizer", normalizer);
  in_parallel(
      class_loss_parts(of.loss), parts_per_thread(of.loss),
      [&](int64_t begin, int64_t end) { write_class_gradients(of.loss, scale, begin, end); });
  return gradient;
}

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cpu_class_loss(Tensor class_logits, Tensor matched, Tensor score, Tensor gt_labels, "
      "Tensor normalizer, Tensor? class_weight, int dim, str kind, float alpha, float gamma, "
      "bool detach_modulation) -> Tensor");
  m.def(
      "_cpu_class_loss_backward(Tensor grad_loss, Tensor class_logits, Tensor matched, "
      "Tensor score, Tensor gt_labels, Tensor normalizer, Tensor? class_weight, int dim, str kind, "
      "float alpha, float gamma, bool detach_modulation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflkern, CPU, m) {
  m.impl("_cpu_class_loss", TORCH_BOX(&dflkern::class_loss));
  m.impl("_cpu_class_loss_backward", TORCH_BOX(&dflkern::class_loss_backward));
}
