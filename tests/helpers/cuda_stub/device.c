// Devices, contexts, attributes, versions and errors.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "stub.h"

long stub_runtime_launches, stub_driver_launches, stub_copies, stub_allocations, stub_waits;

enum { MAX_DEVICES = 16, WARP = 32, PROCESSORS = 132, REGISTERS = 65536 };
enum { SHARED = 49152, SHARED_OPTIN = 232448, SHARED_PROCESSOR = 233472 };

static char contexts[MAX_DEVICES];  // the address of each is its handle
static __thread int current;
static __thread cudaError_t last_error;

long stub_setting(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text ? atol(text) : otherwise;
}

void stub_count(long* counter) { __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED); }

void stub_spend_launch_time(void) {
  static long cost = -1;
  if (cost < 0) cost = stub_setting("STUB_LAUNCH_NS", 0);
  if (!cost) return;
  struct timespec start, now;
  clock_gettime(CLOCK_MONOTONIC, &start);
  do clock_gettime(CLOCK_MONOTONIC, &now);
  while ((now.tv_sec - start.tv_sec) * 1000000000L + (now.tv_nsec - start.tv_nsec) < cost);
}

cudaError_t stub_fail(cudaError_t error) { return last_error = error; }

static long driver_version(void) { return stub_setting("STUB_DRIVER", 13000); }
static int capability(void) { return (int)stub_setting("STUB_CC", 90); }
int stub_device_count(void) { return (int)stub_setting("STUB_GPUS", 1); }
int stub_current_device(void) { return current; }
void stub_select_device(int device) { current = device; }
static bool exists(int device) { return device >= 0 && device < stub_device_count(); }

// ---- the runtime ----

cudaError_t cudaGetDeviceCount(int* count) {
  *count = stub_device_count();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!exists(device)) return stub_fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = (int)driver_version();
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  if (!exists(device)) return stub_fail(cudaErrorInvalidDevice);
  *properties = (struct cudaDeviceProp){
      .name = "Stub H100",
      .totalGlobalMem = 80ull << 30,
      .sharedMemPerBlock = SHARED,
      .sharedMemPerBlockOptin = SHARED_OPTIN,
      .sharedMemPerMultiprocessor = SHARED_PROCESSOR,
      .regsPerBlock = REGISTERS,
      .regsPerMultiprocessor = REGISTERS,
      .warpSize = WARP,
      .maxThreadsPerBlock = 1024,
      .maxThreadsPerMultiProcessor = 2048,
      .maxBlocksPerMultiProcessor = 32,
      .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535},
      .major = capability() / 10,
      .minor = capability() % 10,
      .multiProcessorCount = PROCESSORS,
      .l2CacheSize = 50 << 20,
      .memoryBusWidth = 5120,
      .unifiedAddressing = 1,
      .canMapHostMemory = 1,
      .concurrentKernels = 1,
      .asyncEngineCount = 3,
      .textureAlignment = 512,
  };
  return cudaSuccess;
}

// CUdevice_attribute and cudaDeviceAttr have the same numbers.
static int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return capability() / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return capability() % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return PROCESSORS;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return SHARED;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return SHARED_OPTIN;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return SHARED_PROCESSOR;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return WARP;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return REGISTERS;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 65535;
    default:
      return 1;
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int device) {
  *value = attribute((int)which);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, (size_t)size, "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return stub_fail(cudaErrorPeerAccessUnsupported);
}

cudaError_t cudaDeviceSynchronize(void) {
  stub_count(&stub_waits);
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

static const char* words(int error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorInvalidKernelImage:
      return "device kernel image is invalid";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "an error of the stub device";
  }
}

const char* cudaGetErrorString(cudaError_t error) { return words((int)error); }
const char* cudaGetErrorName(cudaError_t error) { return words((int)error); }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// ---- the driver ----

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = (int)driver_version();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = stub_device_count();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (!exists(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  *value = attribute((int)which);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)&contexts[current];
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) current = (int)((char*)context - contexts);
  return CUDA_SUCCESS;
}

static __thread int pushed[64], depth;

CUresult cuCtxPushCurrent(CUcontext context) {
  pushed[depth++ % 64] = current;
  return cuCtxSetCurrent(context);
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (context) cuCtxGetCurrent(context);
  if (depth > 0) current = pushed[--depth % 64];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)&contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = words((int)error);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

// ---- functions by name ----

static CUresult unsupported(void) { return CUDA_ERROR_NOT_SUPPORTED; }

// Functions that changed since their first version end in _v2, which callers leave out.
static void* function_named(const char* name) {
  char newer[128];
  snprintf(newer, sizeof newer, "%s_v2", name);
  void* found = dlsym(RTLD_DEFAULT, newer);
  return found ? found : dlsym(RTLD_DEFAULT, name);
}

CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult* result) {
  *function = function_named(name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// Private functions of the driver. NVRTC asks for some and reads how long their table is: empty.
CUresult cuGetExportTable(const void** table, const CUuuid* which) {
  static const size_t empty[1] = {sizeof empty};
  *table = empty;
  return CUDA_SUCCESS;
}

// PyTorch asks for functions that it may never call, and refuses to start without them.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult* result) {
  *function = function_named(name);
  if (!*function) *function = (void*)unsupported;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
