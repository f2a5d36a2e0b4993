"""Triton kernels of fitting; each has its specification in PyTorch beside its call."""
