// Random numbers, memory of exactly the size that is needed, and strides for it.

#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FUZZ_POISON(begin, size) __asan_poison_memory_region(begin, size)
#define FUZZ_UNPOISON(begin, size) __asan_unpoison_memory_region(begin, size)
#else
#define FUZZ_POISON(begin, size)
#define FUZZ_UNPOISON(begin, size)
#endif

#include "call.h"
#include "convert.h"
#include "fuzz_model.h"

namespace fuzz {

using dflkern::Storage;

template <class T>
struct Stored;
template <>
struct Stored<float> {
  static constexpr Storage kStorage = Storage::kFloat;
  static constexpr const Format& kFormat = kFloat;
};
template <>
struct Stored<double> {
  static constexpr Storage kStorage = Storage::kDouble;
  static constexpr const Format& kFormat = kDouble;
};
template <>
struct Stored<dflkern::Half> {
  static constexpr Storage kStorage = Storage::kHalf;
  static constexpr const Format& kFormat = kHalf;
};
template <>
struct Stored<dflkern::BFloat16> {
  static constexpr Storage kStorage = Storage::kBFloat16;
  static constexpr const Format& kFormat = kBFloat16;
};

class Random {
 public:
  Random(uint64_t seed, uint64_t index) {
    std::seed_seq words{uint32_t(seed), uint32_t(seed >> 32), uint32_t(index),
                        uint32_t(index >> 32)};
    engine_.seed(words);
  }
  int below(int count) { return static_cast<int>(engine_() % static_cast<uint64_t>(count)); }
  bool one_in(int count) { return below(count) == 0; }
  double uniform(double low, double high) {
    return low + (high - low) * (static_cast<double>(engine_() >> 11) * 0x1p-53);
  }
  template <class V>
  V pick(std::initializer_list<V> options) {
    return options.begin()[below(static_cast<int>(options.size()))];
  }
  template <class V, size_t N>
  V pick(const V (&options)[N]) {
    return options[below(N)];
  }
  // A number of a kind: 0 ordinary, 1 with special values among them, 2 the ends of the formats,
  // 3 all alike, 4 far apart.
  double number(int kind, double scale) {
    const double ordinary = uniform(-scale, scale) + uniform(-scale, scale);
    if (kind == 3) return scale / 2;
    if (kind == 4) return ordinary * (one_in(10) ? 1e3 : 1);
    if (kind == 2) {
      return pick({3.3e38, -3.3e38, 65504.0, -65504.0, 1e-38, 1e-45, 6e-8, 0.0, -0.0, -1e-38});
    }
    if (kind == 1 && one_in(8)) {
      return pick({kNan, kInf, -kInf, 1e30, -1e30, 0.0, -0.0, 1e-40, 65504.0, -65504.0});
    }
    return ordinary;
  }
  int kind() { return one_in(2) ? pick({0, 4}) : below(5); }

 private:
  std::mt19937_64 engine_;
};

// `size` elements that end where their memory ends, and begin a few elements after its beginning,
// aligned for one element and no more.
template <class T>
class Memory {
 public:
  Memory(Random& random, int64_t size)
      : size_(size), before_(random.one_in(2) ? random.below(8) : 0) {
    data_.reset(new T[size_ + before_]());
    FUZZ_POISON(data_.get(), before_ * sizeof(T));
  }
  Memory(const Memory&) = delete;
  ~Memory() { FUZZ_UNPOISON(data_.get(), before_ * sizeof(T)); }

  T* get() { return data_.get() + before_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[before_ + i]; }
  double value(int64_t i) const { return dflkern::widened(data_[before_ + i]); }
  void set(int64_t i, double x) {
    using F = dflkern::Compute<T>;
    dflkern::narrow(static_cast<F>(x), data_[before_ + i]);
  }
  void fill(Random& random, int kind, double scale) {
    for (int64_t i = 0; i < size_; ++i) set(i, random.number(kind, scale));
  }

 private:
  const int64_t size_, before_;
  std::unique_ptr<T[]> data_;
};

// How the elements of a tensor lie in memory.
struct Strides {
  std::vector<int64_t> of;
  int64_t extent;  // from the first element to behind the last one
};

// Dense in a random order of the axes, with gaps if `loose`, or elements that share memory if
// `shared`; the last axis is the innermost one half of the time.
inline Strides strides_for(Random& random, const std::vector<int64_t>& sizes, bool loose,
                           bool shared) {
  const int axes = static_cast<int>(sizes.size());
  std::vector<int> order(axes);
  for (int a = 0; a < axes; ++a) order[a] = axes - 1 - a;
  if (random.one_in(2)) {
    for (int a = axes - 1; a > 0; --a) std::swap(order[a], order[random.below(a + 1)]);
  }
  Strides strides{std::vector<int64_t>(axes), 1};
  int64_t step = loose && random.one_in(3) ? 1 + random.below(3) : 1;
  for (const int a : order) {
    strides.of[a] = step;
    if (shared && random.one_in(3)) strides.of[a] = random.below(4);
    step *= std::max<int64_t>(sizes[a], 1);
    if (loose && random.one_in(3)) step += random.below(6);
  }
  for (int a = 0; a < axes; ++a) {
    if (sizes[a] == 0) return {strides.of, 0};
    strides.extent += (sizes[a] - 1) * strides.of[a];
  }
  return strides;
}

inline int64_t place(const Strides& strides, const std::vector<int64_t>& sizes, int64_t index) {
  int64_t offset = 0;
  for (int a = static_cast<int>(sizes.size()) - 1; a >= 0; --a) {
    offset += index % sizes[a] * strides.of[a];
    index /= sizes[a];
  }
  return offset;
}

// What is wrong with the case that runs now.
struct Report {
  std::string what;
  int faults = 0;

  void expect(bool condition, const char* name, int64_t at, double actual, Number expected) {
    if (condition) return;
    if (++faults > 3) return;
    std::printf("FAILED %s: %s at %lld is %.9g, expected %.9g within %.3g\n", what.c_str(), name,
                static_cast<long long>(at), actual, expected.v, 4 * expected.r);
  }
};

// Calls function(begin, end) for pieces of random lengths, as threads would.
template <class Function>
void in_pieces(Random& random, int64_t count, Function function) {
  for (int64_t begin = 0; begin < count;) {
    const int most = random.one_in(2) ? 4 : 4000;
    const int64_t end = std::min<int64_t>(count, begin + 1 + random.below(most));
    function(begin, end);
    begin = end;
  }
}

}  // namespace fuzz
