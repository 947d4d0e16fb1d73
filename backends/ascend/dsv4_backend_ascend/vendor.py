"""The vendor tier: contracts in ops of the operators' own extension, ``cann_ops_transformer``, where it is installed."""

from __future__ import annotations

import torch

from dsv4_backend_ascend.cann.call import call


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


def apply_rope(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], *, inverse: bool) -> torch.Tensor:
    """Contract ``apply_rope``, given the angles' cosine and sine [tokens, 1, channels]: turned in a copy."""
    cosine, sine = turn
    y = x.clone(memory_format=torch.contiguous_format).unsqueeze(0)
    call(
        "inplace_partial_rotary_mul",
        x=y,
        r1=cosine.unsqueeze(0),
        r2=(-sine if inverse else sine).unsqueeze(0),
        rotary_mode="interleave",
        partial_slice=[x.shape[-1] - cosine.shape[-1], x.shape[-1]],
    )
    return y.squeeze(0)
