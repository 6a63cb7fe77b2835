// A kernel that does nothing, to find out whether this machine compiles, loads and starts one.

namespace dflkern {

__global__ void probe() {}

}  // namespace dflkern
