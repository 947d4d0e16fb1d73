"""The torch backend: every op in plain PyTorch, for any PyTorch device; the base that cuda and ascend extend."""

import os

# a broken device extension would fail `import torch` for everyone
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from dsv4_backend_torch import plugin
from dsv4_backend_torch.backend import TorchBackend

__all__ = ["TorchBackend", "plugin"]
