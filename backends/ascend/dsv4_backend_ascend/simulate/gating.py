"""npu_moe_gating_top_k and vLLM's moe_gating_top_k_hash, norm_type 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import CannError, simulated

if TYPE_CHECKING:
    from types import SimpleNamespace


def _shapes(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    rows, experts = a.x.shape
    return (
        a.x.new_empty([rows, a.k]),
        a.x.new_empty([rows, a.k], dtype=torch.int32),
        a.x.new_empty([rows, experts], dtype=torch.float32),
    )


@simulated("moe_gating_top_k_hash", shapes=_shapes)
@simulated("npu_moe_gating_top_k", shapes=_shapes)
def moe_gating_top_k(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """Scores ``sqrt(ln(1 + e^x))``, in float32 as it stands there, of the picks over (their sum +
    eps), times the factor; picks by score plus bias, or from the table. The third result is
    undefined unless asked for.
    """
    scores = (1 + a.x.float().exp()).log().sqrt()
    if a.tid2eid is None:
        biased = scores if a.bias is None else scores + a.bias.float()
        picks = torch.argsort(biased, dim=-1, descending=True, stable=True)[:, : a.k]
    else:
        if int(a.input_ids.min()) < 0 or int(a.input_ids.max()) >= a.tid2eid.shape[0]:
            raise CannError(f"gating: input_ids reach {int(a.input_ids.max())}; tid2eid has {a.tid2eid.shape[0]} rows")
        picks = a.tid2eid[a.input_ids.long()].long()
    chosen = scores.gather(1, picks)
    weights = chosen / (chosen.sum(-1, keepdim=True) + a.eps) * a.routed_scaling_factor
    return weights.to(a.x.dtype), picks.to(torch.int32), torch.full_like(scores, torch.nan)
