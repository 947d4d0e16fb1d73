"""DeepSeek-V4's operations as Triton kernels for NVIDIA GPUs (compute capability 8.0 to 12.x). Importing it imports PyTorch, and no Triton."""

from dsv4_backend_cuda import plugin
from dsv4_backend_cuda.backend import CudaBackend

__all__ = ["CudaBackend", "plugin"]
