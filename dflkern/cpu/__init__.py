"""The C++ library for CPUs: its compiler, what finds or builds it, and calls of its operators."""
