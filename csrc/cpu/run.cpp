// From a call to blocks: the layouts, and where the values of a block's lanes are.

#include <algorithm>
#include <utility>

#include "box_decode.h"
#include "lanes.h"

namespace dflkern {
namespace {

// Below this, an axis of stride 1 is too short to fill a block's lanes.
constexpr int kShortLine = 16;

// The place of a part of a line; only the first lane's offsets in the logits are set.
void locate_in_line(const Call& call, int64_t block, Place& place) {
  const Axis& line = call.axis[call.axes - 1];
  const int64_t start = block % call.blocks_per_line * call.lanes;
  place.lanes = static_cast<int>(std::min<int64_t>(call.lanes, line.size - start));
  place.output_stride = line.output;
  int64_t rest = block / call.blocks_per_line;
  int64_t logits = start, output = start * line.output, gradient = start * line.gradient;
  for (int a = call.axes - 2; a >= 0; --a) {
    const Axis& axis = call.axis[a];
    const int64_t index = rest % axis.size;
    rest /= axis.size;
    logits += index * axis.logits;
    output += index * axis.output;
    gradient += index * axis.gradient;
  }
  place.output = output;
  place.logits[0] = logits;
  place.gradient[0] = gradient;
}

// The place of consecutive distributions.
void locate(const Call& call, Place& place) {
  if (call.axes == 1) {
    const Axis& axis = call.axis[0];
    spread(place.logits, place.lanes, place.output * axis.logits, axis.logits);
    if (call.backward) {
      spread(place.gradient, place.lanes, place.output * axis.gradient, axis.gradient);
    }
    return pad(place.logits, place.lanes);
  }
  int64_t index[kMaxAxes];
  int64_t rest = place.output, logits = 0, gradient = 0;
  for (int a = call.axes - 1; a >= 0; --a) {
    const Axis& axis = call.axis[a];
    index[a] = rest % axis.size;
    rest /= axis.size;
    logits += index[a] * axis.logits;
    gradient += index[a] * axis.gradient;
  }
  const Axis inner = call.axes ? call.axis[call.axes - 1] : Axis{1, 0, 0, 0};
  int64_t until = call.axes ? inner.size - index[call.axes - 1] : 1;
  int i = 0;
  for (;;) {
    const int end = static_cast<int>(std::min<int64_t>(place.lanes, i + until));
    spread(place.logits + i, end - i, logits, inner.logits);
    logits += (end - i) * inner.logits;
    if (call.backward) spread(place.gradient + i, end - i, gradient, inner.gradient);
    gradient += (end - i) * inner.gradient;
    i = end;
    if (i == place.lanes) break;
    logits -= inner.size * inner.logits;
    gradient -= inner.size * inner.gradient;
    until = inner.size;
    for (int a = call.axes - 2; a >= 0; --a) {
      const Axis& axis = call.axis[a];
      logits += axis.logits;
      gradient += axis.gradient;
      if (++index[a] < axis.size) break;
      logits -= axis.size * axis.logits;
      gradient -= axis.size * axis.gradient;
      index[a] = 0;
    }
  }
  pad(place.logits, place.lanes);
}

// The values of a block's lanes: in place where they fill it, else in `buffer`. A mean passes on
// its share to each side.
template <class F>
const F* gather(const Values& values, const Place& place, F* buffer) {
  if (values.data == nullptr) return nullptr;
  const F* from = static_cast<const F*>(values.data);
  const int padded = padded_lanes(place.lanes);
  if (values.mean) {
    from += values.step * (place.output / kSides);
    for (int i = 0; i < place.lanes / kSides; ++i) {
      for (int s = 0; s < kSides; ++s) buffer[i * kSides + s] = from[i * values.step] / kSides;
    }
  } else {
    from += values.step * place.output;
    const int64_t stride = values.step * place.output_stride;
    if (stride == 1 && place.lanes == padded) return from;
    for (int i = 0; i < place.lanes; ++i) buffer[i] = from[i * stride];
  }
  std::fill(buffer + place.lanes, buffer + padded, F(0));
  return buffer;
}

template <class F>
F* in_place(void* values, bool mean, const Place& place, F* buffer) {
  const bool whole = place.output_stride == 1 && place.lanes % kStep == 0 && !mean;
  return whole && values != nullptr ? static_cast<F*>(values) + place.output : buffer;
}

template <class F>
void scatter(const F* lanes, void* values, bool mean, const Place& place) {
  if (values == nullptr) return;
  F* to = static_cast<F*>(values) + place.output / (mean ? kSides : 1);
  if (to == lanes) return;
  if (mean) {
    for (int i = 0; i < place.lanes / kSides; ++i, lanes += kSides) {
      to[i] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) / kSides;
    }
  } else {
    for (int i = 0; i < place.lanes; ++i) to[i * place.output_stride] = lanes[i];
  }
}

template <class T>
class Runner {
  using F = Compute<T>;

 public:
  explicit Runner(const Call& call) : call_(call), lanes_(call), gives_boxes_(gives_boxes(call)) {}

  void run(int64_t block) {
    Place place;
    if (call_.columns) {
      locate_in_line(call_, block, place);
    } else {
      place.output = block * call_.lanes;
      place.output_stride = 1;
      place.lanes = static_cast<int>(std::min<int64_t>(call_.lanes, call_.count - place.output));
      locate(call_, place);
    }
    LaneValues<F> values{};
    values.target = gather(call_.target, place, target_);
    if (call_.backward) {
      values.grad_loss = gather(call_.grad_loss, place, first_);
      values.grad_position = gather(call_.grad_position, place, second_);
      lanes_.run(place, values);
    } else {
      values.loss = in_place(call_.loss_out, call_.mean, place, first_);
      values.position = in_place(call_.position_out, false, place, second_);
      lanes_.run(place, values);
      if (gives_boxes_) to_boxes_of_block(call_, place.output, place.lanes, values.position);
      scatter(values.loss, call_.loss_out, call_.mean, place);
      scatter(values.position, call_.position_out, false, place);
    }
  }

 private:
  const Call& call_;
  LaneRunner<T> lanes_;
  const bool gives_boxes_;
  alignas(64) F target_[kMaxLanes], first_[kMaxLanes], second_[kMaxLanes];
};

template <class T>
void run_as(const Call& call, int64_t begin, int64_t end) {
  Runner<T> runner(call);
  for (int64_t block = begin; block < end; ++block) runner.run(block);
}

// Leaves out axes of size 1 and joins neighbours that one stride can walk in all tensors.
void merge_axes(Call& call) {
  int axes = 0;
  for (int a = 0; a < call.axes; ++a) {
    const Axis axis = call.axis[a];
    if (axis.size == 1) continue;
    Axis* outer = axes ? &call.axis[axes - 1] : nullptr;
    if (outer && outer->logits == axis.size * axis.logits &&
        outer->output == axis.size * axis.output &&
        (!call.backward || outer->gradient == axis.size * axis.gradient)) {
      *outer = {outer->size * axis.size, axis.logits, axis.output, axis.gradient};
    } else {
      call.axis[axes++] = axis;
    }
  }
  call.axes = axes;
}

}  // namespace

void plan(Call& call) {
  merge_axes(call);
  call.count = 1;
  for (int a = 0; a < call.axes; ++a) call.count *= call.axis[a].size;
  call.columns = false;
  for (int a = 0; a < call.axes && call.bin_stride != 1 && !call.mean; ++a) {
    if (call.axis[a].logits != 1 || call.axis[a].size < kShortLine) continue;
    std::rotate(call.axis + a, call.axis + a + 1, call.axis + call.axes);
    call.columns = true;
    break;
  }
  call.lanes = std::clamp(kColumnsSize / call.bins / kStep * kStep, kStep, kMaxLanes);
  const int64_t line = call.columns ? call.axis[call.axes - 1].size : call.count;
  call.lines = line ? call.count / line : 0;
  call.blocks_per_line = (line + call.lanes - 1) / call.lanes;
}

bool gives_boxes(const Call& call) {
  if (call.boxes == nullptr) return false;
  if (!call.columns) return call.boxes->sides_last;
  const Axis& line = call.axis[call.axes - 1];
  return !call.boxes->cxcywh && line.output == 1 && line.size == call.boxes->anchors;
}

void run(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kFloat:
      return run_as<float>(call, begin, end);
    case Storage::kDouble:
      return run_as<double>(call, begin, end);
    case Storage::kHalf:
      return run_as<Half>(call, begin, end);
    case Storage::kBFloat16:
      return run_as<BFloat16>(call, begin, end);
  }
}

}  // namespace dflkern
