"""npu_mhc_pre, npu_mhc_sinkhorn and npu_mhc_post."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import simulated, undefined

if TYPE_CHECKING:
    from types import SimpleNamespace


def _pre_shapes(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    tokens, streams, dim = a.x.shape
    shapes = ([tokens, streams], [tokens, streams, streams], [tokens], [tokens, a.phi.shape[0]], [tokens, streams])
    return (a.x.new_empty([tokens, dim]), *(a.x.new_empty(shape, dtype=torch.float32) for shape in shapes))


@simulated("npu_mhc_pre", shapes=_pre_shapes)
def mhc_pre(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """Give the sub-layer's input, ``h_post`` and ``h_res`` before Sinkhorn.

    The last three results, for training, are undefined unless asked for.

    ``mix = phi @ x / sqrt(mean(x^2) + norm_eps)``; ``h_pre = sigmoid(mix * alpha[0] + bias) +
    hc_eps``, ``h_post = 2 sigmoid(mix * alpha[1] + bias)``, ``h_res = mix * alpha[2] + bias``.
    """
    tokens, streams, _ = a.x.shape
    x = a.x.float()
    flat = x.flatten(1)
    inv_rms = torch.rsqrt(flat.square().mean(-1) + a.norm_eps)
    h_mix = flat @ a.phi.t()
    pre, post, res = (h_mix * inv_rms.unsqueeze(-1)).split([streams, streams, streams * streams], dim=-1)
    bias_pre, bias_post, bias_res = a.bias.split([streams, streams, streams * streams])
    h_pre = torch.sigmoid(pre * a.alpha[0] + bias_pre) + a.hc_eps
    h_post = 2 * torch.sigmoid(post * a.alpha[1] + bias_post)
    h_res = (res * a.alpha[2] + bias_res).reshape(tokens, streams, streams)
    h_in = (h_pre.unsqueeze(-1) * x).sum(1).to(a.x.dtype)
    training = (inv_rms, h_mix, h_pre)
    return (
        h_in,
        h_post,
        h_res,
        *(training if a.out_flag else (undefined(tuple(t.shape), t.dtype, a.x) for t in training)),
    )


def _sinkhorn_shapes(a: SimpleNamespace) -> tuple[torch.Tensor, None, None]:
    return torch.empty_like(a.x), None, None


@simulated("npu_mhc_sinkhorn", shapes=_sinkhorn_shapes)
def mhc_sinkhorn(a: SimpleNamespace) -> tuple[torch.Tensor, None, None]:
    """``softmax(x) + eps`` over the last axis, divided by column sums, then ``num_iters - 1`` times
    by row and column sums.

    ``eps`` is added to each sum.
    """
    y = torch.softmax(a.x, -1) + a.eps
    y = y / (y.sum(-2, keepdim=True) + a.eps)
    for _ in range(a.num_iters - 1):
        y = y / (y.sum(-1, keepdim=True) + a.eps)
        y = y / (y.sum(-2, keepdim=True) + a.eps)
    return y, None, None


@simulated("npu_mhc_post", shapes=lambda a: torch.empty_like(a.x))
def mhc_post(a: SimpleNamespace) -> torch.Tensor:
    """``y[n] = sum_j h_res[j, n] x[j] + h_post[n] h_out``, in float32, rounded once."""
    mixed = torch.einsum("tjn,tjd->tnd", a.h_res, a.x.float())
    return (mixed + a.h_post.unsqueeze(-1) * a.h_out.float().unsqueeze(1)).to(a.x.dtype)
