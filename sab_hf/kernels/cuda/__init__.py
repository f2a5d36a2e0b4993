"""`sab::linear` on CUDA devices: Triton kernels, their launches and their tiles."""
