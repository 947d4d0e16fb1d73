"""The torch backend: every op in plain PyTorch, for any PyTorch device; the base that cuda and ascend extend."""

from dsv4_backend_torch import plugin
from dsv4_backend_torch.backend import TorchBackend

__all__ = ["TorchBackend", "plugin"]
