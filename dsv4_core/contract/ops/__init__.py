"""The contracts, one family a file. Importing this package declares every op."""

from dsv4_core.contract.ops.fused import FusedOps
from dsv4_core.contract.spec import OPS

__all__ = ["OPS", "FusedOps"]
