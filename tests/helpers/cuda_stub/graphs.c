// CUDA graphs: a list of launches, copies and fills, done again in their order. They are small and
// kept until the process ends, since a graph and what is instantiated from it share the list.

#include <stdlib.h>
#include <string.h>

#include "stub.h"

typedef struct {
  enum { LAUNCH, COPY, FILL } kind;
  long launch;
  void* to;
  const void* from;
  int value;
  size_t bytes;
} Node;

struct StubGraph {
  Node* nodes;
  size_t count, room;
};

StubGraph* stub_graph_new(void) { return calloc(1, sizeof(StubGraph)); }

static void add(StubGraph* graph, Node node) {
  if (graph->count == graph->room) {
    graph->room = graph->room ? 2 * graph->room : 16;
    graph->nodes = realloc(graph->nodes, graph->room * sizeof(Node));
  }
  graph->nodes[graph->count++] = node;
}

void stub_graph_add_launch(StubGraph* graph, long launch) {
  add(graph, (Node){.kind = LAUNCH, .launch = launch});
}

void stub_graph_add_copy(StubGraph* graph, void* to, const void* from, size_t bytes) {
  add(graph, (Node){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}

void stub_graph_add_fill(StubGraph* graph, void* to, int value, size_t bytes) {
  add(graph, (Node){.kind = FILL, .to = to, .value = value, .bytes = bytes});
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  *graph = (cudaGraph_t)stub_graph_new();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  stub_count(&stub_runtime_launches);
  stub_spend_launch_time();
  StubGraph* graph = (StubGraph*)executable;
  for (size_t i = 0; i < graph->count; ++i) {
    Node* node = &graph->nodes[i];
    switch (node->kind) {
      case LAUNCH:
        stub_replay(node->launch, stream);
        break;
      case COPY:
        memmove(node->to, node->from, node->bytes);
        break;
      case FILL:
        memset(node->to, node->value, node->bytes);
        break;
    }
  }
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = ((StubGraph*)graph)->count;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return cudaSuccess; }

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, cudaHostFn_t destroy,
                                 unsigned count, unsigned flags) {
  *object = (cudaUserObject_t)data;
  return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) { return cudaSuccess; }

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags) {
  return cudaSuccess;
}
