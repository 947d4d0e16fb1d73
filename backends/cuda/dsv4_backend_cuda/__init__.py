"""DeepSeek-V4's operations as Triton kernels for NVIDIA GPUs (compute capability 8.0 to 12.x)."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

# a broken device extension would fail `import torch` for everyone
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def __getattr__(name: str) -> ModuleType:
    """Import the plug-in when its entry point asks for it: `dsv4 --help` comes by here for the
    command, and needs no torch.
    """
    if name == "plugin":
        return import_module("dsv4_backend_cuda.plugin")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
