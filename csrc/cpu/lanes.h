// The distributions of one block, wherever they lie: copies between their logits and the block's
// columns, and the function that computes them.

#pragma once

#include <algorithm>

#include "call.h"
#include "columns.h"
#include "vector_rows.h"

namespace dflkern {

template <class F>
struct WholeNumbers {
  F values[kMaxBins];
  constexpr WholeNumbers() : values() {
    for (int k = 0; k < kMaxBins; ++k) values[k] = F(k);
  }
};
template <class F>
constexpr WholeNumbers<F> kWholeNumbers;

// Where a block lies: offsets in elements of each lane or, in a line (call.columns), of its first.
struct Place {
  int lanes;  // that hold distributions
  int64_t output;
  int64_t output_stride;
  int64_t logits[kMaxLanes], gradient[kMaxLanes];
  // Those of the rows that come after, or null: memory goes on behind these.
  const int64_t *next = nullptr, *gradient_next = nullptr;
};

inline int padded_lanes(int lanes) { return (lanes + kStep - 1) / kStep * kStep; }

inline void spread(int64_t* offsets, int64_t count, int64_t first, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, first += stride) offsets[i] = first;
}

// Lanes that pad a block repeat its last one.
inline void pad(int64_t* offsets, int lanes) {
  std::fill(offsets + lanes, offsets + padded_lanes(lanes), offsets[lanes - 1]);
}

// What the lanes of a block take and give beside logits and gradients, padded; null where an
// operation has no use for it.
template <class F>
struct LaneValues {
  const F* target;
  const F* grad_loss;
  const F* grad_position;
  F* loss;
  F* position;
};

template <class T>
class LaneRunner {
  using F = Compute<T>;

 public:
  explicit LaneRunner(const Call& call)
      : call_(call),
        function_(block_function<F>(call)),
        rows_(rows_function<T>(call)),
        bins_(make_bins(call.bins, static_cast<const F*>(call.project), call.margin)),
        positions_(bins_.positions ? bins_.positions : kWholeNumbers<F>.values) {}

  // Whether it takes logits row by row, and fetches the next rows meanwhile.
  bool takes_rows() const { return rows_ != nullptr; }

  DFL_INLINE void run(Place& place, const LaneValues<F>& values) {
    if constexpr (kHasRows<T>) {
      if (rows_) return run_rows(place, values);
    }
    Block<F> it{};
    it.lanes = padded_lanes(place.lanes);
    it.target = values.target;
    it.grad_loss = values.grad_loss;
    it.grad_position = values.grad_position;
    it.loss = values.loss;
    it.position = values.position;
    load_logits(place, it);
    if (call_.backward) aim_gradient(place, it);
    function_(it, bins_, positions_);
    if (call_.backward) store_gradient(place, it);
  }

 private:
  static constexpr bool kDirect = sizeof(T) == sizeof(F);

  DFL_INLINE void run_rows(const Place& place, const LaneValues<F>& values) {
    Rows<T> it{};
    it.lanes = padded_lanes(place.lanes);
    it.count = place.lanes;
    it.logits = static_cast<const T*>(call_.logits);
    it.offsets = place.logits;
    it.gradient = static_cast<T*>(call_.gradient);
    it.gradient_offsets = place.gradient;
    it.next = place.next ? place.next : place.logits;
    it.gradient_next = place.next ? place.gradient_next : place.gradient;
    it.ahead = place.next ? 0 : kAheadInRow;
    it.target = values.target;
    it.grad_loss = values.grad_loss;
    it.grad_position = values.grad_position;
    it.loss = values.loss;
    it.position = values.position;
    rows_(it, bins_, positions_);
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
      pad(place.logits, place.lanes);
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
  alignas(64) F max_[kMaxLanes];
};

}  // namespace dflkern
