// Launches: checked as a driver checks them, counted, and given to the hook.

#include <stddef.h>

#include "stub.h"

enum { MAX_THREADS = 1024, MAX_GRID_X = 2147483647, MAX_GRID_YZ = 65535, MAX_SHARED = 232448 };

static StubLaunchHook launch_hook;
static StubReplayHook replay_hook;

void stub_set_hooks(StubLaunchHook launch, StubReplayHook replay) {
  launch_hook = launch;
  replay_hook = replay;
}

void stub_replay(long launch, const void* stream) {
  if (replay_hook && launch) replay_hook(launch, stream);
}

static CUresult check(const StubLaunch* launch) {
  const unsigned *grid = launch->grid, *block = launch->block;
  for (int axis = 0; axis < 3; ++axis) {
    unsigned most = axis == 0 ? MAX_GRID_X : MAX_GRID_YZ;
    if (!grid[axis] || !block[axis] || grid[axis] > most) return CUDA_ERROR_INVALID_VALUE;
  }
  if ((size_t)block[0] * block[1] * block[2] > MAX_THREADS) return CUDA_ERROR_INVALID_VALUE;
  if (launch->shared_bytes > MAX_SHARED) return CUDA_ERROR_INVALID_VALUE;
  int device = launch->kernel->device;
  if (device >= 0 && device != launch->device) return CUDA_ERROR_INVALID_HANDLE;
  if (stub_device_of_stream(launch->stream) != launch->device) return CUDA_ERROR_INVALID_HANDLE;
  if ((size_t)launch->stream <= 1 && stub_capturing()) {
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;  // the default stream would join the capture
  }
  return CUDA_SUCCESS;
}

static CUresult perform(StubLaunch* launch, long* counter) {
  launch->device = stub_current_device();
  CUresult refusal = check(launch);
  if (refusal) return refusal;
  stub_count(counter);
  stub_spend_launch_time();
  StubGraph* graph = stub_capture_of(launch->stream);
  launch->captured = graph != NULL;
  long number = launch_hook ? launch_hook(launch) : 0;
  if (graph) stub_graph_add_launch(graph, number);
  return CUDA_SUCCESS;
}

// ---- the driver ----

CUresult cuLaunchKernelEx(const CUlaunchConfig* configuration, CUfunction function,
                          void** parameters, void** extra) {
  StubLaunch launch = {
      .kernel = (const StubKernel*)function,
      .grid = {configuration->gridDimX, configuration->gridDimY, configuration->gridDimZ},
      .block = {configuration->blockDimX, configuration->blockDimY, configuration->blockDimZ},
      .shared_bytes = configuration->sharedMemBytes,
      .stream = configuration->hStream,
      .parameters = parameters,
  };
  for (unsigned i = 0; i < configuration->numAttrs; ++i) {
    CUlaunchAttribute* each = &configuration->attrs[i];
    if (each->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    launch.cluster[0] = each->value.clusterDim.x;
    launch.cluster[1] = each->value.clusterDim.y;
    launch.cluster[2] = each->value.clusterDim.z;
  }
  return perform(&launch, &stub_driver_launches);
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void** parameters, void** extra) {
  CUlaunchConfig configuration = {grid_x,  grid_y, grid_z, block_x, block_y,
                                  block_z, shared, stream, NULL,    0};
  return cuLaunchKernelEx(&configuration, function, parameters, extra);
}

// ---- the runtime ----

static cudaError_t launch_registered(const void* host_function, dim3 grid, dim3 block,
                                     void** parameters, size_t shared, cudaStream_t stream) {
  StubKernel kernel = {.name = "", .device = -1};
  if (launch_hook) kernel = stub_registered_kernel(host_function);
  StubLaunch launch = {
      .kernel = &kernel,
      .grid = {grid.x, grid.y, grid.z},
      .block = {block.x, block.y, block.z},
      .shared_bytes = (unsigned)shared,
      .stream = stream,
      .parameters = parameters,
  };
  switch (perform(&launch, &stub_runtime_launches)) {
    case CUDA_SUCCESS:
      return cudaSuccess;
    case CUDA_ERROR_INVALID_HANDLE:
      return stub_fail(cudaErrorInvalidResourceHandle);
    case CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
      return stub_fail(cudaErrorStreamCaptureImplicit);
    default:
      return stub_fail(cudaErrorInvalidConfiguration);
  }
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** parameters,
                             size_t shared, cudaStream_t stream) {
  return launch_registered(function, grid, block, parameters, shared, stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters,
                               size_t shared, cudaStream_t stream) {
  return launch_registered(kernel, grid, block, parameters, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function,
                                void** parameters) {
  return launch_registered(function, configuration->gridDim, configuration->blockDim, parameters,
                           configuration->dynamicSmemBytes, configuration->stream);
}

// Between the two, kernel<<<…>>>(…) has the compiler's stub function called.
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared = shared;
  pushed.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void**)stream = pushed.stream;
  return cudaSuccess;
}
