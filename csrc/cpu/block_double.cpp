#include "call.h"

namespace dflkern {

// Double precision serves gradient checks and reference values: no number of bins is special.
template <>
BlockFunction<double> block_function<double>(const Call& call) {
  if (call.backward) {
    if (!call.position) return backward<double, 0, true, false>;
    return call.loss ? backward<double, 0, true, true> : backward<double, 0, false, true>;
  }
  if (!call.position) return forward<double, 0, true, false>;
  return call.loss ? forward<double, 0, true, true> : forward<double, 0, false, true>;
}

}  // namespace dflkern
