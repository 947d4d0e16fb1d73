"""What the entry point names: a module with the hook. Importing it imports no Triton."""

from dsv4_backend_cuda.backend import CudaBackend
from dsv4_core.contract.registry import hookimpl


@hookimpl
def dsv4_backend() -> type[CudaBackend]:
    """Give the Backend class."""
    return CudaBackend
