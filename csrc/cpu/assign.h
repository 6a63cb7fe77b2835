// Task-aligned assignment of anchors to objects, without torch, as dflkern/reference/assigner.py
// defines it.
//
// Each object looks at the anchors inside it and claims the best topk. Each image then settles the
// anchors that several objects claimed. Memory is that of the claims, one row for each object, and
// of the results.

#pragma once

#include <memory>

#include "call.h"
#include "common/iou.h"

namespace dflkern {

// Which objects an anchor that several claimed may go to.
enum class Conflicts { kInside, kClaimed, kAll };

// Strides of a tensor (batch, anchors, channels), in elements.
struct AnchorStrides {
  int64_t batch, anchor, channel;
};

// A vector of int32 or int64.
struct Indices {
  const void* data;
  bool wide;
  int64_t stride;

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
};

struct AssignCall {
  Storage storage;  // of the logits; the type of the arithmetic follows from it
  const void* logits;
  AnchorStrides logit_strides;
  // In the type of the arithmetic:
  const void* boxes;  // xyxy in pixels
  AnchorStrides box_strides;
  const void* points;    // (anchors, 2) in cells, contiguous
  const void* cells;     // (anchors), pixels per cell, contiguous
  const void* gt_boxes;  // (objects, 4) as xyxy in pixels, contiguous

  Indices labels, images;
  int64_t batch, anchors, classes, objects;  // anchors and objects fit into an int32

  int64_t topk, topk2;
  double alpha, beta, min_side, eps;
  Iou iou;
  Conflicts conflicts;

  int32_t* matched;  // (batch, anchors), contiguous
  void* score;       // likewise, in the type of the arithmetic
};

class Assigner {
 public:
  virtual ~Assigner() = default;
  // Of those that are not ignored.
  virtual int64_t objects() const = 0;
  // Finds what objects begin to end claim.
  virtual void claim(int64_t begin, int64_t end) = 0;
  // Writes the results of images begin to end, after all claims.
  virtual void settle(int64_t begin, int64_t end) = 0;
  // The sum of all scores, after all images.
  virtual double total() const = 0;
};

// The call must outlive what is returned.
std::unique_ptr<Assigner> make_assigner(const AssignCall& call);

}  // namespace dflkern
