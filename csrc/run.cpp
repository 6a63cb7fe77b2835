// From a call to blocks: the layouts, and the copies between memory and a block's columns.

#include <algorithm>
#include <utility>

#include "call.h"
#include "columns.h"
#include "vector_rows.h"

namespace dflkern {
namespace {

// Below this, an axis of stride 1 is too short to fill a block's lanes.
constexpr int kShortLine = 16;

template <class F>
struct WholeNumbers {
  F values[kMaxBins];
  constexpr WholeNumbers() : values() {
    for (int k = 0; k < kMaxBins; ++k) values[k] = F(k);
  }
};
template <class F>
constexpr WholeNumbers<F> kWholeNumbers;

// Where a block lies: offsets in elements of its first lane, or of each lane if it is no line.
struct Place {
  int lanes;  // that hold distributions
  int64_t output;
  int64_t output_stride;
  int64_t logits[kMaxLanes], gradient[kMaxLanes];
};

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

void spread(int64_t* offsets, int64_t count, int64_t first, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) offsets[i] = first + i * stride;
}

// Lanes that pad a block repeat its last one.
void pad(int64_t* offsets, int lanes, int padded) {
  std::fill(offsets + lanes, offsets + padded, offsets[lanes - 1]);
}

// The place of consecutive distributions.
void locate(const Call& call, int padded, Place& place) {
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
  pad(place.logits, place.lanes, padded);
}

int padded_lanes(int lanes) { return (lanes + kStep - 1) / kStep * kStep; }

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
  explicit Runner(const Call& call)
      : call_(call),
        function_(block_function<F>(call)),
        rows_(rows_function<T>(call)),
        bins_(make_bins(call.bins, static_cast<const F*>(call.project), call.margin)),
        positions_(bins_.positions ? bins_.positions : kWholeNumbers<F>.values) {}

  void run(int64_t block) {
    Place place;
    if (call_.columns) {
      locate_in_line(call_, block, place);
    } else {
      place.output = block * call_.lanes;
      place.output_stride = 1;
      place.lanes = static_cast<int>(std::min<int64_t>(call_.lanes, call_.count - place.output));
      locate(call_, padded_lanes(place.lanes), place);
    }
    if constexpr (kHasRows<T>) {
      if (rows_) return run_rows(place);
    }
    Block<F> it{};
    it.lanes = padded_lanes(place.lanes);
    load_logits(place, it);
    it.target = gather(call_.target, place, target_);
    if (call_.backward) {
      it.grad_loss = gather(call_.grad_loss, place, first_);
      it.grad_position = gather(call_.grad_position, place, second_);
      aim_gradient(place, it);
      function_(it, bins_, positions_);
      store_gradient(place, it);
    } else {
      it.loss = in_place(call_.loss_out, call_.mean, place, first_);
      it.position = in_place(call_.position_out, false, place, second_);
      function_(it, bins_, positions_);
      scatter(it.loss, call_.loss_out, call_.mean, place);
      scatter(it.position, call_.position_out, false, place);
    }
  }

 private:
  static constexpr bool kDirect = sizeof(T) == sizeof(F);

  void run_rows(const Place& place) {
    Rows<T> it{};
    it.lanes = padded_lanes(place.lanes);
    it.count = place.lanes;
    it.logits = static_cast<const T*>(call_.logits);
    it.offsets = place.logits;
    it.target = gather(call_.target, place, target_);
    if (call_.backward) {
      it.gradient = static_cast<T*>(call_.gradient);
      it.gradient_offsets = place.gradient;
      it.grad_loss = gather(call_.grad_loss, place, first_);
      it.grad_position = gather(call_.grad_position, place, second_);
      rows_(it, bins_, positions_);
    } else {
      it.loss = in_place(call_.loss_out, call_.mean, place, first_);
      it.position = in_place(call_.position_out, false, place, second_);
      rows_(it, bins_, positions_);
      scatter(it.loss, call_.loss_out, call_.mean, place);
      scatter(it.position, call_.position_out, false, place);
    }
  }

  void load_logits(Place& place, Block<F>& it) {
    const T* logits = static_cast<const T*>(call_.logits);
    it.logits = columns_;
    it.logits_stride = it.lanes;
    if constexpr (kDirect) {
      if (call_.columns && place.lanes == it.lanes) {
        it.logits = logits + place.logits[0];
        it.logits_stride = call_.bin_stride;
        return;
      }
    }
    if constexpr (kHasEights<T>) {
      if (call_.columns || (call_.bin_stride == 1 && call_.bins >= 8)) {
        it.max = max_;
        if (call_.columns) {
          load_line(logits + place.logits[0], call_.bin_stride, call_.bins, columns_, it.lanes,
                    place.lanes, max_);
        } else {
          load_rows(logits, place.logits, call_.bins, columns_, it.lanes, max_);
        }
        return;
      }
    }
    if (call_.columns) {
      spread(place.logits, place.lanes, place.logits[0], 1);
      pad(place.logits, place.lanes, it.lanes);
    }
    load_scattered(logits, place.logits, call_.bin_stride, call_.bins, columns_, it.lanes);
  }

  // Whether the gradient, too, has neighbouring distributions side by side.
  bool gradient_in_line() const {
    return call_.columns && call_.axis[call_.axes - 1].gradient == 1;
  }

  void aim_gradient(const Place& place, Block<F>& it) {
    it.gradient = columns_;
    it.gradient_stride = it.lanes;
    if constexpr (kDirect) {
      if (gradient_in_line() && place.lanes == it.lanes) {
        it.gradient = static_cast<F*>(call_.gradient) + place.gradient[0];
        it.gradient_stride = call_.gradient_bin_stride;
      }
    }
  }

  void store_gradient(Place& place, const Block<F>& it) {
    if (it.gradient != columns_) return;
    T* gradient = static_cast<T*>(call_.gradient);
    const int64_t stride = call_.gradient_bin_stride;
    if constexpr (kHasEights<T>) {
      if (gradient_in_line()) {
        store_line(gradient + place.gradient[0], stride, call_.bins, columns_, it.lanes,
                   place.lanes);
        return;
      }
    }
    if (call_.columns) {
      spread(place.gradient, place.lanes, place.gradient[0], call_.axis[call_.axes - 1].gradient);
    }
    if constexpr (kHasEights<T>) {
      if (stride == 1 && call_.bins >= 8) {
        store_rows(gradient, place.gradient, call_.bins, columns_, it.lanes, place.lanes);
        return;
      }
    }
    store_scattered(gradient, place.gradient, stride, call_.bins, columns_, it.lanes, place.lanes);
  }

  const Call& call_;
  const BlockFunction<F> function_;
  const RowsFunction<T> rows_;
  const Bins<F> bins_;
  const F* const positions_;
  alignas(64) F columns_[kLargestColumns];
  alignas(64) F max_[kMaxLanes], target_[kMaxLanes], first_[kMaxLanes], second_[kMaxLanes];
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
