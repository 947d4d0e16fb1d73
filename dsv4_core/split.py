"""Which rank holds what: tensor parallelism over heads, o_groups, the shared expert and the vocabulary, routed experts over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4_core.dtypes import FP8_BLOCK
from dsv4_core.layout import TensorSpec, scale_shape

if TYPE_CHECKING:
    from dsv4_core.config import ModelConfig

ROWS = ("attn.wq_b", "attn.wo_a", "attn.attn_sink", "shared_experts.w1", "shared_experts.w3", "embed", "head")
"""Weights of which a rank holds rows (heads, groups, channels, token ids)."""
COLUMNS = ("attn.wo_b", "shared_experts.w2")
"""Weights of which a rank holds columns, so that its result is a part of the sum."""


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to a routed expert."""
    return ".experts." in name


def stem(name: str) -> str:
    """A weight's name without ``.weight`` or ``.scale``."""
    return name.removesuffix(".weight").removesuffix(".scale")


@dataclass(frozen=True)
class Split:
    """``tp`` ranks share the heads, the shared expert and the vocabulary of the same tokens; ``ep`` such groups each take other sequences.

    The routed experts are spread over all ``tp * ep`` ranks. Rank ``g * tp + t`` is the t-th of group g.
    """

    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tp * self.ep

    def problems(self, config: ModelConfig) -> list[str]:
        """Say why a model does not divide so; empty where it does."""
        rules = [(key, getattr(config, key), 1) for key in ("o_groups", "num_attention_heads")]
        rules += [  # what a rank multiplies is quantised in blocks of 128 channels, which must not be cut
            ("moe_intermediate_size", config.moe_intermediate_size, FP8_BLOCK),
            ("o_groups * o_lora_rank", config.o_groups * config.o_lora_rank, FP8_BLOCK),
        ]
        wrong = [(key, size, self.tp * block) for key, size, block in rules if self.tp > 1 and size % (self.tp * block)]
        found = [f"--tp {self.tp}: {key} = {size} is not a multiple of {step}" for key, size, step in wrong]
        if config.n_routed_experts % self.ranks:
            found.append(
                f"--tp {self.tp} --ep {self.ep}: {config.n_routed_experts} experts do not divide among {self.ranks} ranks"
            )
        return found

    def check(self, config: ModelConfig) -> None:
        """Raise ``ValueError`` with the first problem."""
        if problems := self.problems(config):
            raise ValueError(problems[0])

    def axis(self, name: str) -> int | None:
        """Give the axis along which a tensor's parts lie (0 rows, 1 columns); None where every rank holds all of it."""
        at = stem(name)
        if self.tp == 1 or is_expert(name) or ".indexer." in at:
            return None
        return 0 if at.endswith(ROWS) else 1 if at.endswith(COLUMNS) else None

    def extent(self, size: int, rank: int) -> slice:
        """The part of an axis of ``size`` that a rank holds; the last may be shorter where it does not divide."""
        step, place = math.ceil(size / self.tp), rank % self.tp
        return slice(min(size, place * step), min(size, (place + 1) * step))

    def experts(self, count: int, rank: int) -> range:
        """The routed experts that a rank holds."""
        step = count // self.ranks
        return range(rank * step, (rank + 1) * step)

    def part(self, spec: TensorSpec, specs: dict[str, TensorSpec], rank: int = 0) -> TensorSpec:
        """Give a tensor as the rank stores it; routed experts stay whole."""
        axis = self.axis(spec.name)
        if axis is None:
            return spec
        scale = spec.dtype == "F8_E8M0"
        whole = specs[f"{stem(spec.name)}.weight"].shape if scale else spec.shape
        held = self.extent(whole[axis], rank)
        part = tuple(held.stop - held.start if i == axis else n for i, n in enumerate(whole))
        return spec._replace(shape=scale_shape((part[0], part[1]), "e4m3") if scale else part)
