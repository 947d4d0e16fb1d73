"""Which part of a model each of several ranks holds, and a source of weights that reads nothing
else.

``tp`` ranks share the same tokens: heads and their o-groups, the shared expert and the vocabulary
are cut between them. ``ep`` such groups each take other sequences. The routed experts are cut
between all ``tp * ep`` ranks. Ranks of a group are neighbours: rank ``e * tp + t`` is the t-th of
group e.

Whole on every rank stay what every head reads: ``wq_a``, ``wkv`` and the compressor (one key/value
row serves all heads, so the cache is whole as well), the gate, norms, mHC and the indexer. The
indexer's heads could be cut, and then a token's scores would have to be summed over the ranks: at
2^20 tokens of context 1 MiB a layer, to save none of the 17 MiB of keys that every rank reads for
them anyway.

A scale serves 128 x 128 weights, and an activation is quantised in blocks of 128 channels. A cut
may therefore run between two blocks of rows or inside one, and between blocks of columns alone.
Where ``wo_b``'s columns would be cut inside a block, every rank holds it whole and its input is
gathered; the shared expert is then left to the first rank of each group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv4_core.checkpoint.shards import BITS
from dsv4_core.contract.dtypes import FP8_BLOCK, Experts, Host, ScaledArray, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.layout import TensorSpec
    from dsv4_core.checkpoint.source import WeightSource

_ROWS = ("attn.wq_b", "attn.wo_a", "attn.attn_sink", "shared_experts.w1", "shared_experts.w3")
_VOCABULARY = ("embed", "head")
_COLUMNS = ("attn.wo_b", "shared_experts.w2")


@dataclass(frozen=True)
class Place:
    """One rank among ``tp * ep``."""

    tp: int = 1
    ep: int = 1
    rank: int = 0

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tp * self.ep

    @property
    def t(self) -> int:
        """Place within the group that shares tokens."""
        return self.rank % self.tp

    @property
    def e(self) -> int:
        """Which group."""
        return self.rank // self.tp

    def sequences(self, batch: int) -> slice:
        """Which of ``batch`` sequences this rank's group takes; none is possible."""
        return slice(-(-batch * self.e // self.ep), -(-batch * (self.e + 1) // self.ep))

    def most(self, sequences: Sequence[int], batch: int) -> int:
        """How many of some of a batch's ``sequences`` the group takes that takes the most."""
        parts = [replace(self, rank=e * self.tp).sequences(batch) for e in range(self.ep)]
        return max(sum(part.start <= b < part.stop for b in sequences) for part in parts)

    def vocabulary(self, size: int) -> slice:
        """Which rows of embedding and head this rank holds; they need not divide."""
        return slice(size * self.t // self.tp, size * (self.t + 1) // self.tp)

    def expert_bounds(self, count: int, t: int) -> list[int]:
        """First expert of the t-th rank of each group, and the end of the last: one run, so that
        rows sorted by expert are sorted by rank.
        """
        return [count * (t * self.ep + e) // self.ranks for e in range(self.ep + 1)]

    def experts(self, count: int) -> slice:
        """Which experts this rank holds; the numbers of two ranks differ by one at most."""
        bounds = self.expert_bounds(count, self.t)
        return slice(bounds[self.e], bounds[self.e + 1])

    def cuts_output(self, config: ModelConfig) -> bool:
        """Whether ``wo_b``'s columns are cut (else its input is gathered)."""
        return config.o_groups * config.o_lora_rank // self.tp % FP8_BLOCK == 0

    def cuts_shared(self, config: ModelConfig) -> bool:
        """Whether the shared expert is cut (else the first rank of each group holds it)."""
        return config.moe_intermediate_size % (self.tp * FP8_BLOCK) == 0

    def holds_shared(self, config: ModelConfig) -> bool:
        """Whether this rank adds a shared expert, or its part of one."""
        return self.t == 0 or self.cuts_shared(config)

    def check(self, config: ModelConfig) -> None:
        """Raise ``ValueError`` for a model that cannot be cut so; reads no weight."""
        c = config
        for key in ("o_groups", "num_attention_heads"):
            if (size := getattr(c, key)) % self.tp:
                use = f"use a divisor of {c.o_groups}, and a larger --ep"
                raise ValueError(f"--tp {self.tp}: {key} = {size} is not a multiple of it; {use}")
        by_block = {f"routed experts of {block}": count for block, count in c.experts_by_block.items()}
        for key, size in {"n_routed_experts": c.n_routed_experts, "vocab_size": c.vocab_size, **by_block}.items():
            if size < self.ranks:
                raise ValueError(
                    f"--tp {self.tp} --ep {self.ep}: {key} = {size} is less than {self.ranks} ranks; use fewer"
                )
        rows = {"wq_b": c.num_attention_heads * c.head_dim // self.tp, "wo_a": c.o_groups * c.o_lora_rank // self.tp}
        for name, count in rows.items():
            if count % FP8_BLOCK and FP8_BLOCK % count:
                raise ValueError(
                    f"--tp {self.tp}: {name} would be cut every {count} rows, which is neither a multiple nor a divisor of "
                    f"the {FP8_BLOCK} that share a scale; use another --tp"
                )

    def part(self, spec: TensorSpec, config: ModelConfig) -> tuple[int, ...]:
        """Shape of what this rank holds of a tensor, as stored; a size 0 where it holds nothing."""
        stem = spec.name.removesuffix(".weight").removesuffix(".scale")
        if ".experts." in stem:
            block, expert, _ = stem.replace(".ffn.experts.", ".").rsplit(".", 2)
            mine = self.experts(config.experts_of(block))
            return spec.shape if mine.start <= int(expert) < mine.stop else (0,)
        if ".shared_experts." in stem and not self.cuts_shared(config):
            return spec.shape if self.t == 0 else (0,)
        cut = self.cut(stem, config)
        if cut is None:
            return spec.shape
        axis, size = cut
        if spec.dtype != "F8_E8M0":
            return tuple(size if i == axis else n for i, n in enumerate(spec.shape))
        return tuple(-(-size // FP8_BLOCK) if i == axis else n for i, n in enumerate(spec.shape))

    def cut(self, stem: str, config: ModelConfig) -> tuple[int, int] | None:
        """Along which axis a weight is cut, and how much of it a rank holds; None: held whole."""
        part = self.range(stem, config)
        return None if part is None else (part[0], part[1].stop - part[1].start)

    def range(self, stem: str, config: ModelConfig) -> tuple[int, slice] | None:
        """Axis and range of a weight that is cut; None for one that is not."""
        c = config
        if stem in _VOCABULARY:
            return 0, self.vocabulary(c.vocab_size)
        if ".indexer." in stem or not stem.endswith((*_ROWS, *_COLUMNS)):
            return None
        if stem.endswith("attn.wo_b") and not self.cuts_output(c):
            return None
        if ".shared_experts." in stem and not self.cuts_shared(c):
            return None
        sizes = {
            "wq_b": c.num_attention_heads * c.head_dim,
            "attn_sink": c.num_attention_heads,
            "wo_a": c.o_groups * c.o_lora_rank,
            "wo_b": c.o_groups * c.o_lora_rank,
        }
        size = sizes.get(stem.rpartition(".")[2], c.moe_intermediate_size) // self.tp
        return (0 if stem.endswith(_ROWS) else 1), slice(size * self.t, size * (self.t + 1))


class ShardedSource:
    """A source of weights that gives one rank's part of each; views, so that no other byte is read.

    ``read``: bytes handed over by tensor. ``is_cut``: the source holds this rank's parts alone, as
    ``dsv4 convert`` wrote them. Raises ``ValueError`` on opening where the model cannot be cut so.
    """

    def __init__(self, source: WeightSource, place: Place, *, is_cut: bool = False) -> None:
        place.check(source.config)
        self.source, self.place, self.config, self.is_cut = source, place, source.config, is_cut
        self.read: dict[str, int] = {}

    def array(self, name: str) -> Host:
        """Give this rank's part of a tensor by its full name."""
        found = self.source.array(name)
        part = None if self.is_cut else self.place.range(name, self.config)
        return self._noted(name, found if part is None else found[part[1]])

    def weight(self, name: str) -> Host | ScaledArray:
        """Give this rank's part of ``name.weight``, with its scales."""
        part = None if self.is_cut else self.place.range(name, self.config)
        return self._noted(name, self._cut(self.source.weight(name), part))

    def experts(self, prefix: str, projection: str) -> Experts:
        """Give one projection of this rank's routed experts."""
        every = self.source.experts(prefix, projection)
        mine = self.place.experts(self.config.experts_of(prefix.removesuffix(".ffn")))
        return _Own(self, every, mine, f"{prefix}.experts.{{}}.{projection}")

    @staticmethod
    def _cut(weight: Any, part: tuple[int, slice] | None) -> Any:
        if part is None:
            return weight
        axis, where = part
        if not isinstance(weight, ScaledArray):
            return weight[where] if axis == 0 else weight[:, where]
        if axis == 0:
            return weight.rows(where.start, where.stop)
        if weight.format == "int8":  # a scale per row serves any of its columns
            return ScaledArray(weight.data[:, where], weight.scale, "int8")
        block = slice(where.start // FP8_BLOCK, where.stop // FP8_BLOCK)
        return ScaledArray(weight.data[:, where], weight.scale[:, block], weight.format)

    def _noted(self, name: str, weight: Any) -> Any:
        self.read[name] = weight.nbytes
        return weight


class _Own(Experts):
    """A rank's experts, counted from its first; ``read`` grows when one is asked for."""

    def __init__(self, source: ShardedSource, every: Experts, mine: slice, name: str) -> None:
        self.source, self.every, self.mine, self.name = source, every, mine, name

    @property
    def shape(self) -> tuple[int, int, int]:
        """[this rank's experts, out, in]."""
        out, cols = self.every[self.mine.start].shape
        return (self.mine.stop - self.mine.start, out, cols)

    @property
    def dtype(self) -> str:
        """The dtype of every expert."""
        return dtype_name(self.every[self.mine.start])

    def __getitem__(self, index: int) -> Any:
        expert = self.mine.start + index
        if not 0 <= index < self.shape[0]:  # ends a loop over them
            raise IndexError(index)
        return self.source._noted(self.name.format(expert), self.every[expert])  # noqa: SLF001  one class in two


def share(config: ModelConfig, place: Place, specs: Iterable[TensorSpec]) -> int:
    """Bytes of one rank's part of tensors as they are stored."""
    return sum(math.prod(place.part(spec, config)) * BITS[spec.dtype] // 8 for spec in specs)
