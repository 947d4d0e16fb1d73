"""The composed tier on an NPU: PyTorch's ops, chosen so that none runs on AICPU and few are
launched.

Results are those of the portable backend, bit for bit but for the order of Sinkhorn's sums of four,
a factor that stands in the Hadamard matrix, and the sign of zeros on the grids of FP8 and FP4.
"""

from __future__ import annotations

from typing import Any

import torch
from dsv4_backend_torch.quant import hadamard_matrix

from dsv4_backend_ascend.experts import SHIFT, DecodeExperts, spread_e2m1
from dsv4_backend_ascend.rounding import Rounding
from dsv4_backend_ascend.rows import Rows


class ComposedBackend(DecodeExperts, Rounding, Rows):
    """Overrides of the portable backend's ops where an NPU wants other ones."""

    def forget(self) -> None:
        """Drop what is kept of a step: a recorded one must make everything itself."""
        self.kept.forget()

    def turning(self, positions: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each pair's angle: q and k turn by one, in every layer of a compress
        ratio.
        """
        made = super().turning
        return self.kept.of((positions, freqs), lambda: made(positions, freqs))  # type: ignore[no-any-return]

    def gate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, topk: int, route_scale: float) -> Any:
        """Note of the picks among how many experts they are: where all are here, none is another
        rank's.
        """
        weights, indices = super().gate(x, weight, bias, topk=topk, route_scale=route_scale)
        self.kept.of((indices, "routed among"), lambda: weight.shape[0])
        return weights, indices

    def gate_hash(
        self, x: torch.Tensor, weight: torch.Tensor, tid2eid: torch.Tensor, ids: torch.Tensor, *, route_scale: float
    ) -> Any:
        """As ``gate``."""
        weights, indices = super().gate_hash(x, weight, tid2eid, ids, route_scale=route_scale)
        self.kept.of((indices, "routed among"), lambda: weight.shape[0])
        return weights, indices

    def product(self, x: torch.Tensor, weights: tuple[Any, ...], *, wide: bool) -> torch.Tensor:
        """Rows that several layers multiply wide are widened once."""
        if wide and x.dtype != self.wide_type:
            narrow = x
            x = self.kept.once((narrow, "wide"), lambda: narrow.to(self.wide_type))
        return super().product(x, weights, wide=wide)

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """The scale is in the matrix."""
        dim = x.shape[1]
        matrix = self.kept.always(
            ("hadamard", dim), None, lambda: hadamard_matrix(dim, self.wide_type, x.device) * dim**-0.5
        )
        return self.rounded(self.widen(x) @ matrix)

    def sinkhorn(self, comb: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
        """Two launches a half step: a product with ones adds, and adds ``eps``."""
        if self.numerics != "native" or not comb.shape[0]:
            return super().sinkhorn(comb, eps, iters)
        tokens, hc, _ = comb.shape
        ones = self.kept.always(("ones", hc), None, lambda: comb.new_ones(hc, hc)).expand(tokens, hc, hc)
        least = self.kept.always(("eps", eps), None, lambda: comb.new_full((1, 1, 1), eps))
        for half in range(1, 2 * iters):
            comb = comb / (torch.baddbmm(least, ones, comb) if half % 2 else torch.baddbmm(least, comb, ones))
        return comb

    def index_select(
        self, scores: torch.Tensor, visible: torch.Tensor, offset: torch.Tensor, *, topk: int
    ) -> torch.Tensor:
        """On A2 and A3 a stable sort of the scores themselves: the keys that tell equals apart are
        whole numbers.
        """
        if self.generation == "950" or scores.dtype != torch.float32 or topk == scores.shape[-1]:
            return super().index_select(scores, visible, offset, topk=topk)
        row = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        seen = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(row >= visible[..., None], -torch.inf)
        picks = seen.sort(dim=-1, descending=True, stable=True).indices[..., :topk].to(torch.int32)
        return torch.where(picks < visible[..., None], picks + offset[..., None], -1).to(torch.int32)

    def decode_e2m1(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values [..., n] of packed E2M1 bytes [..., n / 2], without a table, which would be read
        element by element.
        """
        if dtype not in {torch.bfloat16, torch.float32}:
            return super().decode_e2m1(packed, dtype)
        return spread_e2m1(packed).mul_(SHIFT).to(dtype)
