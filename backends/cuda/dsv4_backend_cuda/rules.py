"""Which kernels run an op on operands of these dtypes and shapes, or why torch's own op does.
Imports no Triton.

A rule takes an op's operands (arrays, or ``Operand``) and scalars as the contract has them, and
gives the kernels' names in the launch table, or the reason as a string. The backend asks the same
rule when it answers ``supports`` and when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4_core.contract.dtypes import FP8_BLOCK, dtype_name

Answer = str | tuple[str, ...]
DECODE_TOKENS = 16  # rows up to which the matrix products take their narrow tile
MIDDLE_TOKENS = 128  # and those up to which FP8 ones may take another than the wide tile
LARGEST_HADAMARD = 256  # channels whose whole +-1 matrix one block multiplies by


def power_of_two(n: int) -> bool:
    """Say whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


def _phase(rows: int, decode: int = DECODE_TOKENS) -> str:
    return "decode" if rows <= decode else "prefill"


def rms_norm(x: Any, weight: Any, *, eps: float) -> Answer:
    del x, weight, eps
    return ("rms_norm",)


def apply_rope(x: Any, positions: Any, freqs: Any, *, inverse: bool) -> Answer:
    del x, positions, inverse
    return ("rope",) if power_of_two(freqs.shape[0]) else f"{freqs.shape[0]} pairs of channels are no power of two"


def rms_norm_rope(x: Any, weight: Any, positions: Any, freqs: Any, *, eps: float) -> Answer:
    del weight, eps
    turns = apply_rope(x, positions, freqs, inverse=False)
    return turns if isinstance(turns, str) else ("norm_rope",)


def act_quant(x: Any, *, block: int) -> Answer:
    del x
    return ("act_quant",) if power_of_two(block) else f"blocks of {block} are no power of two"


def act_qdq(x: Any, *, format: str, block: int, channels: int) -> Answer:
    del x, format, channels
    return ("act_qdq",) if power_of_two(block) else f"blocks of {block} are no power of two"


def hadamard(x: Any) -> Answer:
    dim = x.shape[1]
    fits = power_of_two(dim) and 16 <= dim <= LARGEST_HADAMARD  # a tensor core's step, and registers
    return ("hadamard",) if fits else f"{dim} channels are not a power of two from 16 to {LARGEST_HADAMARD}"


def linear(x: Any, weight: Any, *, out_dtype: str) -> Answer:
    del out_dtype
    dtype, rows = dtype_name(weight), x.shape[0]
    if dtype == "bfloat16":
        return (f"bf16_linear_{_phase(rows)}", "add_pieces")
    if "@" not in dtype:
        return f"no kernel multiplies by {dtype} weights"
    if x.shape[1] % FP8_BLOCK:
        return f"{x.shape[1]} input channels are no multiple of {FP8_BLOCK}"
    if dtype.startswith("float4"):
        return ("act_quant", f"fp4_linear_{_phase(rows)}", "add_pieces")
    between = ("linear_middle",) if DECODE_TOKENS < rows <= MIDDLE_TOKENS else ()  # or the wide tile, by architecture
    return ("act_quant", *between, f"linear_{_phase(rows)}", "add_pieces")


def grouped_linear(x: Any, weight: Any) -> Answer:
    dtype = dtype_name(weight)
    if dtype == "bfloat16":
        return (f"bf16_linear_{_phase(x.shape[0])}",)
    if not dtype.startswith("float8"):
        return f"no kernel multiplies groups by {dtype} weights"
    if x.shape[2] % 4:
        return f"{x.shape[2]} input channels are no multiple of 4"
    return (f"grouped_linear_{_phase(x.shape[0])}",)


def _experts(rows: int, weight: Any) -> Answer:
    dtype = dtype_name(weight)
    experts, _, cols = weight.shape
    if "@" not in dtype:
        return f"no kernel multiplies experts of {dtype}; the published ones are FP4 or FP8"
    if cols % FP8_BLOCK:
        return f"{cols} input channels are no multiple of {FP8_BLOCK}"
    return (f"{'fp4' if dtype.startswith('float4') else 'fp8'}_experts_{_phase(rows, DECODE_TOKENS * experts)}",)


def expert_linear(x: Any, weight: Any, offsets: Any) -> Answer:
    del offsets
    product = _experts(x.shape[0], weight)
    return product if isinstance(product, str) else ("act_quant", *product)


def _gate(x: Any, weight: Any) -> Answer:
    product = linear(x, weight, out_dtype="float32")
    if isinstance(product, str):
        return product
    return (
        *(product[:1] if "act_quant" not in product else product),
        "route",
    )  # it adds up a BF16 product's pieces itself


def gate(x: Any, weight: Any, bias: Any, *, topk: int, route_scale: float) -> Answer:
    del bias, topk, route_scale
    return _gate(x, weight)


def gate_hash(x: Any, weight: Any, tid2eid: Any, ids: Any, *, route_scale: float) -> Answer:
    del tid2eid, ids, route_scale
    return _gate(x, weight)


def dispatch(x: Any, weights: Any, indices: Any, *, first_expert: int, n_experts: int) -> Answer:
    del x, weights, indices, first_expert, n_experts
    return ("sort", "gather")


def swiglu(gate: Any, up: Any, weights: Any, *, limit: float) -> Answer:
    del gate, up, weights, limit
    return ("swiglu",)


def combine(rows: Any, order: Any, offsets: Any, shared: Any, *, topk: int, out_dtype: str) -> Answer:
    del rows, order, offsets, shared, topk, out_dtype
    return ("invert", "combine")


def ffn(x: Any, w1: Any, w3: Any, w2: Any, *, limit: float) -> Answer:
    del limit
    first, second = linear(x, w1, out_dtype=""), linear(Rows(x.shape[0], w2.shape[1]), w2, out_dtype="")
    if isinstance(first, str) or isinstance(second, str) or "act_quant" not in first or "act_quant" not in second:
        return "composed of required ops: only quantised weights gain by fusing"
    if dtype_name(w1) != dtype_name(w3):
        return f"composed of required ops: w1 is {dtype_name(w1)}, w3 is {dtype_name(w3)}"
    return (*first[:-1], "swiglu", *second[1:])


def moe(
    x: Any,
    weights: Any,
    indices: Any,
    shared: Any,
    w1: Any,
    w3: Any,
    w2: Any,
    *,
    first_expert: int,
    limit: float,
    out_dtype: str,
) -> Answer:
    del weights, shared, first_expert, limit, out_dtype
    copies = x.shape[0] * indices.shape[1]
    first, second = _experts(copies, w1), _experts(copies, w2)
    if isinstance(first, str):
        return first
    if dtype_name(w1) != dtype_name(w3):
        return f"composed of required ops: w1 is {dtype_name(w1)}, w3 is {dtype_name(w3)}"
    return second if isinstance(second, str) else ("sort", "act_quant", *first, "swiglu", *second, "combine")


def compress(kv_score: Any, ape: Any, window_idxs: Any, *, dim: int) -> Answer:
    del kv_score, ape, window_idxs, dim
    return ("compress",)


def kv_score(x: Any, wkv: Any, wgate: Any) -> Answer:
    kinds = [dtype_name(weight) for weight in (wkv, wgate)]
    if kinds != ["bfloat16"] * 2:
        return f"composed of required ops: the kernel takes two bfloat16 weights, not {' and '.join(kinds)}"
    return linear(x, wkv, out_dtype="float32")


def cached_compress(kv_score: Any, state: Any, index: Any, ape: Any, window_idxs: Any, *, dim: int) -> Answer:
    del kv_score, state, index, ape, window_idxs, dim
    return ("compress",)


def cache_write(cache: Any, rows: Any, index: Any, *, layout: Any) -> Answer:
    del index
    if not is_contiguous(cache):
        return "the cache is a view whose rows do not follow each other"
    if layout.kind == "plain":
        same = dtype_name(cache) == dtype_name(rows)
        return ("copy_rows",) if same else f"{dtype_name(rows)} rows change to {dtype_name(cache)} on the way"
    if dtype_name(rows) != "bfloat16":
        return f"kernels pack bfloat16 rows, not {dtype_name(rows)}"
    return ("write_kv",) if layout.kind == "kv" else ("write_key",)


def cache_read(cache: Any, index: Any, *, layout: Any) -> Answer:
    del cache, index
    return ("copy_rows",) if layout.kind == "plain" else "kernels read packed rows where they use them"


def is_contiguous(array: Any) -> bool:
    """Say whether an array's rows follow each other; a described operand is taken to be so."""
    return bool(array.is_contiguous()) if hasattr(array, "is_contiguous") else True


def _index_dim(dim: int) -> str:
    return "" if power_of_two(dim) and dim >= 32 else f"{dim} channels of a key are not a power of two from 32 on"


def index_scores(q: Any, weights: Any, keys: Any, *, scale: float) -> Answer:
    del weights, keys, scale
    return _index_dim(q.shape[3]) or ("index_scores",)


def index_select(scores: Any, visible: Any, offset: Any, *, topk: int) -> Answer:
    del scores, visible, offset, topk
    return ("index_select",)


def index_topk(q: Any, weights: Any, keys: Any, visible: Any, offset: Any, *, scale: float, topk: int) -> Answer:
    del weights, keys, visible, offset, scale, topk
    return _index_dim(q.shape[3]) or ("index_scores", "index_select")


def cached_index_topk(
    q: Any, weights: Any, cache: Any, index: Any, visible: Any, offset: Any, *, layout: Any, scale: float, topk: int
) -> Answer:
    del weights, cache, index, visible, offset, scale, topk
    if layout.kind != "key":
        return f"rows of layout {layout.kind!r} are read by torch; kernels read packed keys"
    return _index_dim(q.shape[3]) or ("index_scores", "index_select")


def _attention(kernel: str, q: Any, picks: Any) -> Answer:
    if q.shape[2] < 16:
        return f"{q.shape[2]} channels are fewer than a tensor core's step of 16"
    return (kernel, "sparse_attn_combine") if picks.shape[1] else "no row is listed"


def sparse_attn(q: Any, kv: Any, attn_sink: Any, topk_idxs: Any, *, softmax_scale: float) -> Answer:
    del kv, attn_sink, softmax_scale
    return _attention("sparse_attn", q, topk_idxs)


def cached_sparse_attn(
    q: Any,
    kv: Any,
    ring: Any,
    ring_index: Any,
    rows: Any,
    row_index: Any,
    attn_sink: Any,
    topk_idxs: Any,
    *,
    layout: Any,
    softmax_scale: float,
) -> Answer:
    del kv, ring, ring_index, rows, row_index, attn_sink, softmax_scale
    if layout.kind != "kv":
        return f"rows of layout {layout.kind!r} are read by torch; kernels read packed rows"
    answer = _attention("sparse_attn", q, topk_idxs)
    return ("unpack_rows", *answer) if isinstance(answer, tuple) else answer


def _streams(h: Any, fn: Any) -> str:
    if not power_of_two(h.shape[1]):
        return f"{h.shape[1]} streams are no power of two"
    return "" if dtype_name(fn) == "float32" else f"fn is {dtype_name(fn)}, the kernel's is float32"


def hc_pre(h: Any, fn: Any, scale: Any, base: Any, *, norm_eps: float, eps: float, iters: int) -> Answer:
    del scale, base, norm_eps, eps, iters
    return _streams(h, fn) or ("mix", "hc_reduce")


def hc_pre_norm(
    h: Any, fn: Any, scale: Any, base: Any, weight: Any, *, norm_eps: float, eps: float, iters: int
) -> Answer:
    del scale, base, weight, norm_eps, eps, iters
    return _streams(h, fn) or ("mix", "hc_reduce")


def hc_head(h: Any, fn: Any, scale: Any, base: Any, *, norm_eps: float, eps: float) -> Answer:
    del scale, base, norm_eps, eps
    return _streams(h, fn) or ("mix", "hc_reduce")


def hc_post(y: Any, h: Any, post: Any, comb: Any) -> Answer:
    del y, post, comb
    return ("hc_expand",) if power_of_two(h.shape[1]) else f"{h.shape[1]} streams are no power of two"


class Rows:
    """Rows that a fused op has between two of its kernels."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


RULES: dict[str, Callable[..., Answer]] = {
    rule.__name__: rule
    for rule in (
        rms_norm_rope,
        rms_norm, apply_rope, act_quant, act_qdq, hadamard, linear, grouped_linear, expert_linear, gate, gate_hash, dispatch, swiglu, combine, cache_write,
        cache_read, ffn, moe, compress, kv_score, cached_compress, index_scores, index_select, index_topk,
        cached_index_topk, sparse_attn, cached_sparse_attn, hc_pre, hc_pre_norm, hc_head, hc_post,
    )
}  # fmt: skip

WITHOUT_KERNEL = {
    "embedding": "rows are copied",
    "sample": "once a token, on logits",
    "hc_expand": "rows are copied",
    "hc_add": "the MTP block's input alone",
    "hc_split_sinkhorn": "inside the kernel of hc_pre; the graph does not call it alone",
    "concat": "rows are copied",
}
"""Ops that torch runs, and why no kernel was written."""
