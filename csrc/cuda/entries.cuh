// The parameters that kernels share, and the table of a file's kernels.

#pragma once

#include "kernels.cuh"

#define DFL_FORWARD_POINTERS(T)                                                        \
  const T *__restrict__ logits, const Compute<T>*__restrict__ target,                  \
      const Compute<T>*__restrict__ project, Compute<T>*__restrict__ loss,             \
      Compute<T>*__restrict__ position, Compute<T> bound
#define DFL_BACKWARD_POINTERS(T)                                                       \
  const T *__restrict__ logits, const Compute<T>*__restrict__ target,                  \
      const Compute<T>*__restrict__ project, const Compute<T>*__restrict__ grad_loss,  \
      const Compute<T>*__restrict__ grad_position, T*__restrict__ grad_logits, Compute<T> bound
#define DFL_FORWARD_VALUES logits, target, project, loss, position, bound
#define DFL_BACKWARD_VALUES logits, target, project, grad_loss, grad_position, grad_logits, bound

// Three axes of distributions, one for each of the grid's: strides in elements, n along the first.
#define DFL_AXES                                                                          \
  int64_t n, int64_t bin_stride, int64_t axis_stride, int64_t middle_stride,              \
      int64_t outer_stride, int64_t axis_output_stride, int64_t middle_output_stride,     \
      int64_t outer_output_stride
#define DFL_GRAD_AXES                                                                     \
  DFL_AXES, int64_t grad_bin_stride, int64_t axis_grad_stride, int64_t middle_grad_stride, \
      int64_t outer_grad_stride
#define DFL_AXES_VALUES                                                                   \
  n, bin_stride, axis_stride, middle_stride, outer_stride, axis_output_stride,            \
      middle_output_stride, outer_output_stride
#define DFL_GRAD_AXES_VALUES \
  DFL_AXES_VALUES, grad_bin_stride, axis_grad_stride, middle_grad_stride, outer_grad_stride
constexpr int kAxesNumbers = 8, kGradAxesNumbers = 12;

// Entry points for the templates `forward` and `backward` of a file, and their rows in its table.
#define DFL_ENTRY_POINT extern "C" __global__ void __launch_bounds__(dflkern::kThreads)
#define DFL_ENTRY(name, pointers, numbers)                                       \
  {DFL_TEXT(name), reinterpret_cast<const void*>(&name), pointers, numbers,      \
   sizeof(dflkern::Compute<dflkern::DFL_ELEMENT>) == sizeof(double)},
#define DFL_FORWARD_ENTRY(name, numbers) DFL_ENTRY(name, 5, numbers)
#define DFL_BACKWARD_ENTRY(name, numbers) DFL_ENTRY(name, 6, numbers)
#define DFL_TEXT2(a) #a
#define DFL_TEXT(a) DFL_TEXT2(a)
#define DFL_TABLE(file, entries)                                                 \
  namespace dflkern {                                                            \
  Entries DFL_JOIN(file##_, DFL_ELEMENT)() {                                     \
    static const Entry table[] = {entries};                                      \
    return {table, static_cast<int>(sizeof(table) / sizeof(Entry))};             \
  }                                                                              \
  }
