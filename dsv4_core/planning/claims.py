"""Published figures against those of our own graph: efficiency at a million tokens, parameter
counts, decode limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.layout import parameters
from dsv4_core.planning.plan import Graph

MILLION = 1 << 20


@dataclass(frozen=True)
class Predecessor:
    """DeepSeek-V3.2, from its published figures: the one model here that is counted by formula."""

    layers: int = 61
    row_bytes: int = 656  # 512 FP8, 16 bytes of scales, 64 BF16
    key_bytes: int = 132  # 128 FP8 and a float32 scale
    index_topk: int = 2048
    heads: int = 128
    channels: int = 576 + 512  # of a row: 576 as key, 512 as value
    index_heads: int = 64
    index_dim: int = 128
    active: float = 37e9

    def equivalent(self, context: int) -> float:
        """Operations of a decode step in FP8's: the active parameters and the indexer in FP8,
        attention in BF16.
        """
        attention = 2 * min(context, self.index_topk) * self.heads * self.channels
        indexer = 2 * context * self.index_heads * self.index_dim
        return 2 * self.active + self.layers * (2 * attention + indexer)

    def cache_bytes(self, context: int) -> float:
        """Bytes of a sequence's cache."""
        return float(self.layers * (self.row_bytes + self.key_bytes) * context)


@dataclass(frozen=True)
class Claim:
    """A published figure and ours."""

    what: str
    published: float
    ours: float
    unit: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree within ``tolerance`` (in the same unit)."""
        return abs(self.ours - self.published) <= self.tolerance


class Published(NamedTuple):
    """A model's published figures: shares of V3.2's in per cent at a million tokens, and parameters
    in billions.
    """

    flops: float
    cache: float
    total: float
    active: float


PUBLISHED = {"pro": Published(27, 10, 1600, 49), "flash": Published(10, 7, 284, 13)}


def claims() -> list[Claim]:
    """Count both models: shares within one percentage point, parameters within half a unit of the
    last digit that is printed.
    """
    found: list[Claim] = []
    before = Predecessor()
    for name, published in PUBLISHED.items():
        config = PRESETS[name]
        graph = Graph(config)
        flops = graph.decode(1, MILLION).equivalent / before.equivalent(MILLION)
        cache = graph.cache_bytes(MILLION) / before.cache_bytes(MILLION)
        counted = parameters(config)
        found += [
            Claim(f"{name}: FLOPs of V3.2's, 1M", published.flops, 100 * flops, "%", 1),
            Claim(f"{name}: KV cache of V3.2's, 1M", published.cache, 100 * cache, "%", 1),
            Claim(f"{name}: parameters", published.total, counted.total / 1e9, "B", 50 if name == "pro" else 0.5),
            Claim(f"{name}: active parameters", published.active, counted.active / 1e9, "B", 0.5),
        ]
    return found
