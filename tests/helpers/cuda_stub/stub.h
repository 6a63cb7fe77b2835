// What the parts of the stub device share. See README.md.

#ifndef CUDA_STUB_H
#define CUDA_STUB_H

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

// Counters, read from Python by ctypes.
extern long stub_runtime_launches;  // kernels and memsets through the runtime; graph launches
extern long stub_driver_launches;   // kernels through the driver: Triton's, Inductor's, NVRTC's
extern long stub_copies;
extern long stub_allocations;
extern long stub_waits;       // the host waited for a device, a stream or an event
extern long stub_file_calls;  // the host looked at the file system

// A kernel: of a module that was loaded through the driver, or one that nvcc registered.
typedef struct {
  const char* name;   // the entry's name; mangled for C++
  const void* image;  // what was loaded: a cubin, PTX, or nvcc's fat binary
  size_t image_size;  // 0 if it is not known
  int device;         // where the module is loaded; -1: on any device
} StubKernel;

// A launch, as the hook gets it. `parameters` points at the kernel's arguments, one by one.
typedef struct {
  const StubKernel* kernel;
  unsigned grid[3], block[3], cluster[3];
  unsigned shared_bytes;
  const void* stream;
  int device;
  int captured;  // 1: goes into a CUDA graph instead of running now
  void** parameters;
} StubLaunch;

// Called at each launch. For a captured one it keeps the arguments and returns a number for the
// launch, with which `replay` is called whenever the graph runs.
typedef long (*StubLaunchHook)(const StubLaunch* launch);
typedef void (*StubReplayHook)(long launch, const void* stream);
void stub_set_hooks(StubLaunchHook launch, StubReplayHook replay);

// device.c
long stub_setting(const char* name, long otherwise);
int stub_device_count(void);
int stub_current_device(void);
void stub_select_device(int device);
void stub_count(long* counter);
void stub_spend_launch_time(void);
cudaError_t stub_fail(cudaError_t error);  // returns it, and cudaGetLastError will

// memory.c
int stub_device_of_address(const void* address);  // -1: of no device

// streams.c. The default stream belongs to the current device.
typedef struct StubGraph StubGraph;
int stub_device_of_stream(const void* stream);
StubGraph* stub_capture_of(const void* stream);  // NULL: the stream is not being captured
bool stub_capturing(void);                       // whether any stream is

// graphs.c
StubGraph* stub_graph_new(void);
void stub_graph_add_launch(StubGraph* graph, long launch);
void stub_graph_add_copy(StubGraph* graph, void* to, const void* from, size_t bytes);
void stub_graph_add_fill(StubGraph* graph, void* to, int value, size_t bytes);

// modules.c
StubKernel stub_registered_kernel(const void* host_function);

// launches.c
void stub_replay(long launch, const void* stream);

#endif
