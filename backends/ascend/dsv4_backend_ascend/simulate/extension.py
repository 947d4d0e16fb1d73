"""Ops of cann_ops_transformer: mhc_pre_sinkhorn and inplace_partial_rotary_mul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import simulated

if TYPE_CHECKING:
    from types import SimpleNamespace


def _pre_shapes(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    batch, seq, streams, dim = a.x.shape
    wide = [a.phi.new_empty([batch, seq, streams]), a.phi.new_empty([batch, seq, streams * streams])]
    return (a.x.new_empty([batch, seq, dim]), *wide, *(a.phi.new_empty([0]) for _ in range(5)))


@simulated("mhc_pre_sinkhorn", shapes=_pre_shapes)
def mhc_pre_sinkhorn(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """``phi`` times the streams over their root-mean-square gives three parts; ``hcEps`` is added
    to the first after its sigmoid, and inside Sinkhorn to the softmax and to every sum. The mixing
    matrix comes flat.
    """
    streams = a.hcMult
    x = a.x.float()
    flat = x.flatten(-2)
    parts = (flat @ a.phi.t()) / (flat.square().mean(-1, keepdim=True) + a.normEps).sqrt()
    ends = (streams, 2 * streams, 2 * streams + streams * streams)
    pre, post, res = (
        parts[..., lo:hi] * a.alpha[i] + a.bias[lo:hi] for i, (lo, hi) in enumerate(zip((0, *ends), ends, strict=False))
    )
    matrix = torch.softmax(res.unflatten(-1, (streams, streams)), -1) + a.hcEps
    for step in range(1, 2 * a.numIters):  # columns first, then rows and columns in turn
        matrix = matrix / (matrix.sum(-2 if step % 2 else -1, keepdim=True) + a.hcEps)
    reduced = torch.einsum("...n,...nd->...d", torch.sigmoid(pre) + a.hcEps, x)
    none = [a.phi.new_empty([0]) for _ in range(5)]
    return (reduced.to(a.x.dtype), 2 * torch.sigmoid(post), matrix.flatten(-2), *none)


@simulated("inplace_partial_rotary_mul", shapes=lambda _: None)
def inplace_partial_rotary_mul(a: SimpleNamespace) -> None:
    """Turn neighbouring channels of a slice by their angle, in place; the others stay."""
    start, end = a.partial_slice
    some = a.x[..., start:end]
    even, odd = some[..., 0::2].float(), some[..., 1::2].float()
    cosine, sine = a.r1.float(), a.r2.float()
    turned = torch.empty_like(some)
    turned[..., 0::2] = even * cosine[..., 0::2] - odd * sine[..., 0::2]
    turned[..., 1::2] = odd * cosine[..., 1::2] + even * sine[..., 1::2]
    some.copy_(turned)
