"""DeepSeek-V4's operations as Triton kernels for NVIDIA GPUs (compute capability 8.0 to 12.0)."""
