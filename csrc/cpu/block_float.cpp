#include "call.h"

namespace dflkern {
namespace {

template <int kBins>
BlockFunction<float> with_bins(const Call& call) {
  if (call.backward) {
    if (!call.position) return backward<float, kBins, true, false>;
    return call.loss ? backward<float, kBins, true, true> : backward<float, kBins, false, true>;
  }
  if (!call.position) return forward<float, kBins, true, false>;
  return call.loss ? forward<float, kBins, true, true> : forward<float, kBins, false, true>;
}

}  // namespace

template <>
BlockFunction<float> block_function<float>(const Call& call) {
  switch (call.bins) {
    case 8:
      return with_bins<8>(call);
    case 16:
      return with_bins<16>(call);
    case 17:
      return with_bins<17>(call);
    case 33:
      return with_bins<33>(call);
    default:
      return with_bins<0>(call);
  }
}

}  // namespace dflkern
