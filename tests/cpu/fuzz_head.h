// The logits of a detection head, whole or by distribution.

#pragma once

#include "boxes.h"
#include "fuzz_support.h"

namespace fuzz {

using namespace dflkern;

constexpr int kBins[] = {2,  2,  3,  4,  7,  8,  9,  10, 15,  16,  16,
                         17, 19, 22, 31, 32, 33, 64, 91, 128, 255, 256};

// Increasing positions of bins, or none for 0, 1, ..., K - 1.
template <class F>
std::vector<F> positions_for(Random& random, int bins) {
  std::vector<F> project;
  if (random.one_in(2)) return project;
  double at = random.pick({0.0, -1.5, 7.0, -0.5 * bins});
  for (int k = 0; k < bins; ++k, at += random.uniform(0.5, 2)) project.push_back(F(at));
  return project;
}

inline int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

// Plans a call and runs its blocks in pieces.
inline void run_all(Random& random, Call& call) {
  plan(call);
  in_pieces(random, call.lines * call.blocks_per_line,
            [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

// What the two operations on boxes have in common: a head's logits, and anchor points.
template <class T>
struct Head {
  using F = Compute<T>;

  Head(Random& random, int64_t most_anchors)
      : bins(random.pick(kBins)),
        anchors(std::min<int64_t>(most_anchors, std::max(1500 / bins, 2))),
        batch(random.pick({0, 1, 1, 2, 3})),
        sides_last(random.one_in(2)),
        shape(sides_last ? std::vector<int64_t>{batch, anchors, kSides, bins}
                         : std::vector<int64_t>{batch, kSides, bins, anchors}),
        strides(strides_for(random, shape, true, random.one_in(5))),
        dense(random.one_in(2) ? in_order(shape) : strides_for(random, shape, false, false)),
        logits(random, strides.extent),
        gradient(random, dense.extent),
        points(random, 2 * anchors),
        project(positions_for<F>(random, bins)),
        positions(random, project.size()) {
    for (size_t k = 0; k < project.size(); ++k) positions[k] = project[k];
    logits.fill(random, random.kind(), 6);
    const int kind = random.pick({0, 0, 0, 1, 4});
    for (int64_t i = 0; i < 2 * anchors; ++i) {
      points[i] = kind ? F(random.number(kind, 20)) : F(random.below(20) + 0.5);
    }
  }

  static Strides in_order(const std::vector<int64_t>& shape) {
    Strides strides{std::vector<int64_t>(shape.size()), count_of(shape)};
    int64_t step = 1;
    for (int a = static_cast<int>(shape.size()) - 1; a >= 0; --a) {
      strides.of[a] = step;
      step *= shape[a];
    }
    return strides;
  }

  const F* positions_or_null() { return project.empty() ? nullptr : positions.get(); }
  int64_t anchor_axis() const { return sides_last ? 1 : 3; }
  int64_t side_axis() const { return sides_last ? 2 : 1; }
  int64_t bin_axis() const { return sides_last ? 3 : 2; }
  int64_t offset(const Strides& of, int64_t image, int64_t anchor, int side, int bin) const {
    return image * of.of[0] + anchor * of.of[anchor_axis()] + side * of.of[side_axis()] +
           bin * of.of[bin_axis()];
  }
  Distribution distribution(int64_t image, int64_t anchor, int side) {
    std::vector<double> z;
    for (int k = 0; k < bins; ++k) {
      z.push_back(logits.value(offset(strides, image, anchor, side, k)));
    }
    return Distribution(z, project.empty() ? nullptr : project.data());
  }

  // Bins, logits, gradient and positions of a call.
  void describe(Call& call) {
    call.storage = Stored<T>::kStorage;
    call.logits = logits.get();
    call.project = positions_or_null();
    call.bins = bins;
    call.bin_stride = strides.of[bin_axis()];
    call.gradient = gradient.get();
    call.gradient_bin_stride = dense.of[bin_axis()];
  }

  int bins;
  int64_t anchors, batch;
  bool sides_last;
  std::vector<int64_t> shape;
  Strides strides, dense;
  Memory<T> logits, gradient;
  Memory<F> points;
  std::vector<F> project;
  Memory<F> positions;
};

}  // namespace fuzz
