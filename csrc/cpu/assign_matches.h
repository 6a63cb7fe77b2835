// Matches: pairs of an object and an anchor, and the best of them.

#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace dflkern {

// A pair of an object and an anchor.
template <class F>
struct Match {
  int32_t object, anchor;
  F metric, overlap;
};

// An order without ties: the larger metric, then the first anchor.
template <class F>
bool is_better(const Match<F>& a, const Match<F>& b) {
  return a.metric != b.metric ? a.metric > b.metric : a.anchor < b.anchor;
}

// The best pairs of one object so far, the worst of them first.
template <class F>
class Claims {
 public:
  Claims(Match<F>* pairs, int64_t most) : pairs_(pairs), most_(most) {}

  int64_t count() const { return count_; }
  // What a metric must exceed.
  F floor() const { return count_ < most_ ? F(0) : pairs_[0].metric; }
  void add(const Match<F>& pair) {
    if (count_ == most_) std::pop_heap(pairs_, pairs_ + count_--, is_better<F>);
    pairs_[count_++] = pair;
    std::push_heap(pairs_, pairs_ + count_, is_better<F>);
  }

 private:
  Match<F>* pairs_;
  int64_t count_ = 0, most_;
};

// Keeps the best of each object whose metric is not 0, at most so many.
template <class F>
void keep_best(std::vector<Match<F>>& pairs, int64_t most) {
  std::sort(pairs.begin(), pairs.end(), [](const Match<F>& a, const Match<F>& b) {
    return a.object != b.object ? a.object < b.object : is_better(a, b);
  });
  int64_t count = 0, kept = 0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    count = i && pairs[i].object == pairs[i - 1].object ? count + 1 : 1;
    if (count <= most && pairs[i].metric > 0) pairs[kept++] = pairs[i];
  }
  pairs.resize(kept);
}

}  // namespace dflkern
