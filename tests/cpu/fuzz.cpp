// Random calls of the CPU kernels without torch, for sanitizers: hostile values, strides, masks and
// alignments, in memory of exactly the size that is needed, against fuzz_model.h.
//
//     fuzz CASES SEED [FIRST]
//
// Case i of a seed is the same whatever runs before it. Exits with 1 if a case fails; where a
// sanitizer ends the process, FUZZ_VERBOSE=1 tells the case.

#include <cstdlib>

#include "fuzz_assign.h"
#include "fuzz_box_loss.h"
#include "fuzz_class_loss.h"
#include "fuzz_decode.h"
#include "fuzz_distributions.h"

namespace fuzz {
namespace {

template <class T>
void check(Random& random, Report& report) {
  arithmetic = sizeof(Compute<T>) == 8 ? kDouble : kFloat;
  switch (random.below(7)) {
    case 0:
    case 1:
      return DistributionsCase<T>(random, report).check();
    case 2:
      return DecodeCase<T>(random, report).check();
    case 3:
      return ClassLossCase<T>(random, report).check();
    case 4:
      return AssignCase<T>(random, report).check();
    default:
      return BoxLossCase<T>(random, report).check();
  }
}

bool fails(uint64_t seed, uint64_t index) {
  Random random(seed, index);
  Report report{"case " + std::to_string(index) + " of seed " + std::to_string(seed) + ":"};
  switch (random.below(4)) {
    case 0:
      check<float>(random, report);
      break;
    case 1:
      check<double>(random, report);
      break;
    case 2:
      check<Half>(random, report);
      break;
    default:
      check<BFloat16>(random, report);
  }
  return report.faults != 0;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  if (argc < 3) {
    std::printf("usage: %s CASES SEED [FIRST]\n", argv[0]);
    return 2;
  }
  const auto number = [&](int i) { return i < argc ? std::strtoull(argv[i], nullptr, 10) : 0; };
  const auto cases = number(1), seed = number(2), first = number(3);
  const bool verbose = std::getenv("FUZZ_VERBOSE") != nullptr;
  unsigned long long failed = 0;
  for (auto index = first; index < first + cases; ++index) {
    if (verbose) std::fprintf(stderr, "case %llu\n", index);
    failed += fuzz::fails(seed, index);
  }
  std::printf("seed %llu, from %llu: %llu cases, %llu failed\n", seed, first, cases, failed);
  return failed != 0;
}
