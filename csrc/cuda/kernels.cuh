// The names of the CUDA kernels and what a launch hands to them. The same name stands in the launch
// plan (dflkern/kernels/cuda_plans.py), in the PTX and in the table that the host searches.
//
//   <structure>_<what>_<direction>_k<bins>_<element>    rows, columns1, columns2
//   <structure>_<direction>_<element>                   general_rows, general_columns
//   boxes_<what>_<direction>_k<bins>_<element>          any number of bins for k0
//
// `what` is loss, decode or both; "asked" kernels take a project and compute what has a pointer.
// `what` of boxes is decode, loss or sums. Each of rows.cu, columns.cu, general.cu and boxes.cu is
// compiled once per DFL_ELEMENT.

#pragma once

#include <cstdint>

namespace dflkern {

constexpr int kThreads = 128;  // the most in a block
constexpr int kMaxBins = 256;

// A kernel's parameters are pointers, then `bound`, of the compute type, then 64-bit numbers.
struct Entry {
  const char* name;
  const void* function;
  int pointers, numbers;
  bool wide;  // whether the compute type is double
};
struct Entries {
  const Entry* first;
  int count;
};

}  // namespace dflkern

#define DFL_JOIN2(a, b) a##b
#define DFL_JOIN(a, b) DFL_JOIN2(a, b)
#define DFL_NAME(structure, what, direction, k) \
  DFL_JOIN(structure##_##what##_##direction##_k##k##_, DFL_ELEMENT)
#define DFL_GENERAL_NAME(structure, direction) \
  DFL_JOIN(general_##structure##_##direction##_, DFL_ELEMENT)

// X(structure, what, bins) for every kernel of a structure with a fixed number of bins.
#define DFL_EACH_BINS(X, structure, what) \
  X(structure, what, 8) X(structure, what, 16) X(structure, what, 17) X(structure, what, 33)
#define DFL_EACH(X, structure)                                          \
  DFL_EACH_BINS(X, structure, loss) DFL_EACH_BINS(X, structure, decode) \
  DFL_EACH_BINS(X, structure, both) DFL_EACH_BINS(X, structure, asked)
// 33 positions beside two distributions of 33 bins would take more than 128 registers.
#define DFL_EACH_PAIR(X)                                              \
  DFL_EACH_BINS(X, columns2, loss) DFL_EACH_BINS(X, columns2, decode) \
  DFL_EACH_BINS(X, columns2, both)                                    \
  X(columns2, asked, 8) X(columns2, asked, 16) X(columns2, asked, 17)

// X(file, element) for every compilation.
#define DFL_UNITS(X)                                                                          \
  X(rows, fp16) X(rows, bf16) X(rows, fp32) X(columns, fp16) X(columns, bf16) X(columns, fp32) \
  X(general, fp16) X(general, bf16) X(general, fp32) X(general, fp64)                           \
  X(boxes, fp16) X(boxes, bf16) X(boxes, fp32) X(boxes, fp64)
