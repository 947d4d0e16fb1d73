"""All contracts together, as a backend inherits them. A fused op's body is its default, written in
the required ops beside it (``sample_each``: on the host).
"""

from dsv4_core.contract.ops.attention import AttentionOps
from dsv4_core.contract.ops.embed import EmbedOps
from dsv4_core.contract.ops.mhc import MhcOps
from dsv4_core.contract.ops.moe import MoeOps
from dsv4_core.contract.ops.quant import QuantOps


class EveryOp(EmbedOps, QuantOps, MoeOps, AttentionOps, MhcOps):
    """Required ops and the fused ones above them."""
