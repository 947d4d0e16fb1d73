"""npu_sparse_flash_attention, MLA-absorb mode, TND layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import CannError, simulated

if TYPE_CHECKING:
    from types import SimpleNamespace

ROWS_AT_ONCE = 1 << 24  # gathered elements alive at a time: tokens * picks * channels


def _shapes(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    statistic = [1, a.query.shape[0], a.query.shape[1]] if a.return_softmax_lse else [0]
    return (
        torch.empty_like(a.query),
        a.query.new_empty(statistic, dtype=torch.float32),
        a.query.new_empty(statistic, dtype=torch.float32),
    )


def picked_rows(a: SimpleNamespace) -> torch.Tensor:
    """Row of ``key`` for each pick, -1 for none. Raises ``CannError`` where a pick is invalid or
    stands behind an invalid one.
    """
    query_ends, kv_ends = a.actual_seq_lengths_query.long(), a.actual_seq_lengths_kv.long()
    sequence = torch.searchsorted(query_ends, torch.arange(a.query.shape[0]), right=True)
    kv_starts = torch.cat([kv_ends.new_zeros(1), kv_ends[:-1]])
    lengths = (kv_ends - kv_starts)[sequence]
    if int(query_ends[-1]) != a.query.shape[0] or int(kv_ends[-1]) > a.key.shape[0]:
        raise CannError(
            f"npu_sparse_flash_attention: running totals end at {int(query_ends[-1])} and {int(kv_ends[-1])}; "
            f"{a.query.shape[0]} tokens, {a.key.shape[0]} rows"
        )
    picks = a.sparse_indices[:, 0].long()
    valid = picks >= 0
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise CannError(
            "npu_sparse_flash_attention: sparse_indices has a valid pick behind an invalid one; valid ones come first"
        )
    if bool((picks >= lengths[:, None]).any()):
        raise CannError(
            f"npu_sparse_flash_attention: sparse_indices reaches {int(picks.max())}; below the sequence's length"
        )
    if a.sparse_mode == 3:
        starts = torch.cat([query_ends.new_zeros(1), query_ends[:-1]])
        last = lengths - (query_ends - starts)[sequence] + torch.arange(a.query.shape[0]) - starts[sequence]
        valid &= picks <= last[:, None]
    return (picks + kv_starts[sequence, None]).where(valid, -1)


@simulated("npu_sparse_flash_attention", shapes=_shapes)
def sparse_flash_attention(a: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """Attend to each query's picked rows, float32 inside, rounded once; give the scaled scores'
    maximum and sum of exponentials.

    A query without a pick is left undefined (NaN).
    """
    tokens, heads = a.query.shape[:2]
    rows = picked_rows(a)
    query = torch.cat([a.query, a.query_rope], dim=-1).float()
    out = torch.empty_like(a.query)
    maximum, total = (torch.empty(1, tokens, heads) for _ in range(2))
    step = max(1, ROWS_AT_ONCE // (rows.shape[1] * query.shape[2]))
    for t in range(0, tokens, step):
        some = slice(t, t + step)
        index = rows[some].clamp(min=0)
        key = torch.cat([a.key[index, 0], a.key_rope[index, 0]], dim=-1).float()
        scores = torch.einsum("thd,tpd->thp", query[some], key) * a.scale_value
        scores.masked_fill_((rows[some] < 0).unsqueeze(1), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        norm = weights.sum(-1, keepdim=True)
        out[some] = (torch.einsum("thp,tpd->thd", weights, a.value[index, 0].float()) / norm).to(out.dtype)
        maximum[0, some], total[0, some] = top.squeeze(-1), norm.squeeze(-1)
    return (out, maximum, total) if a.return_softmax_lse else (out, maximum.new_empty(0), maximum.new_empty(0))
