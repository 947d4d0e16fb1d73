"""The contracts, one family a file. Importing this package declares every op."""

from dsv4_core.ops.fused import FusedOps
from dsv4_core.spec import OPS

__all__ = ["OPS", "FusedOps"]
