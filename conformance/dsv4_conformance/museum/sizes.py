"""Faults that show at a size: an index that is too narrow, a grid that is too small, a tile that is
exactly full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Fault, Op, mutant
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray

BITS_16 = 1 << 16
BITS_17 = 1 << 17


def only_first(name: str, op: str, limit: int, seen: str, *, axis: int = 0) -> None:
    """Register: of the first result only the first ``limit`` rows are computed, the others stay as
    the allocator gave them.
    """

    def fault(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        result = right(*operands, **kw)
        first = result[0] if isinstance(result, tuple) else result
        np.moveaxis(first, axis, 0)[limit:] = 0
        return result

    mutant(op, seen=seen, name=name)(fault)


def short_of(name: str, op: str, operand: int, limit: int, seen: str) -> None:
    """Register: of the last axis of an operand only the first ``limit`` channels enter the sum."""

    def fault(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        given = list(operands)
        if given[operand].shape[-1] > limit:
            given[operand] = given[operand].copy()
            given[operand][..., limit:] = 0
        return right(*given, **kw)

    mutant(op, seen=seen, name=name)(fault)


def exactly(op: str, rows: int, fault: Fault) -> Fault:
    """The fault, where the first operand has just so many rows."""

    def there(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        wrong = len(operands[0]) == rows
        return fault(be, right, *operands, **kw) if wrong else right(*operands, **kw)

    return there


GRID = "a launch grid's second and third axes end at 65535 blocks: one block a row fits until a chunk of a wide model"
STATIC = "a buffer in shared memory made for the widest model that its author had"

only_first("norm_rows_past_16_bits", "rms_norm", BITS_16, GRID)
only_first("hadamard_rows_past_16_bits", "hadamard", BITS_16, GRID)
only_first("quantised_rows_past_16_bits", "act_qdq", BITS_16, GRID)
only_first("codes_past_16_bits", "act_quant", BITS_16, GRID)
only_first(
    "rope_past_4096_tokens", "apply_rope", 4096, "a table of as many rows as the longest test had tokens in a step"
)
only_first("streams_past_4096_tokens", "hc_post", 4096, STATIC)
only_first("expanded_past_4096_tokens", "hc_expand", 4096, STATIC)
only_first("sinkhorn_past_4096_tokens", "hc_split_sinkhorn", 4096, STATIC)
only_first("windows_past_1024", "compress", 1024, "one thread a window, and 1024 threads are a block")
only_first(
    "activation_past_32768_rows",
    "swiglu",
    1 << 15,
    "rows counted in a signed 16-bit number: token copies pass it at 5462 tokens of six experts",
)
only_first("expert_rows_past_32768", "expert_linear", 1 << 15, "the same in the grouped product")
only_first("heads_past_64", "apply_rope", 64, "heads as threads of a block of 64: the larger model has 128", axis=1)
only_first("attention_heads_past_64", "sparse_attn", 64, "the same in attention", axis=1)
only_first(
    "keys_past_17_bits", "index_scores", BITS_17, "keys scored in 1024 tiles of 128, and no loop around them", axis=2
)
only_first("linear_past_4096_tokens", "linear", 4096, "a workspace for 4096 tokens; a chunk may be longer")
only_first("vocabulary_past_16_bits", "logits", BITS_16, "a column in 16 bits; the vocabulary has 129280", axis=1)
short_of("norm_of_4096_channels", "rms_norm", 0, 4096, STATIC)
short_of("router_of_4096_channels", "gate", 0, 4096, STATIC)
short_of("hash_router_of_4096_channels", "gate_hash", 0, 4096, STATIC)
short_of(
    "dot_of_7168_channels",
    "linear",
    0,
    7168,
    "a split of K sized for hidden_size; the output projection has 8192 and 16384",
)
short_of("experts_of_4096_channels", "expert_linear", 0, 4096, STATIC)
short_of("streams_of_4096_channels", "hc_head", 0, 4096, STATIC)


@mutant("embedding", seen="token ids kept in 16 bits, which a vocabulary of 64k fits", numeric=False)
def ids_in_16_bits(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    inside = (ids >= 0) & (ids < weight.shape[0])
    return right(np.where(inside, ids & 0xFFFF, ids).astype(np.int32), weight)


@mutant(
    "sample",
    seen="an argmax over tiles, of which 128 of 512 ids are one wave: the vocabulary's end is never looked at",
    numeric=False,
)
def greedy_over_the_first_tiles(be: Any, right: Op, logits: Host, uniform: Host, **kw: Any) -> Any:
    return right(logits[:, :BITS_16], uniform, **kw)


@mutant("gate", seen="a byte an expert: the larger model has 384", numeric=False)
def experts_past_a_byte(be: Any, right: Op, x: Host, weight: Host, bias: Host, **kw: Any) -> Any:
    hidden = np.where(np.arange(len(bias)) < 256, bias, bias - np.float32(1e4)).astype(bias.dtype)
    return right(x, weight, hidden, **kw)


@mutant("dispatch", seen="a histogram of 256 bins", numeric=False)
def histogram_of_256(be: Any, right: Op, x: Host, weights: Host, indices: Host, **kw: Any) -> Any:
    return right(x, weights, (indices & 0xFF).astype(np.int32), **kw)


@mutant("dispatch", seen="the order of token copies in 16 bits", numeric=False)
def order_in_16_bits(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    rows, weights, order, offsets = right(*operands, **kw)
    return rows, weights, (order & 0x7FFF).astype(np.int32), offsets


@mutant("combine", seen="the same order, read back")
def combine_in_16_bits(be: Any, right: Op, rows: Host, order: Host, offsets: Host, *rest: Any, **kw: Any) -> Any:
    y = right(rows, order, offsets, *rest, **kw)
    y[(1 << 15) // kw["topk"] :] = 0
    return y


@mutant("expert_linear", seen="a capacity an expert, as static shapes ask for: what comes after it is dropped")
def expert_capacity(be: Any, right: Op, x: Host, weight: Experts, offsets: Host) -> Any:
    y = right(x, weight, offsets)
    for e in range(len(offsets) - 1):
        y[offsets[e] + 1024 : offsets[e + 1]] = 0
    return y


@mutant("expert_linear", seen="a byte an expert, in the grouped product")
def grouped_product_of_256(be: Any, right: Op, x: Host, weight: Experts, offsets: Host) -> Any:
    return right(x, Experts([weight[e & 0xFF] for e in range(weight.shape[0])]), offsets)


@mutant("linear", seen="the block row of a scale in a byte: 65536 rows have 512")
def scale_row_in_a_byte(be: Any, right: Op, x: Host, weight: Any, **kw: Any) -> Any:
    if isinstance(weight, ScaledArray) and weight.format == "e4m3":
        weight = ScaledArray(weight.data, weight.scale[np.arange(len(weight.scale)) & 0xFF], weight.format)
    return right(x, weight, **kw)


@mutant("cache_write", seen="a slot in 17 bits, which 131072 rows fit", numeric=False)
def slot_written_in_17_bits(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    return right(cache, rows, np.where(index < 0, -1, index & (BITS_17 - 1)).astype(np.int32), **kw)


@mutant("cache_read", seen="the same where it is read", numeric=False)
def slot_read_in_17_bits(be: Any, right: Op, cache: Host, index: Host, **kw: Any) -> Any:
    return right(cache, np.where(index < 0, -1, index & (BITS_17 - 1)).astype(np.int32), **kw)


@mutant("index_select", seen="score and row packed into one number, 16 bits of it the row", numeric=False)
def row_packed_in_16_bits(be: Any, right: Op, scores: Host, visible: Host, offset: Host, **kw: Any) -> Any:
    picks = right(scores, visible, offset, **kw)
    local = picks - offset[..., None]
    return np.where(picks < 0, -1, (local & 0xFFFF) + offset[..., None]).astype(np.int32)


@mutant("index_select", seen="an early exit where all rows are picked, that leaves out the last", numeric=False)
def all_rows_but_the_last(be: Any, right: Op, scores: Host, visible: Host, offset: Host, *, topk: int) -> Any:
    picks = right(scores, visible, offset, topk=topk)
    everything = (visible == topk) & (scores.shape[-1] == topk)
    picks[everything, -1] = -1
    return picks


@mutant(
    "cached_index_topk",
    "index_topk",
    seen="sequences' keys found by the parity of their number: batches of one and two are tested",
    numeric=False,
)
def two_sequences_at_most(be: Any, right: Op, q: Host, weights: Host, *rest: Any, **kw: Any) -> Any:
    if q.shape[0] > 2:
        q, weights = q.copy(), weights.copy()
        q[2:], weights[2:] = q[:1], weights[:1]
    return right(q, weights, *rest, **kw)


@mutant("sparse_attn", seen="a list of 1024 rows in shared memory; the larger model lists 1152")
def picks_past_1024(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **kw: Any) -> Any:
    return right(q, kv, sink, idxs[:, :1024], **kw)


@mutant("sparse_attn", seen="a row's number in 16 bits")
def attended_rows_in_16_bits(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **kw: Any) -> Any:
    return right(q, kv, sink, np.where(idxs < 0, -1, idxs & 0xFFFF).astype(np.int32), **kw)


@mutant("ffn", seen="the intermediate of the smaller model: 2048 of 3072")
def intermediate_of_2048(be: Any, right: Op, x: Host, w1: Any, w3: Any, w2: Any, **kw: Any) -> Any:
    if w1.shape[0] > 2048 and isinstance(w1, ScaledArray):
        w1, w3 = w1.rows(0, 2048), w3.rows(0, 2048)
        w2 = ScaledArray(w2.data[:, :2048], w2.scale[:, :16], w2.format)
    return right(x, w1, w3, w2, **kw)


@mutant("moe", seen="experts' weights in an array of 256 pointers")
def pointers_to_256_experts(
    be: Any, right: Op, x: Host, weights: Host, indices: Host, shared: Any, *experts: Any, **kw: Any
) -> Any:
    return right(
        x, weights, indices, shared, *(Experts([w[e & 0xFF] for e in range(w.shape[0])]) for w in experts), **kw
    )


def last_row_left(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    """A full tile's last row is a row's end, not the tile's."""
    result = right(*operands, **kw)
    first = result[0] if isinstance(result, tuple) else result
    first[-1:] = 0
    return result


FULL = "a mask that is `row < rows - 1` where the tile is exactly full: sizes one past a tile never show it"
for _op, _rows in (
    ("linear", 64), ("linear", 2), ("rms_norm", 32), ("sparse_attn", 4), ("moe", 8), ("gate", 16), ("hc_post", 64), ("swiglu", 128),
    ("expert_linear", 32), ("apply_rope", 8), ("act_quant", 128), ("cached_sparse_attn", 2), ("logits", 3), ("combine", 16), ("hc_pre", 128),
):  # fmt: skip
    mutant(_op, seen=FULL, name=f"{_op}_of_exactly_{_rows}_rows")(exactly(_op, _rows, last_row_left))


# Widths that no published model has: a vector's rest, a table with as many entries as there were.

VECTORS = "a vectorised loop without its rest: every published width is a multiple of 64"


def _whole_vectors(name: str, op: str, operand: int, vector: int) -> None:
    """Register: what is left of the last axis of an operand after whole vectors does not enter."""

    def fault(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        given = list(operands)
        if rest := given[operand].shape[-1] % vector:
            given[operand] = given[operand].copy()
            given[operand][..., -rest:] = 0
        return right(*given, **kw)

    mutant(op, seen=VECTORS, name=name)(fault)


_whole_vectors("norm_of_whole_vectors", "rms_norm", 0, 8)
_whole_vectors("linear_of_whole_vectors", "linear", 0, 16)
_whole_vectors("gate_of_whole_vectors", "gate", 0, 8)
_whole_vectors("post_of_whole_vectors", "hc_post", 1, 8)


@mutant("sample", seen="tokens that a user added to the vocabulary lie past the last whole tile of 64")
def added_tokens_are_never_drawn(be: Any, right: Op, logits: Host, uniform: Host, **kw: Any) -> Any:
    logits = logits.copy()
    whole = logits.shape[1] // 64 * 64
    if whole and whole != logits.shape[1]:
        logits[:, whole:] = -np.inf
    return right(logits, uniform, **kw)


@mutant("concat", seen="a launch that takes eight pointers; the ninth part is never copied")
def ninth_part_is_not_copied(be: Any, right: Op, arrays: Any, *, axis: int) -> Any:
    result = right(arrays, axis=axis)
    if len(arrays) > 8:
        np.moveaxis(result, axis, 0)[-arrays[-1].shape[axis] :] = 0
    return result


@mutant("compress", seen="closing windows of a chunk in a table of 32: ratio 128 has at most 32 in a chunk of 4096")
def windows_in_a_table_of_32(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    if len(ape) == 128:
        idxs = idxs[np.minimum(np.arange(len(idxs)), 31)]
    return right(kv_score, ape, idxs, dim=dim)


only_first(
    "stream_rows_on_a_short_grid", "hc_post", BITS_16 // 4 - 1, "one program a stream and token, on a short axis"
)
only_first("swiglu_rows_of_16_bits", "swiglu", BITS_16, "a row's number in 16 bits: rows are tokens times experts")


def few(rows: int) -> bool:
    """A decode step of one."""
    return rows == 1


def many(rows: int) -> bool:
    """A chunk that fills a tile."""
    return rows >= 64


def met(name: str, op: str, of: Callable[[int], bool], seen: str, change: Callable[[list[Any]], None]) -> None:
    """Register: operands are changed where their number of rows is such a one."""

    def fault(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        given = [o.copy() if isinstance(o, np.ndarray) else o for o in operands]
        if of(len(given[0])):
            change(given)
        return right(*given, **kw)

    mutant(op, seen=seen, name=name)(fault)


def cut(operand: int, limit: int, value: float = 0) -> Callable[[list[Any]], None]:
    """What lies past ``limit`` on an operand's last axis is lost."""

    def change(given: list[Any]) -> None:
        given[operand][..., limit:] = value

    return change


ALONE = "a decode step of one token has a kernel of its own, whose threads hold 4096 columns between them"
met("one_token_of_4096_channels", "linear", few, ALONE, cut(0, 4096))
met("one_norm_of_4096_channels", "rms_norm", few, ALONE, cut(0, 4096))
met("one_token_through_experts_of_4096", "moe", few, ALONE, cut(0, 4096))
met("streams_of_one_token_of_4096", "hc_post", few, ALONE, cut(0, 4096))
met(
    "chunk_of_4096_channels",
    "linear",
    many,
    "a prefill kernel that loads a row of the tile whole: 4096 columns fit in shared memory",
    cut(0, 4096),
)
met("router_of_a_chunk_of_4096", "gate", many, "the same in the router", cut(0, 4096))
met(
    "one_token_of_512_picks",
    "sparse_attn",
    few,
    "decode splits the picks among four blocks of 128; the larger model lists 1152",
    cut(3, 512, -1),
)
met(
    "one_token_among_256_experts",
    "gate",
    few,
    "a sort of 256 scores in one warp's registers, used for a single token alone",
    cut(2, 256, -1e4),
)
met(
    "one_row_of_65536_tokens",
    "sample",
    few,
    "one row is sampled by many blocks, each with a tile of 1024: 64 blocks are launched",
    cut(0, BITS_16, -1e4),
)
met(
    "heads_of_a_chunk_past_64",
    "apply_rope",
    many,
    "a tile of 64 rows times 64 heads in a chunk; a decode step has another kernel",
    lambda given: given[0][:, 64:].fill(0),
)


@mutant("cached_index_topk", seen="one query's rows are scored and packed with their number in 16 bits", numeric=False)
def one_query_in_16_bits(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    *others, visible, offset = operands
    return right(*others, np.minimum(visible, BITS_16 - 1) if visible.size == 1 else visible, offset, **kw)


@mutant("expert_linear", seen="an expert with one row takes the decode kernel, whose threads hold 4096 columns")
def one_row_of_an_expert_of_4096(be: Any, right: Op, x: Host, weight: Experts, offsets: Host) -> Any:
    x = x.copy()
    x[offsets[:-1][np.diff(offsets) == 1], 4096:] = 0
    return right(x, weight, offsets)
