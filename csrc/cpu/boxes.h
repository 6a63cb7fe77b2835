// Operations on boxes, without torch: the decode of all anchors, and the loss of the foreground.

#pragma once

#include <vector>

#include "call.h"
#include "common/iou.h"
#include "matched.h"

namespace dflkern {

// Where the four distances, or the four numbers of a box, of each anchor lie in a contiguous
// tensor: (batch, anchors, 4) or (batch, 4, anchors).
struct BoxLayout {
  int64_t batch, anchors;
  bool sides_last;

  int64_t anchor_step() const { return sides_last ? kSides : 1; }
  int64_t side_step() const { return sides_last ? 1 : anchors; }
};

// dist2bbox in place, for boxes (of all images) begin to end. `points` holds x and y of each
// anchor, `stride` its pixels per cell or null.
template <class F>
void to_boxes(const BoxLayout& layout, const F* points, const F* stride, bool cxcywh, int64_t begin,
              int64_t end, F* boxes);

// The gradient of the distances from that of the boxes.
template <class F>
void to_distance_gradients(const BoxLayout& layout, const F* stride, bool cxcywh, int64_t begin,
                           int64_t end, const F* grad_boxes, F* grad_distances);

// A tensor (batch, anchors) or (batch, anchors, classes) of any floating-point type.
struct Weights {
  Storage storage;
  const void* data;
  int64_t classes;  // 1 without such an axis
  int64_t batch_stride, anchor_stride, class_stride;
};

// Strides of the logits, or of their gradient.
struct BoxStrides {
  int64_t batch, anchor, side;
};

struct BoxLoss {
  Call call;  // storage, logits, gradient, bins, strides of the bins, project, margin
  int64_t batch, anchors;
  BoxStrides logits, gradient;
  const void* points;        // (anchors, 2), in the type of the arithmetic, contiguous
  const void* target_boxes;  // as xyxy, likewise: (batch, anchors, 4), or with matched (objects, 4)
  const void* stride;        // pixels per cell (anchors), likewise; null: boxes are in cells
  Weights weight;
  const uint8_t* foreground;  // 0: background; null: no mask
  int64_t foreground_batch_stride, foreground_anchor_stride;
  MatchedObjects matched;  // background where it is no index of an object; without data: no such
  int64_t objects;
  Iou iou;

  // The losses of each anchor, (batch, anchors), in the type of the arithmetic, set to 0 before;
  // null: only their sums are wanted.
  void *iou_losses, *dfl_losses;

  // What the backward needs of its candidates, kKept numbers of each in the type of the arithmetic:
  // weight and target box in cells. The forward writes `keep` if that is not null; where `kept` is
  // not null, it stands for weight, foreground, matched, stride and target_boxes.
  void* keep;
  const void* kept;

  const int64_t* candidates;  // anchors, counted over all images, that may have a weight
  int64_t count;              // of them
  int chunk;                  // anchors that are computed together
  int64_t chunks;
};

constexpr int kKept = 1 + kSides;

// The candidates of a loss.
std::vector<int64_t> find_candidates(const BoxLoss& loss);

// Fills in candidates, which must outlive the loss, and chunks.
void set_candidates(BoxLoss& loss, const int64_t* candidates, int64_t count);

// Of one chunk, or their total.
struct BoxSums {
  double iou = 0, dfl = 0;
  int64_t anchors = 0;  // of a weight other than 0
};
struct BoxGradients {
  double iou, dfl;  // upstream, divided by the normalizer
  // Factors of these for each anchor, (batch, anchors), in the type of the arithmetic; or null
  const void *iou_each = nullptr, *dfl_each = nullptr;
};

// Adds up w (1 - IoU) and w mean(DFL over the sides) of chunks begin to end into sums[chunk].
void sum_box_losses(const BoxLoss& loss, int64_t begin, int64_t end, BoxSums* sums);

// Sets bytes begin to end of a tensor of `size` bytes to 0; past the caches if it is a large one,
// which is then not read before it is overwritten.
void fill_zeros(char* data, int64_t size, int64_t begin, int64_t end);

// Other threads see what this one filled with zeros only after this; waiting for it once is enough.
void end_fills();

// Whether the gradients of an anchor are one range of memory, and those of all anchors another.
bool gradient_in_order(const BoxLoss& loss);

// Writes the gradient of anchors, of all images, begin to end: of those in order all, with zeros
// where there is none, which spares a pass over the memory; of others only what is not zero.
void write_box_gradients(const BoxLoss& loss, const BoxGradients& upstream, int64_t begin,
                         int64_t end);

}  // namespace dflkern
