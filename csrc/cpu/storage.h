// The storage type of the logits, known at run time, as a type.

#pragma once

#include "call.h"
#include "convert.h"

namespace dflkern {

// Calls function with a number of the storage type.
template <class Function>
void with_storage(Storage storage, Function function) {
  switch (storage) {
    case Storage::kFloat:
      return function(float());
    case Storage::kDouble:
      return function(double());
    case Storage::kHalf:
      return function(Half());
    case Storage::kBFloat16:
      return function(BFloat16());
  }
}

}  // namespace dflkern
