// The CUDA operator, on LibTorch's stable ABI and without Python: _cuda_launch runs a kernel of
// this library as a launch plan says (dflkern/gpu/cuda/plans.py).

#include <cuda_runtime.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.cuh"

namespace dflkern {

#define DFL_DECLARE(file, element) Entries file##_##element();
DFL_UNITS(DFL_DECLARE)

namespace {

using torch::stable::Tensor;
using Tensors = std::vector<std::optional<Tensor>>;

const Entry& find(const std::string& kernel) {
  static const auto* table = [] {
    auto* result = new std::unordered_map<std::string, Entry>;
#define DFL_INSERT(file, element)                             \
  for (int i = 0; i < file##_##element().count; ++i) {        \
    const Entry& entry = file##_##element().first[i];         \
    result->emplace(entry.name, entry);                       \
  }
    DFL_UNITS(DFL_INSERT)
    return result;
  }();
  const auto found = table->find(kernel);
  STD_TORCH_CHECK(found != table->end(), "dflkern: this library has no kernel ", kernel,
                  "; it was built from other sources, which python -m dflkern build --cuda cures");
  return found->second;
}

void check(cudaError_t error, const std::string& kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, "dflkern: the launch of ", kernel, " failed: ",
                  cudaGetErrorString(error));
}

// Every tensor is on the device of the first, which holds the logits; none stands for null.
void cuda_launch(std::string kernel, std::vector<int64_t> grid, int64_t block, int64_t shared,
                 Tensors tensors, std::vector<int64_t> numbers, double bound) {
  const Entry& entry = find(kernel);
  STD_TORCH_CHECK(grid.size() == 3 && static_cast<int>(tensors.size()) == entry.pointers &&
                      static_cast<int>(numbers.size()) == entry.numbers && tensors[0],
                  "dflkern: ", kernel, " takes a grid of 3 axes, ", entry.pointers,
                  " tensors, the first of them the logits, and ", entry.numbers, " numbers, not ",
                  grid.size(), ", ", tensors.size(), " and ", numbers.size());
  std::vector<void*> pointers;
  for (const auto& tensor : tensors) {
    STD_TORCH_CHECK(!tensor || (tensor->is_cuda() &&
                                tensor->get_device_index() == tensors[0]->get_device_index()),
                    "dflkern: the CUDA kernels take tensors of one CUDA device; move them there, "
                    "or let use_backend(\"auto\") choose");
    pointers.push_back(tensor ? const_cast<void*>(tensor->const_data_ptr()) : nullptr);
  }
  float narrow_bound = static_cast<float>(bound);
  std::vector<void*> parameters;
  for (void*& pointer : pointers) parameters.push_back(&pointer);
  parameters.push_back(entry.wide ? static_cast<void*>(&bound) : &narrow_bound);
  for (int64_t& number : numbers) parameters.push_back(&number);

  const int32_t device = tensors[0]->get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const dim3 blocks(static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]),
                    static_cast<unsigned>(grid[2]));
  check(cudaLaunchKernel(entry.function, blocks, dim3(static_cast<unsigned>(block)),
                         parameters.data(), static_cast<size_t>(shared),
                         static_cast<cudaStream_t>(stream)),
        kernel);
}

}  // namespace
}  // namespace dflkern

STABLE_TORCH_LIBRARY_FRAGMENT(dflkern, m) {
  m.def(
      "_cuda_launch(str kernel, int[] grid, int block, int shared, Tensor(a!)?[] tensors, "
      "int[] numbers, float bound) -> ()");
}

// For every device, so that tensors of another get a sentence.
STABLE_TORCH_LIBRARY_IMPL(dflkern, CompositeExplicitAutograd, m) {
  m.impl("_cuda_launch", TORCH_BOX(&dflkern::cuda_launch));
}
