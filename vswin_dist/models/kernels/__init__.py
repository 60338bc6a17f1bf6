"""Kernels of the windowed attention and of the layers around it, for CPUs and for GPUs (Triton)."""
