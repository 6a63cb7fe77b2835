// Device memory is ordinary memory, so that copies copy and a test can read what a kernel would.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "stub.h"

enum { MAX_ALLOCATIONS = 4096, PAGE = 4096 };

typedef struct {
  char* start;
  size_t bytes;
  int device;
} Allocation;

static Allocation allocations[MAX_ALLOCATIONS];
static int allocated;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Allocation* holding(const void* address) {
  for (int i = 0; i < allocated; ++i) {
    Allocation* each = &allocations[i];
    if ((char*)address >= each->start && (char*)address < each->start + each->bytes) return each;
  }
  return NULL;
}

int stub_device_of_address(const void* address) {
  pthread_mutex_lock(&lock);
  Allocation* found = holding(address);
  int device = found ? found->device : -1;
  pthread_mutex_unlock(&lock);
  return device;
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  stub_count(&stub_allocations);
  size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
  *address = mmap(NULL, rounded, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*address == MAP_FAILED) return stub_fail(cudaErrorMemoryAllocation);
  long fill = stub_setting("STUB_FILL", 0);
  if (fill) memset(*address, (int)fill, rounded);
  pthread_mutex_lock(&lock);
  bool full = allocated == MAX_ALLOCATIONS;
  if (!full) {
    allocations[allocated++] = (Allocation){*address, rounded, stub_current_device()};
  }
  pthread_mutex_unlock(&lock);
  return full ? stub_fail(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  pthread_mutex_lock(&lock);
  Allocation* found = holding(address);
  if (found) {
    munmap(found->start, found->bytes);
    *found = allocations[--allocated];
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t stream) {
  return cudaMalloc(address, bytes);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t stream) { return cudaFree(address); }

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags) {
  *address = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
  return *address ? cudaSuccess : stub_fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void* address) {
  free(address);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void* address) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  *unused = 70ull << 30;
  *total = 80ull << 30;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  *pool = NULL;
  return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
  return stub_fail(cudaErrorNotSupported);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes,
                                     const void* address) {
  int device = stub_device_of_address(address);
  *attributes = (struct cudaPointerAttributes){
      .type = device < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice,
      .device = device,
      .devicePointer = device < 0 ? NULL : (void*)address,
      .hostPointer = device < 0 ? (void*)address : NULL,
  };
  return cudaSuccess;
}

// Triton asks it of every pointer, to refuse tensors on the CPU.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  if (stub_device_of_address((void*)address) < 0) return CUDA_ERROR_INVALID_VALUE;
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr*)value = address;
  return CUDA_SUCCESS;
}

// ---- copies and fills ----

// What a 4- or 8-byte copy to the host returns where STUB_D2H says so: for code that reads a
// number back which no kernel has written, such as `.item()`.
static void answer(void* to, size_t bytes, enum cudaMemcpyKind kind) {
  if (kind != cudaMemcpyDeviceToHost || (bytes != 4 && bytes != 8) || !getenv("STUB_D2H")) return;
  long number = atol(getenv("STUB_D2H"));
  memcpy(to, &number, bytes);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  stub_count(&stub_copies);
  stub_spend_launch_time();
  StubGraph* graph = stub_capture_of(stream);
  if (graph) {
    stub_graph_add_copy(graph, to, from, bytes);
  } else {
    memmove(to, from, bytes);
    answer(to, bytes, kind);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

// Where kernels have symbols, which only PyTorch's do: nothing to do.
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  stub_count(&stub_runtime_launches);
  stub_spend_launch_time();
  StubGraph* graph = stub_capture_of(stream);
  if (graph) {
    stub_graph_add_fill(graph, to, value, bytes);
  } else {
    memset(to, value, bytes);
  }
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, NULL);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  return (CUresult)cudaMemsetAsync((void*)to, value, bytes, stream);
}
