"""The reference's arrays and options; its ops are in the files named like the contracts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_backend_reference.attention import ReferenceAttention
from dsv4_backend_reference.cache import ReferenceCache
from dsv4_backend_reference.embed import ReferenceEmbed
from dsv4_backend_reference.mhc import ReferenceMhc
from dsv4_backend_reference.moe import ReferenceMoe
from dsv4_backend_reference.norm import ReferenceNorm
from dsv4_backend_reference.weight_cache import WeightCache
from dsv4_core.contract.backend import Backend, BackendError, Option
from dsv4_core.contract.dtypes import Host, numpy_dtype

if TYPE_CHECKING:
    from dsv4_backend_reference.process_group import ReferenceProcessGroup
    from dsv4_core.contract.rendezvous import Rendezvous


class ReferenceBackend(
    ReferenceEmbed,
    ReferenceNorm,
    ReferenceMoe,
    ReferenceAttention,
    ReferenceMhc,
    ReferenceCache,
    Backend,
):
    """NumPy and ml_dtypes (quantisation and matmul come in as bases of the others).
    ``weight_cache``: bytes of dequantised weights to keep (default 2 GiB).
    """

    name = "reference"
    weight_formats = ("e4m3", "e2m1", "int8")
    options = (
        Option("weight_cache", "bytes of dequantised weights kept in memory", 2 << 30),
        Option("batch_invariant", "a token's bits do not depend on what else is in the batch; slower", False),
    )
    claims_level = 3
    deterministic = True
    weight_cache: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.weights = WeightCache(self.weight_cache)

    def from_numpy(self, array: Host) -> Host:
        """Give the array itself."""
        return array

    def to_numpy(self, array: Host) -> Host:
        """Give the array itself."""
        return array

    def round_up(self, n: int) -> int:
        """Give ``n``: shapes cost NumPy nothing, and what is masked costs time."""
        return n

    def process_group(self, where: Rendezvous) -> ReferenceProcessGroup:
        """Reach the ranks' store; raise ``BackendError`` where torch, whose gloo connects the
        ranks, is not installed.
        """
        try:
            from dsv4_backend_reference.process_group import ReferenceProcessGroup
        except ImportError as error:
            raise BackendError(
                f"several ranks are connected by torch.distributed: pip install 'dsv4[torch]' ({error})"
            ) from error
        return ReferenceProcessGroup(self, where)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Host:
        """Allocate zeros; untouched pages of a large cache cost no memory."""
        return np.zeros(shape, numpy_dtype(dtype))
