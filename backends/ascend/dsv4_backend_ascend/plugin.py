"""What the entry point names: a module with the hook."""

from dsv4_backend_ascend.backend import AscendBackend
from dsv4_core.contract.registry import hookimpl


@hookimpl
def dsv4_backend() -> type[AscendBackend]:
    """Give the Backend class."""
    return AscendBackend
