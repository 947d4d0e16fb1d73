"""sparse_attn and index_topk in npu ops."""

from __future__ import annotations

import torch

from dsv4_backend_ascend.cann.call import call

ROPE_CHANNELS = 64  # npu_sparse_flash_attention takes this many beside the 512; they carry the sink
KEYS_A_BLOCK = 128  # npu_lightning_indexer: a multiple of 16 up to 1024
EXACT_IN_FLOAT32 = (1 << 24) - 1  # rows that float32 numbers; one more stands for none
SINK_LIMIT = 1e30  # beyond it a BF16 part would be infinite, and infinity minus itself is not a number


def sparse_attn(
    q: torch.Tensor, kv: torch.Tensor, attn_sink: torch.Tensor, topk_idxs: torch.Tensor, *, softmax_scale: float
) -> torch.Tensor:
    """Contract ``sparse_attn``. The sink is one row more, which every token picks first.

    Its 512 channels are zero, so it adds nothing to the sum; its RoPE channels, which are part of the key only, hold
    ones against the sink in the
    query's, split into three BF16 parts (24 bits), so its score is the sink. A token that picks nothing else gets
    zeros.
    """
    tokens, heads, dim = q.shape
    rows = kv.shape[0]
    keys = torch.cat([kv, kv.new_zeros(1, dim)]).unsqueeze(1)
    query_rope, key_rope = q.new_zeros(tokens, heads, ROPE_CHANNELS), kv.new_zeros(rows + 1, 1, ROPE_CHANNELS)
    rest = (attn_sink.float() / softmax_scale).clamp(-SINK_LIMIT, SINK_LIMIT)
    for part in range(3):
        query_rope[..., part] = rest.to(q.dtype)
        rest = rest - rest.to(q.dtype).float()
    key_rope[rows, :, :3] = 1
    picks = topk_idxs.where(topk_idxs >= 0, rows + 1)
    if rows < EXACT_IN_FLOAT32:  # whole numbers are sorted on a scalar core of A2 and A3
        picks = picks.float()
    picks = picks.sort(dim=-1).values  # valid ones first
    picks = torch.nn.functional.pad(picks.where(picks <= rows, -1).to(torch.int32), (1, 0), value=rows)
    return call(  # type: ignore[no-any-return]
        "npu_sparse_flash_attention",
        query=q.contiguous(),
        key=keys,
        value=keys,
        sparse_indices=picks.unsqueeze(1).contiguous(),
        scale_value=softmax_scale,
        actual_seq_lengths_query=q.new_full((1,), tokens, dtype=torch.int32),
        actual_seq_lengths_kv=q.new_full((1,), rows + 1, dtype=torch.int32),
        query_rope=query_rope,
        key_rope=key_rope,
        layout_query="TND",
        layout_kv="TND",
        sparse_mode=0,
        attention_mode=2,
    )[0]


def index_topk(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    offset: torch.Tensor,
    *,
    topk: int,
) -> torch.Tensor:
    """Contract ``index_topk``; its positive scale does not change the order. The op knows no compression ratio and
    needs none.

    Each token is a row of the batch whose key length is what it may see; the rows of a sequence share its keys through
    the block table.
    """
    batch, seq, heads, dim = q.shape
    blocks = -(-keys.shape[1] // KEYS_A_BLOCK)
    paged = torch.nn.functional.pad(keys, (0, 0, 0, blocks * KEYS_A_BLOCK - keys.shape[1]))
    table = torch.arange(batch * blocks, dtype=torch.int32, device=q.device).unflatten(0, (batch, 1, blocks))
    picks, _ = call(
        "npu_lightning_indexer",
        query=q.reshape(batch * seq, 1, heads, dim).contiguous(),
        key=paged.reshape(batch * blocks, KEYS_A_BLOCK, 1, dim),
        weights=weights.reshape(batch * seq, 1, heads).contiguous(),
        actual_seq_lengths_query=visible.new_ones(batch * seq, dtype=torch.int32),
        actual_seq_lengths_key=visible.flatten().to(torch.int32),
        block_table=table.expand(batch, seq, blocks).reshape(batch * seq, blocks),
        layout_query="BSND",
        layout_key="PA_BSND",
        sparse_count=topk,
        sparse_mode=0,
    )
    rows = picks.reshape(batch, seq, topk)
    return (rows + offset.unsqueeze(-1)).where(rows >= 0, -1).to(torch.int32)
