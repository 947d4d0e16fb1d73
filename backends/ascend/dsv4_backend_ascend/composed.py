"""The composed tier on an NPU: PyTorch's ops, chosen so that none runs on AICPU and few are launched.

Results are those of the portable backend, bit for bit but for the order of Sinkhorn's sums of four.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dsv4_backend_ascend.chip import ChipBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.dtypes import Format

KEPT = 8  # results that are kept for the ops after: two angles, and what a block quantises
MAGNITUDES, SIGNS = 0x0E000E00, 0x80008000 - (1 << 32)  # of two float16 values in an int32
FLOAT16_BIAS = 2.0**14  # E2M1's exponent has bias 1, float16's 15


class ComposedBackend(ChipBackend):
    """Overrides of the portable backend's ops where an NPU wants other ones."""

    _once: list[tuple[tuple[Any, ...], Any]]

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` gives for these operands, made once while they are in use: q and k turn by one angle, and layers that
        multiply the same rows quantise them once. Operands are compared as objects, and held, so that they stay those.
        """
        for known, value in self._once:
            if len(known) == len(key) and all(a is b for a, b in zip(known, key, strict=True)):
                return value
        value = make()
        self._once = [*self._once[1 - KEPT :], (key, value)]
        return value

    def forget(self) -> None:
        """Drop what is kept: a recorded step must make everything itself."""
        self._once = []

    def quantised_activation(self, x: torch.Tensor, weight: Format = "e4m3") -> torch.Tensor:
        """As published, or (``activations=bf16``) as it is beside FP8 and FP4 weights."""
        if self.activations == "bf16" and weight != "int8":
            return x
        rounded = super().quantised_activation
        kind = "int8" if weight == "int8" else "e4m3"
        return self.once((x, kind), lambda: rounded(x, weight))  # type: ignore[no-any-return]

    def turning(self, positions: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each pair's angle."""
        made = super().turning
        return self.once((positions, freqs), lambda: made(positions, freqs))  # type: ignore[no-any-return]

    def sinkhorn(self, comb: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
        """Two launches a half step: a product with ones adds, and adds ``eps``."""
        if self.numerics != "native" or not comb.shape[0]:
            return super().sinkhorn(comb, eps, iters)
        tokens, hc, _ = comb.shape
        ones = comb.new_ones(hc, hc).expand(tokens, hc, hc)
        least = comb.new_full((1, 1, 1), eps)
        for half in range(1, 2 * iters):
            comb = comb / (torch.baddbmm(least, ones, comb) if half % 2 else torch.baddbmm(least, comb, ones))
        return comb

    def index_select(
        self, scores: torch.Tensor, visible: torch.Tensor, offset: torch.Tensor, *, topk: int
    ) -> torch.Tensor:
        """On A2 and A3 a stable sort of the scores themselves: the keys that tell equals apart are whole numbers."""
        if self.generation == "950" or scores.dtype != torch.float32 or topk == scores.shape[-1]:
            return super().index_select(scores, visible, offset, topk=topk)
        row = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        seen = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(row >= visible[..., None], -torch.inf)
        picks = seen.sort(dim=-1, descending=True, stable=True).indices[..., :topk].to(torch.int32)
        return torch.where(picks < visible[..., None], picks + offset[..., None], -1).to(torch.int32)

    def decode_e2m1(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values [..., n] of packed E2M1 bytes [..., n / 2], by moving bits: a table would be read element by element.

        A byte's two values become two float16 in an int32: magnitudes, three bits, at the top of the exponents' low end,
        signs at the top. The multiplications shift; what leaves an int32 at its top is not needed.
        """
        if dtype not in {torch.bfloat16, torch.float32}:
            return super().decode_e2m1(packed, dtype)
        signs = packed.to(torch.int32)
        bits = (signs * ((1 << 9) + (1 << 21))).bitwise_and_(MAGNITUDES)
        bits.bitwise_or_(signs.mul_((1 << 12) + (1 << 24)).bitwise_and_(SIGNS))
        del signs  # as large as the result
        return bits.view(torch.float16).mul_(FLOAT16_BIAS).to(dtype)
