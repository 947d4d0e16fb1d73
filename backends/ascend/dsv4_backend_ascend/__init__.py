"""Ascend NPUs through torch-npu and CANN: the portable PyTorch backend, with CANN's own ops where they serve."""

from dsv4_backend_ascend import plugin
from dsv4_backend_ascend.backend import AscendBackend

__all__ = ["AscendBackend", "plugin"]
