// How a classification loss is cut into parts and lines, and what its two passes have in common.
//
// Logits are taken in lines of neighbours in memory: anchors of one class (columns layout), or
// classes of one anchor (rows layout). Every logit is first computed as if its target were 0; the
// positives, which are few, are computed one by one.

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "class_loss.h"
#include "class_math.h"
#include "storage.h"
#include "vector_storage.h"

namespace dflkern {

constexpr int kUnroll = 4;              // vectors of a step
constexpr int kStepsPerLogarithm = 16;  // a product of 64 factors of at most 2
constexpr int kColumnAnchors = 1024;    // of a part
constexpr int kRowAnchors = kUnroll * kStepsPerLogarithm;

enum class ClassLayout { kColumns, kRows, kStrided };

inline ClassLayout layout_of(const ClassLoss& loss) {
  const bool columns = loss.strides.anchor == 1, rows = loss.strides.label == 1;
  if (columns && (!rows || loss.anchors >= loss.classes)) return ClassLayout::kColumns;
  return rows ? ClassLayout::kRows : ClassLayout::kStrided;
}

inline int64_t part_anchors(const ClassLoss& loss) {
  return layout_of(loss) == ClassLayout::kRows ? 4 * kRowAnchors : kColumnAnchors;
}

// A part of a loss: some anchors of one image, with all their classes.
struct ClassPart {
  int64_t image, anchor;
  int anchors;
  const Positive* positives;
  const Positive* positives_end;
};

inline ClassPart part_of(const ClassLoss& loss, int64_t index) {
  const int64_t size = part_anchors(loss), parts = (loss.anchors + size - 1) / size;
  ClassPart part{index / parts, index % parts * size, 0, nullptr, nullptr};
  part.anchors = static_cast<int>(std::min(size, loss.anchors - part.anchor));
  const int64_t first = part.image * loss.anchors + part.anchor;
  const auto before = [](const Positive& p, int64_t anchor) { return p.anchor < anchor; };
  const Positive* end = loss.positives + loss.positive_count;
  part.positives = std::lower_bound(loss.positives, end, first, before);
  part.positives_end = std::lower_bound(part.positives, end, first + part.anchors, before);
  return part;
}

template <class T>
T minus_infinity() {
  T x;
  narrow(-std::numeric_limits<Compute<T>>::infinity(), x);
  return x;
}

// Calls function with whether the loss is modulated.
template <class Function>
void with_modulation(const ClassLoss& loss, Function function) {
  if (loss.kind == ClassLossKind::kBce) return function(std::false_type());
  function(std::true_type());
}

// The factor of varifocal loss where the target is 0.
inline double negative_factor(const ClassLoss& loss) {
  return loss.kind == ClassLossKind::kVarifocal ? loss.alpha : 1;
}

inline double weight_of(const ClassLoss& loss, int64_t label) {
  return loss.class_weight ? loss.class_weight[label] : 1;
}

inline PositiveLoss loss_of(const ClassLoss& loss, const Positive& positive, double z) {
  return positive_loss(z, positive.score, loss.kind == ClassLossKind::kVarifocal,
                       loss.kind == ClassLossKind::kQuality, loss.gamma, loss.detach_modulation);
}

}  // namespace dflkern
