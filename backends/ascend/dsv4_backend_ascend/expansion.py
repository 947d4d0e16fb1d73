"""Memory of the lossless way on chips without FP8: experts stay packed, and are expanded to BF16 a
group at a time.

Counted by running the cann tier's own ``expert_linear`` at a published model's sizes on tensors
without data.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from dsv4_backend_torch.weights import StackedExperts
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann.call import dry_run
from dsv4_backend_ascend.plan import IMPLEMENTATIONS, without_data
from dsv4_core.checkpoint.config import ModelConfig
from dsv4_core.contract.dtypes import FP4_GROUP, WEIGHT_DTYPES
from dsv4_core.contract.spec import Operand


class Expansion(NamedTuple):
    """Bytes of one projection of a layer's experts: ``packed`` as stored, ``bf16`` if all were
    expanded, and the most that is alive at a time in a product of ``rows`` token copies, beside
    operands and result.
    """

    rows: int
    packed: int
    bf16: int
    peak: int


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its results."""
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}  # noqa: SLF001
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, given)
        return result

    def _hold(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001
        if key in given and key not in self.holders:  # a view of an operand
            return
        if key not in self.holders:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now -= size


def measure(config: ModelConfig, rows: int, expand_bytes: int) -> Expansion:
    """Run one layer's first projection of all routed experts, FP4, with ``rows`` token copies."""
    backend = AscendBackend(soc="910B", expand_bytes=expand_bytes)
    experts, out, cols = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    stack = without_data(Operand(WEIGHT_DTYPES["e2m1"], (experts, out, cols)), mx=False)
    backend.note_scales(stack, 127)
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta")
    with dry_run("910B"), Live() as live:
        y = IMPLEMENTATIONS["cann"]["expert_linear"](backend, x, StackedExperts(stack), offsets)
    weights = experts * out * cols
    return Expansion(rows, weights // 2 + weights // FP4_GROUP, 2 * weights, live.peak - y.numel() * y.element_size())
