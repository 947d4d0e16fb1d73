"""The torch backend: every op in plain PyTorch, for any PyTorch device; the base that cuda and
ascend extend.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_backend_torch import plugin
    from dsv4_backend_torch.backend import TorchBackend

# a broken device extension would fail `import torch` for everyone
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

# OpenMP reads this once, when torch loads it: how many turns its threads wait in a loop before they
# sleep, some 100 us. Without a bound the threads of a busy machine wait for one that has no core,
# and keep it from getting one
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")

__all__ = ["TorchBackend", "plugin"]


def __getattr__(name: str) -> object:
    """``plugin`` and ``TorchBackend`` when they are asked for: Triton's interpreter, which other
    backends take from here, needs no torch.
    """
    if name in __all__:
        plugin = import_module("dsv4_backend_torch.plugin")
        return plugin if name == "plugin" else plugin.TorchBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
