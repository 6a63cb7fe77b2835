// Weights and reductions of losses that lie in the order of the outputs. Sums are taken in stages
// of a fixed length, each by one thread, so that no result depends on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace dflkern {

constexpr int64_t kStage = 4096;  // values that one thread adds up

// Weights of losses; step 0: one for all, and null: none.
template <class F>
struct Weights {
  const F* data;
  int step;

  F operator()(F loss, int64_t i) const { return data ? loss * data[i * step] : loss; }
};

// The sum of the weighted losses from begin to end.
template <class F>
double weighted_sum(const F* loss, const Weights<F>& weight, int64_t begin, int64_t end) {
  constexpr int kParts = 16;
  double parts[kParts] = {};
  int64_t i = begin;
  for (; i + kParts <= end; i += kParts) {
    for (int p = 0; p < kParts; ++p) parts[p] += weight(loss[i + p], i + p);
  }
  for (; i < end; ++i) parts[i % kParts] += weight(loss[i], i);
  for (int width = kParts / 2; width > 0; width /= 2) {
    for (int p = 0; p < width; ++p) parts[p] += parts[p + width];
  }
  return parts[0];
}

// Which of the outputs are sides of one mean: output = (outer * sides + side) * inner + i.
struct Sides {
  int64_t sides, inner;
};

// Means begin to end of the weighted losses over the sides.
template <class F>
void side_means(const F* loss, const Weights<F>& weight, const Sides& at, int64_t begin,
                int64_t end, F* means) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t first = m / at.inner * at.sides * at.inner + m % at.inner;
    double sum = 0;
    for (int64_t s = 0; s < at.sides; ++s) {
      const int64_t output = first + s * at.inner;
      sum += weight(loss[output], output);
    }
    means[m] = static_cast<F>(sum / std::max<int64_t>(at.sides, 1));
  }
}

// The upstream gradients of losses begin to end, from those of the means over their sides.
template <class F>
void side_gradients(const F* grad, int step, const Weights<F>& weight, const Sides& at,
                    int64_t begin, int64_t end, F* gradients) {
  for (int64_t output = begin; output < end; ++output) {
    const int64_t mean = output / (at.sides * at.inner) * at.inner + output % at.inner;
    gradients[output] = weight(grad[mean * step] / at.sides, output);
  }
}

}  // namespace dflkern
