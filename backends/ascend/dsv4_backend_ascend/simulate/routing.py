"""npu_moe_init_routing_v2 and npu_moe_token_unpermute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import CannError, simulated, undefined

if TYPE_CHECKING:
    from types import SimpleNamespace


def _routing_shapes(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    copies = a.expert_idx.shape[0] * a.expert_idx.shape[1]
    return (
        a.x.new_empty([copies, a.x.shape[1]]),
        a.x.new_empty([copies], dtype=torch.int32),
        a.x.new_empty([a.expert_num], dtype=torch.int64),
        a.x.new_empty([copies], dtype=torch.float32),
    )


@simulated("npu_moe_init_routing_v2", shapes=_routing_shapes)
def moe_init_routing_v2(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """Sort copies of tokens stably by expert; say where each came from (row_idx_type 1) or went
    (0), and count each expert's.

    The last result, scales, is undefined without quantisation.
    """
    experts, picks = a.expert_idx.flatten(), a.expert_idx.shape[1]
    if int(experts.min()) < 0 or int(experts.max()) >= a.expert_num:
        raise CannError(
            f"npu_moe_init_routing_v2: expert ids {int(experts.min())} to {int(experts.max())}; 0 to expert_num - 1 = {a.expert_num - 1}"
        )
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=a.expert_num)
    index = order if a.row_idx_type == 1 else torch.argsort(order)
    return (
        a.x[order // picks],
        index.to(torch.int32),
        counts if a.expert_tokens_num_type == 1 else counts.cumsum(0),
        undefined((len(order),), torch.float32, a.x),
    )


def _unpermute_shapes(a: SimpleNamespace) -> torch.Tensor:
    picks = 1 if a.probs is None else a.probs.shape[1]
    return a.permuted_tokens.new_empty([a.sorted_indices.shape[0] // picks, a.permuted_tokens.shape[1]])  # type: ignore[no-any-return]


@simulated("npu_moe_token_unpermute", shapes=_unpermute_shapes)
def moe_token_unpermute(a: SimpleNamespace) -> torch.Tensor:
    """``y[t] = sum_j rows[sorted_indices[t, j]] * probs[t, j]`` in float32, rounded once; without
    probs one row a token.
    """
    picks = 1 if a.probs is None else a.probs.shape[1]
    rows = a.permuted_tokens.float()[a.sorted_indices.long()].unflatten(0, (-1, picks))
    return (rows if a.probs is None else rows * a.probs.float().unsqueeze(-1)).sum(1).to(a.permuted_tokens.dtype)  # type: ignore[no-any-return]
