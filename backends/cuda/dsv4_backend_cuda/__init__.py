"""DeepSeek-V4's operations as Triton kernels for NVIDIA GPUs (compute capability 8.0 to 12.x). Importing it imports PyTorch, and no Triton."""

import os

# a broken device extension would fail `import torch` for everyone
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from dsv4_backend_cuda import plugin
from dsv4_backend_cuda.backend import CudaBackend

__all__ = ["CudaBackend", "plugin"]
