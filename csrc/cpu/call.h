// One call of an operator as plain pointers and strides, without torch.

#pragma once

#include "block.h"

namespace dflkern {

constexpr int kMaxAxes = 64;
// Blocks of many bins have fewer lanes, so that their columns stay in the L1 cache.
constexpr int kColumnsSize = 4096, kLargestColumns = kMaxBins * kStep;

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// An axis beside the bins: its size, and its stride in elements in each tensor. "Output" stands for
// all tensors of one value per distribution, which are contiguous.
struct Axis {
  int64_t size, logits, output, gradient;
};

// The sides of a box, neighbours in memory in the rows layout.
constexpr int kSides = 4;

// An input of one value per distribution or, if `mean`, per kSides of them; step 0: one for all.
struct Values {
  const void* data;
  int step;
  bool mean;
};

// Turns the positions, which are distances, into boxes; see box_decode.h. One per anchor, in the
// type of the arithmetic: `points` holds x and y, `stride` is null without one.
struct BoxDecode {
  const void* points;
  const void* stride;
  bool cxcywh;
  int64_t anchors;  // in an image
  bool sides_last;  // the outputs are (batch, anchors, kSides), else (batch, kSides, anchors)
};

struct Call {
  Storage storage;
  bool backward, loss, position;

  const void* logits;
  const void* project;  // in the type of the arithmetic, or null for 0, 1, ..., K - 1
  Values target, grad_loss, grad_position;
  void* loss_out;
  void* position_out;
  void* gradient;

  double margin;
  bool mean;  // each loss is the mean of kSides neighbours in the order of the outputs
  int bins;
  int64_t bin_stride, gradient_bin_stride;

  const BoxDecode* boxes;  // or null: positions stay what they are

  int axes;
  Axis axis[kMaxAxes];  // outermost first
  bool columns;         // the last axis has stride 1 in the logits, and a block is a part of it
  int64_t count;        // of distributions
  int lanes;            // of a block
  int64_t lines, blocks_per_line;
};

// Sets the layout and how the distributions are cut into blocks, from storage, bins, strides and
// axes (in the order of the outputs).
void plan(Call& call);

// Whether run() does what call.boxes asks for. That takes all sides of an anchor in one block, or
// one side of neighbouring anchors, which says nothing of their centres.
bool gives_boxes(const Call& call);

// Computes blocks begin to end of plan()'s lines * blocks_per_line.
void run(const Call& call, int64_t begin, int64_t end);

// The forward or backward function that serves a call.
template <class F>
BlockFunction<F> block_function(const Call& call);
template <>
BlockFunction<float> block_function<float>(const Call& call);
template <>
BlockFunction<double> block_function<double>(const Call& call);

}  // namespace dflkern
