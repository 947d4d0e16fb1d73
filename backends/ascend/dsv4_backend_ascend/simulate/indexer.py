"""npu_lightning_indexer over keys in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import CannError, simulated

if TYPE_CHECKING:
    from types import SimpleNamespace

SCORES_AT_ONCE = 1 << 24  # elements alive at a time: tokens * heads * keys


def _shapes(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq = a.query.shape[:2]
    return a.query.new_empty([batch, seq, 1, a.sparse_count], dtype=torch.int32), a.query.new_empty([0])


@simulated("npu_lightning_indexer", shapes=_shapes)
def lightning_indexer(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick each query's ``sparse_count`` best keys by ``sum_h weights[h] * relu(query[h] . key)``,
    best first, then -1.

    Query s of a row sees its keys 0 .. length - 1; with sparse_mode 3 only those up to ``length -
    queries + s``.
    """
    batch, seq, heads, dim = a.query.shape
    block = a.key.shape[1]
    lengths = a.actual_seq_lengths_key.long()
    if int(lengths.min()) < 0 or int(lengths.max()) > a.block_table.shape[1] * block:
        raise CannError(
            f"npu_lightning_indexer: key lengths {lengths.tolist()} do not fit {a.block_table.shape[1]} blocks of {block}"
        )
    longest = int(lengths.max())
    picks = torch.full((batch, seq, 1, a.sparse_count), -1, dtype=torch.int32)
    if longest == 0:
        return picks, a.query.new_empty([0])
    used = -(-longest // block)
    step = max(1, SCORES_AT_ONCE // (seq * heads * used * block))
    for b in range(0, batch, step):
        some = slice(b, b + step)
        # addresses past a row's length may be garbage: 0 is read, and masked below
        valid = torch.arange(used) < (lengths[some, None] + block - 1) // block
        keys = (
            a.key[a.block_table[some, :used].long().where(valid, 0)].reshape(-1, used * block, dim)[:, :longest].float()
        )
        scores = torch.einsum("bshd,bnd->bshn", a.query[some].float(), keys).relu_()
        scores = torch.einsum("bshn,bsh->bsn", scores, a.weights[some].float())
        visible = lengths[some, None].expand(-1, seq)
        if a.sparse_mode == 3:
            visible = visible - seq + 1 + torch.arange(seq)
        scores.masked_fill_(torch.arange(longest) >= visible.unsqueeze(-1), -torch.inf)
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., : a.sparse_count]
        order = order.where(torch.arange(order.shape[-1]) < visible.unsqueeze(-1), -1)
        picks[some, :, 0, : order.shape[-1]] = order.to(torch.int32)
    return picks, a.query.new_empty([0])
