// The classification loss against an implicit target, without torch: the target of a logit is the
// score of its anchor where its class is that of the anchor's object (a positive), and 0 elsewhere.

#pragma once

#include <vector>

#include "call.h"
#include "matched.h"

namespace dflkern {

enum class ClassLossKind { kBce, kVarifocal, kQuality };

// Strides of the logits, or of their gradient, in elements.
struct ClassStrides {
  int64_t batch, anchor, label;
};

// A tensor (batch, anchors) of any floating-point type.
struct AnchorScores {
  Storage storage;
  const void* data;
  int64_t batch_stride, anchor_stride;
};

// A logit whose class is that of its anchor's object.
struct Positive {
  int64_t anchor;  // counted over all images
  int64_t label;
  double score;
};

struct ClassLoss {
  Storage storage;
  const void* logits;
  void* gradient;
  int64_t batch, anchors, classes;
  ClassStrides strides, gradient_strides;
  MatchedObjects matched;
  AnchorScores score;
  const int64_t* labels;  // of the objects
  int64_t objects;
  const double* class_weight;  // or null
  ClassLossKind kind;
  double alpha, gamma;
  bool detach_modulation;

  const Positive* positives;  // by ascending anchor
  int64_t positive_count;
};

// The positives of a loss. Anchors whose object or label is out of range have none.
std::vector<Positive> find_positives(const ClassLoss& loss);

// How many parts a loss is computed in. It depends on the sizes and strides only.
int64_t class_loss_parts(const ClassLoss& loss);
// Logits in a part.
int64_t class_loss_part_size(const ClassLoss& loss);

// The sum over parts begin to end, each in sums[part].
void sum_class_losses(const ClassLoss& loss, int64_t begin, int64_t end, double* sums);

// Writes the gradient of parts begin to end; `scale` is the upstream gradient divided by the
// normalizer.
void write_class_gradients(const ClassLoss& loss, double scale, int64_t begin, int64_t end);

}  // namespace dflkern
