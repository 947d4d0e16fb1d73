"""What the entry point names: a module with the hook. An entry point may state its extra only
behind an attribute.
"""

from dsv4_backend_torch.backend import TorchBackend
from dsv4_core.contract.registry import hookimpl


@hookimpl
def dsv4_backend() -> type[TorchBackend]:
    """Give the Backend class."""
    return TorchBackend
