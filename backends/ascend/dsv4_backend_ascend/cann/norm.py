"""rms_norm and apply_rope in npu ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.cann.call import call
from dsv4_backend_ascend.weights import spread

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend


def rms_norm(backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """Contract ``rms_norm``; no weight is a weight of ones."""
    if weight is None:
        weight = backend.kept.always(("gain", x.shape[-1], x.dtype), None, lambda: x.new_ones(x.shape[-1:]))
    return call("npu_rms_norm", input=x, gamma=weight, epsilon=eps)[0]  # type: ignore[no-any-return]


def angles(
    backend: ChipBackend, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each channel's angle, float32 [tokens, 1, channels]: pairs of neighbours
    share theirs.
    """

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        angle = spread(positions.float().unsqueeze(-1) * freqs, 2).unsqueeze(1)
        return angle.cos(), angle.sin()

    cosine, sine = backend.kept.of((positions, freqs, "channels"), made)
    return cosine, backend.kept.of((positions, freqs, "back"), lambda: -sine) if inverse else sine


def turned(
    backend: ChipBackend, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    """The channels that ``apply_rope`` turns, in float32, so that cosine, sine and the result are
    rounded once.
    """
    cosine, sine = angles(backend, positions, freqs, inverse=inverse)
    rotated = x[..., -cosine.shape[-1] :]
    return call(  # type: ignore[no-any-return]
        "npu_rotary_mul",
        input=rotated.to(torch.float32, memory_format=torch.contiguous_format),
        r1=cosine,
        r2=sine,
        rotary_mode="interleave",
    )


def apply_rope(
    backend: ChipBackend, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    """Contract ``apply_rope``."""
    y = turned(backend, x, positions, freqs, inverse=inverse)
    return torch.cat([x[..., : -y.shape[-1]], y.to(x.dtype)], dim=-1)


def turn_own(
    backend: ChipBackend, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    """``apply_rope`` of an array that nobody else has, in place: rounded and put down by one
    launch.
    """
    y = turned(backend, x, positions, freqs, inverse=inverse)
    x[..., -y.shape[-1] :].copy_(y)
    return x
