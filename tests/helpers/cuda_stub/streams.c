// Streams, events, and which streams are being captured into a CUDA graph. All work is done when
// it is given, so streams and events only have to be told apart.

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "stub.h"

enum { MAX_STREAMS = 1024 };

typedef struct {
  int device, priority;
  StubGraph* capture;
  unsigned long long capture_id;
} Stream;

typedef struct {
  StubGraph* capture;  // of the stream on which it was recorded
  unsigned long long capture_id;
  struct timespec time;
} Event;

static Stream streams[MAX_STREAMS];
static int created;
static unsigned long long captures;
static int capturing;  // captures that have begun and not ended
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// NULL for the default streams, whose handles are NULL, 1 and 2.
static Stream* stream_of(const void* handle) {
  return (size_t)handle <= 2 ? NULL : (Stream*)handle;
}

int stub_device_of_stream(const void* handle) {
  Stream* stream = stream_of(handle);
  return stream ? stream->device : stub_current_device();
}

StubGraph* stub_capture_of(const void* handle) {
  Stream* stream = stream_of(handle);
  return stream ? stream->capture : NULL;
}

bool stub_capturing(void) { return capturing > 0; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  pthread_mutex_lock(&lock);
  bool full = created == MAX_STREAMS;
  if (!full) {
    streams[created] = (Stream){.device = stub_current_device(), .priority = priority};
    *handle = (cudaStream_t)&streams[created++];
  }
  pthread_mutex_unlock(&lock);
  return full ? stub_fail(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithFlags(handle, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t handle) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Stream* stream = stream_of(handle);
  *priority = stream ? stream->priority : 0;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  stub_count(&stub_waits);
  return stub_capture_of(handle) ? stub_fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  if (stub_capture_of(handle)) return stub_fail(cudaErrorNotSupported);
  function(data);
  return cudaSuccess;
}

// ---- capture ----

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t handle, cudaGraph_t graph,
                                          const cudaGraphNode_t* dependencies,
                                          const cudaGraphEdgeData* edges, size_t count,
                                          enum cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  if (!stream) return stub_fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = (StubGraph*)graph;
  stream->capture_id = ++captures;
  ++capturing;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  cudaGraph_t graph = (cudaGraph_t)stub_graph_new();
  return cudaStreamBeginCaptureToGraph(handle, graph, NULL, NULL, 0, mode);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  StubGraph* captured = stub_capture_of(handle);
  if (!captured) return stub_fail(cudaErrorIllegalState);
  --capturing;
  if (graph) *graph = (cudaGraph_t)captured;
  for (int i = 0; i < created; ++i) {  // the streams that joined end with it
    if (streams[i].capture == captured) streams[i].capture = NULL;
  }
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus* status) {
  *status = stub_capture_of(handle) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Stream* stream = stream_of(handle);
  cudaStreamIsCapturing(handle, status);
  if (id) *id = stream ? stream->capture_id : 0;
  if (graph) *graph = (cudaGraph_t)stub_capture_of(handle);
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}

// Nodes run in the order in which they were added, so no dependencies are kept.
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t handle, cudaGraphNode_t* nodes,
                                                const cudaGraphEdgeData* edges, size_t count,
                                                unsigned flags) {
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  return cudaSuccess;
}

// ---- events ----

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  *handle = (cudaEvent_t)calloc(1, sizeof(Event));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  free(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
  Event* event = (Event*)handle;
  event->capture = stub_capture_of(stream);
  event->capture_id = event->capture ? stream_of(stream)->capture_id : 0;
  clock_gettime(CLOCK_MONOTONIC, &event->time);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}

// A stream that waits for an event of a captured stream joins the capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t waited, unsigned flags) {
  Stream* stream = stream_of(handle);
  Event* event = (Event*)waited;
  if (stream && event->capture && !stream->capture) {
    stream->capture = event->capture;
    stream->capture_id = event->capture_id;
  }
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) { return cudaSuccess; }

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  stub_count(&stub_waits);
  return cudaSuccess;
}

// The host's time between the two records: kernels take none.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  struct timespec from = ((Event*)start)->time, to = ((Event*)end)->time;
  double elapsed = (to.tv_sec - from.tv_sec) * 1e3 + (to.tv_nsec - from.tv_nsec) * 1e-6;
  *milliseconds = elapsed > 1e-3 ? (float)elapsed : 1e-3f;
  return cudaSuccess;
}
