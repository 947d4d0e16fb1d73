"""hc_pre and hc_post in npu ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
    """Contract ``hc_pre``."""
    x, post, res, *_ = call("npu_mhc_pre", x=h, phi=fn, alpha=scale, bias=base, norm_eps=norm_eps, hc_eps=eps)
    return x, post, call("npu_mhc_sinkhorn", x=res, eps=eps, num_iters=iters)[0]


def hc_pre_by_norms(
    backend: ChipBackend,
    h: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contract ``hc_pre`` on A2 and A3, which have no op for Sinkhorn: a half step is an RMS norm
    of the square roots.

    With ``s = sqrt(comb)``, gain 1 / sqrt(n) and ``eps / n`` under the root, a norm over a row of n
    gives ``s / sqrt(sum(s^2) + eps)``, whose square is what the half step makes of ``comb``.
    Columns are rows of the transposed view.
    """
    tokens, hc, dim = h.shape
    kept = backend.kept
    flat = h.reshape(tokens, hc * dim).float()
    whole = kept.always(("gain", hc * dim, flat.dtype), None, lambda: flat.new_ones(hc * dim))
    root = call("npu_rms_norm", input=flat, gamma=whole, epsilon=norm_eps)[1]
    mixes = torch.nn.functional.linear(flat, fn.float()) * root

    def widths() -> torch.Tensor:
        return torch.cat([part.expand(n) for part, n in zip(scale.float().split(1), (hc, hc, hc * hc), strict=True)])

    mixes = torch.addcmul(base.float(), mixes, kept.always(("scale", id(scale)), scale, widths))

    def halves(first: float, second: float) -> torch.Tensor:
        return torch.cat([flat.new_full((hc,), first), flat.new_full((hc,), second)])

    half = kept.always(("post is doubled", hc), None, lambda: halves(1.0, 2.0))
    least = kept.always(("pre is positive", hc, eps), None, lambda: halves(eps, 0.0))
    pre, post = torch.addcmul(least, mixes[:, : 2 * hc].sigmoid(), half).split(hc, 1)
    comb = (mixes[:, 2 * hc :].unflatten(1, (hc, hc)).softmax(-1) + eps).sqrt_()
    gain = kept.always(("gain of a half step", hc), None, lambda: flat.new_full((hc,), hc**-0.5))
    for _ in range(2 * iters - 1):  # columns, then rows and columns in turn
        comb = call("npu_rms_norm", input=comb.transpose(1, 2), gamma=gain, epsilon=eps / hc)[0]
    y = torch.bmm(pre.unsqueeze(1), flat.unflatten(1, (hc, dim))).squeeze(1).to(h.dtype)
    return y, post.contiguous(), comb.transpose(1, 2).square()


def hc_post(y: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Contract ``hc_post``."""
    return call("npu_mhc_post", x=h, h_res=comb, h_out=y, h_post=post)  # type: ignore[no-any-return]
