"""The vendor tier: contracts in ops of the operators' own extension, ``cann_ops_transformer``,
where it is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.cann import norm
from dsv4_backend_ascend.cann.call import call

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend


def hc_pre(
    h: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contract ``hc_pre``: one op for all of it."""
    tokens, streams, dim = h.shape
    x, post, res, *_ = call(
        "mhc_pre_sinkhorn",
        x=h.unsqueeze(0),
        phi=fn,
        alpha=scale,
        bias=base,
        hcMult=streams,
        numIters=iters,
        hcEps=eps,
        normEps=norm_eps,
        outFlag=False,
    )
    return x.reshape(tokens, dim), post.reshape(tokens, streams), res.reshape(tokens, streams, streams)


def apply_rope(
    backend: ChipBackend, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    """Contract ``apply_rope``: turned in a copy."""
    copy = x.clone(memory_format=torch.contiguous_format)
    return turn_own(backend, copy, positions, freqs, inverse=inverse)


def turn_own(
    backend: ChipBackend, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    """``apply_rope`` of an array that nobody else has, in place."""
    cosine, sine = norm.angles(backend, positions, freqs, inverse=inverse)
    call(
        "inplace_partial_rotary_mul",
        x=x.unsqueeze(0),
        r1=cosine.unsqueeze(0),
        r2=sine.unsqueeze(0),
        rotary_mode="interleave",
        partial_slice=[x.shape[-1] - cosine.shape[-1], x.shape[-1]],
    )
    return x
