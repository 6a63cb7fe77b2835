"""The CUDA kernels: their launch plans, their compiler, and loading."""
