"""A decode step's experts on chips without FP4: those that a token chose are gathered packed, all
three projections at once.

Nothing is sorted and nothing counted: a row of tokens x picks has its own expert's matrices beside
it. The codes of w1, w3 and w2 are as many, so that one expansion serves all; their rows are a whole
number of groups of 32, so that scales stay beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from dsv4_backend_torch.weights import StackedExperts

from dsv4_backend_ascend.chip import ChipBackend
from dsv4_core.contract.dtypes import FP4_GROUP, ScaledArray
from dsv4_core.contract.ops import EveryOp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import Experts

SHIFT = 2.0**14  # E2M1's exponent has bias 1, float16's 15
PACKED_MAGNITUDES, PACKED_SIGNS = 0x0E000E00, 0x80008000 - (1 << 32)  # of two float16 values in an int32


def spread_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Values times 2^-14, float16 [..., n], of packed E2M1 bytes [..., n / 2], by moving bits: a
    table is read element by element.

    A byte's two values become two float16 in an int32: magnitudes, three bits, at the top of the
    exponents' low end, signs at the top. The multiplications shift; what leaves an int32 at its top
    is not needed. Bits that do not overlap are added: torch-npu has no ``|`` in place.
    """
    signs = packed.to(torch.int32)
    bits = (signs * ((1 << 9) + (1 << 21))).bitwise_and_(PACKED_MAGNITUDES)
    bits.add_(signs.mul_((1 << 12) + (1 << 24)).bitwise_and_(PACKED_SIGNS))
    return bits.view(torch.float16)


class DecodeExperts(ChipBackend):
    """``moe`` of few tokens, and ``ffn`` with w1 and w3 in one product; everything else as the
    contract's default has it.
    """

    def ffn(self, x: torch.Tensor, w1: Any, w3: Any, w2: Any, *, limit: float) -> torch.Tensor:
        if not (self.joins(w1) and self.joins(w3)):
            return EveryOp.ffn(self, x, w1, w3, w2, limit=limit)  # type: ignore[no-any-return]
        if isinstance(w1, ScaledArray):
            x = self.quantised_activation(x, w1.format)
        both = self.product(x, (w1, w3), wide=False)
        return self.linear(self.gated(both.unflatten(1, (2, -1)), None, limit), w2, out_dtype=self.activation_dtype)

    def joins(self, weight: Any) -> bool:
        """Whether a projection may be multiplied with its neighbour, by a plain product of expanded
        weights.
        """
        fmt = getattr(weight, "format", None)
        return bool(weight.dtype == torch.bfloat16 if fmt is None else self.generation != "950" and fmt != "int8")

    def moe(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, shared: torch.Tensor | None, w1: Experts,
        w3: Experts, w2: Experts, *, first_expert: int, limit: float, out_dtype: str,
    ) -> torch.Tensor:  # fmt: skip
        stacks = self._gatherable(indices, (w1, w3, w2))
        if stacks is None:
            return EveryOp.moe(  # type: ignore[no-any-return]
                self,
                x,
                weights,
                indices,
                shared,
                w1,
                w3,
                w2,
                first_expert=first_expert,
                limit=limit,
                out_dtype=out_dtype,
            )
        tokens, topk = indices.shape
        _, inter, dim = w1.shape
        rows = tokens * topk
        own, absent = self.kept.of(
            (indices, "own", first_expert, w1.shape[0]), lambda: self._own(indices, first_expert, w1.shape[0])
        )
        expanded = self.expanded(stacks, own)
        x = self.quantised_activation(x)[:, None].expand(2, tokens, topk, dim).reshape(2 * rows, dim, 1)
        pairs = torch.bmm(expanded[:2].reshape(2 * rows, inter, dim), x).reshape(2, rows, inter).transpose(0, 1)
        hidden = self.quantised_activation(self.gated(pairs, weights.reshape(-1), limit))
        y = torch.bmm(expanded[2].reshape(rows, dim, inter), hidden[:, :, None])[:, :, 0]
        if absent is not None:
            y = y.masked_fill_(absent, 0)
        return self.summed(y, shared, topk, getattr(torch, out_dtype))

    def summed(
        self, rows: torch.Tensor, shared: torch.Tensor | None, topk: int, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Each token's rows [tokens x topk, dim] and the shared expert's, added wide."""
        y = rows.unflatten(0, (-1, topk)).sum(1, dtype=torch.float32)
        return (y if shared is None else y.add_(shared)).to(out_dtype)

    def _gatherable(self, indices: torch.Tensor, experts: Sequence[Experts]) -> list[ScaledArray] | None:
        """The three stacks, where a step has no more rows than there are experts, and what they
        choose may be expanded at once: that takes twice their BF16 bytes.
        """
        if self.generation == "950" or self.numerics != "native" or not indices.numel():
            return None
        stacks = [e.stack for e in experts if isinstance(e, StackedExperts) and isinstance(e.stack, ScaledArray)]
        if len(stacks) < len(experts) or any(s.format != "e2m1" or not self.well_scaled(s) for s in stacks):
            return None
        _, inter, dim = stacks[0].shape
        expanded = 2 * len(stacks) * indices.numel() * inter * dim
        few = indices.numel() <= experts[0].shape[0] and 2 * expanded <= self.expand_bytes
        return stacks if few and stacks[2].shape[1:] == (dim, inter) else None

    def _own(self, indices: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which of the experts here each row of tokens x picks has, and where that is another
        rank's, [rows, 1].
        """
        flat = indices.reshape(-1)
        if first == 0 and self.kept.known((indices, "routed among")) == count:
            return flat, None
        local = (flat - first).clamp_(0, count - 1)
        return local, (local != flat - first)[:, None]

    def expanded(self, stacks: Sequence[ScaledArray], own: torch.Tensor) -> torch.Tensor:
        """BF16 [projections, rows x out x in] of the experts that rows have."""
        codes, scales = (
            part.new_empty((len(stacks), own.shape[0], part[0].numel())) for part in (stacks[0].data, stacks[0].scale)
        )
        for i, stack in enumerate(stacks):  # over projections
            torch.index_select(stack.data.flatten(1), 0, own, out=codes[i])
            torch.index_select(stack.scale.flatten(1), 0, own, out=scales[i])
        values = spread_e2m1(codes).to(torch.bfloat16).reshape(-1, FP4_GROUP)
        one = self.kept.always("2^14", None, lambda: torch.full((1,), 14 << 23, dtype=torch.int32, device=own.device))
        powers = torch.add(one, scales.reshape(-1, 1).to(torch.int32), alpha=1 << 23).view(torch.float32)
        return values.mul_(powers.to(torch.bfloat16)).reshape(len(stacks), -1)
