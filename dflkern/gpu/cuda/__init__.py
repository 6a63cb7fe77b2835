"""The CUDA C++ library and the launch plans of its kernels."""
