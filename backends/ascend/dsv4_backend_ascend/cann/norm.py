"""rms_norm and apply_rope in npu ops."""

from __future__ import annotations

import torch

from dsv4_backend_ascend.cann.call import call
from dsv4_backend_ascend.weights import spread


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """Contract ``rms_norm``; no weight is a weight of ones."""
    gamma = x.new_ones(x.shape[-1:]) if weight is None else weight
    return call("npu_rms_norm", input=x, gamma=gamma, epsilon=eps)[0]  # type: ignore[no-any-return]


def angles(positions: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each channel's angle, float32 [tokens, 1, channels]: pairs of neighbours share theirs."""
    angle = spread(positions.float().unsqueeze(-1) * freqs, 2).unsqueeze(1)
    return angle.cos(), angle.sin()


def apply_rope(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], *, inverse: bool) -> torch.Tensor:
    """Contract ``apply_rope``, given ``angles``: in float32, so that cosine, sine and the result are rounded once."""
    cosine, sine = turn
    passed, rotated = x.split([x.shape[-1] - cosine.shape[-1], cosine.shape[-1]], dim=-1)
    turned = call(
        "npu_rotary_mul",
        input=rotated.float().contiguous(),
        r1=cosine,
        r2=-sine if inverse else sine,
        rotary_mode="interleave",
    )
    return torch.cat([passed, turned.to(x.dtype)], dim=-1)
