"""hc_pre and hc_post in npu ops, 950."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_backend_ascend.cann.call import call

if TYPE_CHECKING:
    import torch


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


def hc_post(y: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Contract ``hc_post``."""
    return call("npu_mhc_post", x=h, h_res=comb, h_out=y, h_post=post)  # type: ignore[no-any-return]
