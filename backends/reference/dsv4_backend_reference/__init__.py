"""The reference backend: every op in NumPy, written to be read. The other backends are judged by
it, and it by recorded vectors.
"""

from dsv4_backend_reference.backend import ReferenceBackend
from dsv4_core.contract.registry import hookimpl

__all__ = ["ReferenceBackend", "dsv4_backend"]


@hookimpl
def dsv4_backend() -> type[ReferenceBackend]:
    """Give the Backend class."""
    return ReferenceBackend
