"""The contracts, one family a file; what they are tried with is the suite's. Importing this package
declares every op.
"""

from dsv4_core.contract.ops.every import EveryOp
from dsv4_core.contract.spec import OPS

__all__ = ["OPS", "EveryOp"]
