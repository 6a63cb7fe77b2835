"""Triton kernels and their launch plans; only the modules of kernels import Triton."""
