"""sparse_attn and index_topk in npu ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.cann.call import RefusedError, call

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend
    from dsv4_core.contract.dtypes import RowLayout

ROPE_CHANNELS = 64  # npu_sparse_flash_attention takes this many beside the 512; they carry the sink
KEYS_A_BLOCK = 128  # npu_lightning_indexer: a multiple of 16 up to 1024
KEYS_AT_LEAST = 16
EXACT_IN_FLOAT32 = (1 << 24) - 1  # rows that float32 numbers; one more stands for none
SINK_LIMIT = 1e30  # beyond it a BF16 part would be infinite, and infinity minus itself is not a number


def sparse_attn(
    backend: ChipBackend,
    q: torch.Tensor,
    kv: torch.Tensor,
    attn_sink: torch.Tensor,
    topk_idxs: torch.Tensor,
    *,
    softmax_scale: float,
) -> torch.Tensor:
    """Contract ``sparse_attn``."""
    keys = torch.cat([kv, no_row(backend, kv)])
    return attend(backend, q, keys, attn_sink, topk_idxs, softmax_scale=softmax_scale)


def no_row(backend: ChipBackend, kv: torch.Tensor) -> torch.Tensor:
    """The row of zeros [1, dim] that carries the sink."""
    return backend.kept.always(("no row", kv.shape[1], kv.dtype), None, lambda: kv.new_zeros(1, kv.shape[1]))


def attend(
    backend: ChipBackend,
    q: torch.Tensor,
    keys: torch.Tensor,
    attn_sink: torch.Tensor,
    topk_idxs: torch.Tensor,
    *,
    softmax_scale: float,
) -> torch.Tensor:
    """``sparse_attn`` over ``keys``, whose last row is ``no_row``: the sink, which every token
    picks first.

    Its 512 channels are zero, so it adds nothing to the sum; its RoPE channels, which are part of
    the key only, hold ones against the sink in the query's, split into three BF16 parts (24 bits),
    so its score is the sink. A token that picks nothing else gets zeros. What depends on a weight
    or on sizes alone is made once, and the order of picks once for all layers that pick the same.
    """
    tokens, heads, _ = q.shape
    rows, kept = keys.shape[0] - 1, backend.kept

    def sink_channels() -> torch.Tensor:
        made, rest = (
            q.new_zeros(heads, ROPE_CHANNELS),
            (attn_sink.float() / softmax_scale).clamp(-SINK_LIMIT, SINK_LIMIT),
        )
        for part in range(3):
            made[:, part] = rest.to(q.dtype)
            rest = rest - rest.to(q.dtype).float()
        return made

    def key_channels() -> torch.Tensor:
        made = keys.new_zeros(rows + 1, 1, ROPE_CHANNELS)
        made[rows, :, :3] = 1
        return made

    def valid_first() -> torch.Tensor:
        picks = topk_idxs.where(topk_idxs >= 0, rows + 1)
        if rows < EXACT_IN_FLOAT32:  # whole numbers are sorted on a scalar core of A2 and A3
            picks = picks.float()
        picks = picks.sort(dim=-1).values
        picks = torch.nn.functional.pad(picks.where(picks <= rows, -1).to(torch.int32), (1, 0), value=rows)
        return picks.unsqueeze(1).contiguous()

    def length(of: int) -> torch.Tensor:
        return kept.always(("length", of), None, lambda: q.new_full((1,), of, dtype=torch.int32))

    sink = kept.always(("sink", id(attn_sink), softmax_scale, q.dtype), attn_sink, sink_channels)
    return call(  # type: ignore[no-any-return]
        "npu_sparse_flash_attention",
        query=q.contiguous(),
        key=keys.unsqueeze(1),
        value=keys.unsqueeze(1),
        sparse_indices=kept.of((topk_idxs, "valid first", rows), valid_first),
        scale_value=softmax_scale,
        actual_seq_lengths_query=length(tokens),
        actual_seq_lengths_kv=length(rows + 1),
        query_rope=sink.expand(tokens, heads, ROPE_CHANNELS).contiguous(),
        key_rope=kept.always(("key channels", rows, keys.dtype), None, key_channels),
        layout_query="TND",
        layout_kv="TND",
        sparse_mode=0,
        attention_mode=2,
    )[0]


def index_topk(
    backend: ChipBackend,
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    offset: torch.Tensor,
    *,
    topk: int,
) -> torch.Tensor:
    """Contract ``index_topk``; its positive scale does not change the order. The op knows no
    compression ratio and needs none.

    Each token is a row of the batch whose key length is what it may see; the rows of a sequence
    share its keys through the block table.
    """
    batch, seq, _, dim = q.shape
    blocks = -(-keys.shape[1] // KEYS_A_BLOCK)
    missing = blocks * KEYS_A_BLOCK - keys.shape[1]
    paged = torch.nn.functional.pad(keys, (0, 0, 0, missing)) if missing else keys

    def table() -> torch.Tensor:
        block = torch.arange(batch * blocks, dtype=torch.int32, device=q.device).unflatten(0, (batch, 1, blocks))
        return block.expand(batch, seq, blocks).reshape(batch * seq, blocks)

    made = backend.kept.always(("blocks", batch, seq, blocks), None, table)
    return _picks(backend, q, weights, paged.reshape(-1, KEYS_A_BLOCK, 1, dim), made, visible, offset, topk=topk)


def cached_index_topk(
    backend: ChipBackend,
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    index: torch.Tensor,
    visible: torch.Tensor,
    offset: torch.Tensor,
    *,
    layout: RowLayout,
    topk: int,
) -> torch.Tensor:
    """Contract ``cached_index_topk`` of plain keys that lie in blocks: read where they are. All
    layers of a step share the table of blocks.
    """
    (batch, seq, _, dim), run = q.shape, layout.run
    if layout.kind != "plain" or run % KEYS_AT_LEAST or cache.shape[0] % run:
        raise RefusedError(
            f"npu_lightning_indexer: {layout.kind} keys in runs of {run} of {cache.shape[0]} rows; it reads plain keys "
            f"where they lie in whole blocks of a multiple of {KEYS_AT_LEAST} (a context of a multiple of 64 tokens)"
        )

    def table() -> torch.Tensor:
        block = index.reshape(batch, 1, -1)[:, :, ::run] // run
        return block.expand(batch, seq, block.shape[2]).reshape(batch * seq, block.shape[2]).contiguous()

    made = backend.kept.of((index, "blocks", seq, run), table)
    return _picks(backend, q, weights, cache.reshape(-1, run, 1, dim), made, visible, offset, topk=topk)


def _picks(
    backend: ChipBackend,
    q: torch.Tensor,
    weights: torch.Tensor,
    paged: torch.Tensor,
    table: torch.Tensor,
    visible: torch.Tensor,
    offset: torch.Tensor,
    *,
    topk: int,
) -> torch.Tensor:
    """Rows picked among keys in blocks [blocks, rows, 1, dim] by a table of each token's blocks."""
    batch, seq, heads, dim = q.shape
    one_each = backend.kept.always(("one each", batch * seq), None, lambda: visible.new_ones(batch * seq))
    picks, _ = call(
        "npu_lightning_indexer",
        query=q.reshape(batch * seq, 1, heads, dim).contiguous(),
        key=paged,
        weights=weights.reshape(batch * seq, 1, heads).contiguous(),
        actual_seq_lengths_query=one_each,
        actual_seq_lengths_key=visible.flatten().to(torch.int32),
        block_table=table,
        layout_query="BSND",
        layout_key="PA_BSND",
        sparse_count=topk,
        sparse_mode=0,
    )
    rows = picks.reshape(batch, seq, topk)
    return (rows + offset.unsqueeze(-1)).where(rows >= 0, -1)
