"""Sizes that real models reach, one axis at a time: an op at each published extent with its other
axes tiny.

What the published models reach is computed from their configurations; ``CHUNK`` tokens are fed at a
time. An axis whose extent is no multiple of a block is also tried one past it, so that full tiles
and a rest both occur. The largest extents of each axis also meet one row and more than a tile of
them: a kernel is chosen by the number of rows and fails at a width. Widths that no published model
has come last: a vocabulary with tokens added, a model of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_conformance.cases.pairs import MOST, rows_of
from dsv4_core.checkpoint.config import PRESETS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dsv4_conformance.cases.case import Case

FLASH, PRO = PRESETS["flash"], PRESETS["pro"]
CHUNK = 5462  # tokens: times six experts each they are 32772 copies, just past 2^15
COPIES = CHUNK * FLASH.num_experts_per_tok
LONG_CHUNK = 10923  # 65538 copies, past 2^16: of ops that only move or map rows
STREAM_ROWS = (1 << 14) + 1  # tokens of four streams each, past 2^16
VOCAB = FLASH.vocab_size
EXPERTS = (FLASH.n_routed_experts, PRO.n_routed_experts)
HEADS = (FLASH.num_attention_heads, PRO.num_attention_heads)
SLOTS = (1 << 17) + 1  # rows of a cache: past what 17 bits address
NORM_ROWS = (1 << 16) + 1  # heads of all tokens of a step, past what 16 bits and a grid's second axis hold
WIDE_IN = (PRO.hidden_size, FLASH.o_groups * FLASH.o_lora_rank, PRO.o_groups * PRO.o_lora_rank)  # 7168, 8192, 16384
OTHER_IN = tuple(n for m in (FLASH, PRO) for n in (m.q_lora_rank, m.moe_intermediate_size))  # 1024, 2048, 1536, 3072
OTHER_OUT = (  # 64 to 8192
    *(m.q_lora_rank for m in (FLASH, PRO)),
    *(m.moe_intermediate_size for m in (FLASH, PRO)),
    *(m.hidden_size for m in (FLASH, PRO)),
    *(FLASH.head_dim, FLASH.index_n_heads, FLASH.index_n_heads * FLASH.index_head_dim),
)
NORMS = (*(m.q_lora_rank for m in (FLASH, PRO)), FLASH.head_dim, FLASH.index_head_dim)
SHARE_OF_HEADS = (1, 2, 8, 16, 32)  # of a rank among 2 to 64
SHARE_OF_EXPERTS = (1, 32, 48, 96)
SHARE_OF_VOCAB = VOCAB // 16  # 8080, no multiple of a tile
OLD = (1 << 16) + 9  # compressed rows of a sequence of 2^18 tokens, past what 16 bits address
RECENT = 8 * (FLASH.sliding_window - 1)  # window rows of eight sequences
TALL_OUT = PRO.num_attention_heads * PRO.head_dim  # 65536: 512 block rows of scales
HIDDEN = PRO.hidden_size
INTER = PRO.moe_intermediate_size
PICKS = PRO.index_topk + PRO.sliding_window  # 1152
INDEX_HEADS, INDEX_DIM = PRO.index_n_heads, PRO.index_head_dim
LONG_SUMS = ("normal", "positive", "outliers")  # what many products in one sum are tried with
ROW_CLASSES = (1, 65)  # a decode step of one token, and a chunk that is a tile and a rest: each has kernels of its own
AFFORDABLE = 65 * 8192  # rows times extent
DEAR = frozenset({"old"})  # an axis whose cases take seconds each: its own has two rows

Change = dict[str, Any]


def at(axis: str, extent: int, data: Sequence[str] = ("normal",), **others: int) -> list[Change]:
    """The changes that bring one axis to an extent; ``others``: what the tiny axes must be beside
    it.
    """
    beside = {"in" if name == "inner" else name: n for name, n in others.items()}  # Python reserves ``in``
    return [{axis: extent, **beside, "data": flavour} for flavour in data]


def _linear() -> list[Change]:
    wide = [c for k in WIDE_IN for c in at("in", k, LONG_SUMS, tokens=2, out=128)]
    others = [c for k in OTHER_IN for c in at("in", k, tokens=2, out=128)]
    outs = [c for n in (*OTHER_OUT, TALL_OUT) for c in at("out", n, tokens=2, inner=128)]
    return [*wide, *others, *outs, *at("tokens", CHUNK, out=64, inner=128)]


def _hyper(tokens: int) -> list[Change]:
    return [*at("dim", HIDDEN, LONG_SUMS, tokens=2), *at("tokens", tokens, dim=8)]


EXTENTS: Mapping[str, Sequence[Change]] = {
    "embedding": [*at("vocab", VOCAB, dim=16), *at("tokens", CHUNK, dim=16), *at("dim", HIDDEN)],
    "sample": [
        *at("vocab", VOCAB, ("normal", "ties"), tokens=3),
        *(c for n in (SHARE_OF_VOCAB, VOCAB + 3) for c in at("vocab", n, ("normal", "late", "last"), tokens=3)),
        *at("tokens", 128),
    ],
    "sample_each": [*at("vocab", VOCAB, tokens=3), *at("vocab", SHARE_OF_VOCAB, tokens=3), *at("tokens", 128)],
    "rms_norm": [
        *at("tokens", NORM_ROWS, dim=16),
        *at("dim", HIDDEN, LONG_SUMS, tokens=2),
        *(c for d in NORMS for c in at("dim", d, tokens=2)),
    ],
    "apply_rope": [
        *at("tokens", CHUNK, heads=1, dim=64, half=32),
        *(c for h in (*SHARE_OF_HEADS, *HEADS) for c in at("heads", h, tokens=2)),
        *at("dim", FLASH.head_dim, heads=1),
        *at("tokens", 1025, heads=64, dim=16, half=8),  # more heads of all tokens than 2^16
    ],
    "rms_norm_rope": [
        *at("tokens", CHUNK, heads=1, dim=64, half=32),
        *(c for h in HEADS for c in at("heads", h, tokens=2)),
        *at("dim", FLASH.head_dim, LONG_SUMS, heads=1),
    ],
    "act_quant": [*at("tokens", NORM_ROWS, dim=128), *at("dim", HIDDEN, ("normal", "outliers"), tokens=2)],
    "act_qdq": at("tokens", NORM_ROWS, dim=128),
    "hadamard": [*at("tokens", NORM_ROWS, dim=16), *at("dim", INDEX_DIM)],
    "linear": _linear(),
    "grouped_linear": [
        *(c for n in (1, 4, PRO.o_groups) for c in at("groups", n, tokens=2, out=128 * n, inner=128)),
        *at("in", PRO.num_attention_heads * PRO.head_dim // PRO.o_groups, LONG_SUMS, tokens=2),
        *at("out", PRO.o_groups * PRO.o_lora_rank, tokens=2, inner=128),
        *at("tokens", CHUNK, out=64, inner=64),
    ],
    "expert_linear": [
        *(c for e in (*SHARE_OF_EXPERTS, *EXPERTS) for c in at("experts", e, rows=3 * e, out=32, inner=128)),
        *at("rows", 303, ("buckets",), experts=14, out=32, inner=128),
        *at("rows", COPIES, out=32, inner=128),
        *at("rows", 4097, ("one_expert",), out=32, inner=128),
        *at("in", HIDDEN, LONG_SUMS, rows=5, experts=2, out=32),
        *(c for k in OTHER_IN[1::2] for c in at("in", k, rows=5, experts=2, out=32)),
        *(c for n in (HIDDEN, *OTHER_IN[1::2]) for c in at("out", n, rows=5, experts=2, inner=128)),
    ],
    "logits": [
        *(c for n in (SHARE_OF_VOCAB, VOCAB) for c in at("vocab", n, dim=32, tokens=2)),
        *at("dim", HIDDEN, LONG_SUMS, tokens=2, vocab=128),
    ],
    "gate": [
        *(c for e in EXPERTS for c in at("experts", e, ("normal", "ties", "near_ties"), topk=6)),
        *(c for e in (32, 128) for c in at("experts", e)),
        *(c for k in (1, 2, 8) for c in at("topk", k)),
        *at("dim", HIDDEN, LONG_SUMS, tokens=2),
        *at("tokens", CHUNK, dim=32),
    ],
    "gate_hash": [
        *(c for e in EXPERTS for c in at("experts", e, topk=6)),
        *(c for k in (1, 2, 8) for c in at("topk", k)),
        *at("vocab", VOCAB),
        *at("dim", HIDDEN, LONG_SUMS, tokens=2),
        *at("tokens", CHUNK, dim=32),
    ],
    "dispatch": [
        *at("tokens", CHUNK, topk=FLASH.num_experts_per_tok, dim=8),
        *at("tokens", LONG_CHUNK, topk=FLASH.num_experts_per_tok, dim=8),
        *at("tokens", CHUNK, ("one_expert",), topk=FLASH.num_experts_per_tok, dim=8),
        *(c for e in (*SHARE_OF_EXPERTS[1:], *EXPERTS) for c in at("n_experts", e, tokens=65, topk=6)),
        *at("n_experts", 1, first_expert=2),
        *at("first_expert", PRO.n_routed_experts - 32, n_experts=32, tokens=65, topk=6),  # the last of twelve ranks
        *(c for k in (2, 4, 8) for c in at("topk", k)),
        *at("n_experts", 14, ("buckets",), tokens=303, topk=2),
        *at("dim", HIDDEN),
    ],
    "swiglu": [
        *at("rows", COPIES, inter=16),
        *at("rows", LONG_CHUNK * FLASH.num_experts_per_tok, inter=16),
        *at("inter", INTER, ("normal", "clamp")),
    ],
    "combine": [
        *at("tokens", CHUNK, topk=FLASH.num_experts_per_tok, dim=8),
        *at("tokens", LONG_CHUNK, topk=FLASH.num_experts_per_tok, dim=8),
        *(c for e in (*SHARE_OF_EXPERTS, *EXPERTS) for c in at("experts", e, tokens=65, topk=6)),
        *(c for k in (1, 2, 4, 8) for c in at("topk", k)),
        *at("experts", 14, ("buckets",), tokens=303, topk=2),
        *at("dim", HIDDEN, ("normal", "cancel")),
    ],
    "compress": [
        *at("rows", CHUNK // 4, dim=8),
        *at("rows", CHUNK // 128 + 1, ratio=128, dim=8),
        *at("dim", FLASH.head_dim, ("normal", "peaked")),
    ],
    "kv_score": [*at("dim", HIDDEN, LONG_SUMS, tokens=2), *at("tokens", CHUNK, dim=64), *at("width", 1024, tokens=2)],
    "cached_compress": [*at("rows", CHUNK // 4, dim=8), *at("slots", SLOTS, dim=8), *at("dim", FLASH.head_dim)],
    "index_scores": [
        *at("rows", SLOTS, batch=1, seq=2, heads=1, dim=32),
        *(c for h in (*SHARE_OF_HEADS, INDEX_HEADS) for c in at("heads", h, batch=1)),
        *at("dim", INDEX_DIM),
        *at("seq", CHUNK, batch=1, heads=1, dim=32),
        *at("seq", 1025, batch=1, heads=INDEX_HEADS, dim=32),
        *at("batch", 3),
    ],
    "index_select": [
        *(
            c
            for k in (FLASH.index_topk, PRO.index_topk)
            for c in at("rows", SLOTS, ("normal", "near_ties"), batch=1, topk=k)
        ),
        *at("topk", PRO.index_topk, ("all_visible",), rows=PRO.index_topk),
        *at("topk", 8, ("all_visible",), rows=8),
        *at("batch", 3),
        *at("seq", CHUNK, batch=1),
    ],
    "index_topk": [
        *at("rows", SLOTS, batch=1, seq=2, heads=1, dim=32, topk=FLASH.index_topk),
        *at("topk", PRO.index_topk, ("all_visible",), rows=PRO.index_topk, batch=1, heads=1, dim=32),
        *at("topk", PRO.index_topk, ("close",), rows=2 * PRO.index_topk, batch=1, heads=1, dim=32),
        *at("seq", CHUNK, batch=1, heads=1, dim=32),
        *at("heads", INDEX_HEADS, batch=1),
        *at("batch", 3, ("normal", "close")),
    ],
    "cached_index_topk": [
        *at("rows", SLOTS, batch=1, seq=2, heads=1, dim=32, slots=SLOTS + 7, topk=FLASH.index_topk),
        *at("topk", PRO.index_topk, ("all_visible",), rows=PRO.index_topk, slots=1031, batch=1, heads=1, dim=32),
        *at("seq", CHUNK, batch=1, heads=1, dim=32),
        *at("heads", INDEX_HEADS, batch=1),
        *at("batch", 3, ("normal", "close")),
    ],
    "sparse_attn": [
        *at("picks", PICKS, ("normal", "late", "positive"), tokens=2, heads=2, rows=1200, dim=64),
        *at("picks", 321, ("few_first", "few_last", "far_below"), tokens=5, heads=2, rows=400, dim=64),
        *at("rows", SLOTS, tokens=2, dim=32),
        *(c for h in (*SHARE_OF_HEADS, *HEADS) for c in at("heads", h, tokens=2)),
        *at("dim", FLASH.head_dim, LONG_SUMS, tokens=2),
        *at("tokens", CHUNK, rows=1200, heads=1, dim=32),
        *at("tokens", 1025, rows=1200, heads=64, picks=4, dim=32),
    ],
    "cached_sparse_attn": [
        *at(
            "picks", PICKS, ("normal", "late"), tokens=2, heads=2, row_slots=1100, old=1024, recent=127, ring_slots=136
        ),
        *at("picks", 321, ("few_first", "few_last", "far_below"), tokens=5, heads=2),
        *at("row_slots", SLOTS, tokens=2),
        *at("old", OLD, row_slots=OLD + 5, tokens=2, heads=1),
        *at("recent", RECENT, ring_slots=1100, tokens=8, picks=256),
        *(c for h in (*SHARE_OF_HEADS, *HEADS) for c in at("heads", h, tokens=2)),
        *at("dim", FLASH.head_dim, tokens=2),
        *at("tokens", CHUNK, heads=1, picks=4),
    ],
    "hc_expand": _hyper(STREAM_ROWS),
    "hc_add": _hyper(STREAM_ROWS),
    "hc_split_sinkhorn": at("tokens", CHUNK, ("normal", "slow")),
    "hc_pre": _hyper(CHUNK),
    "hc_pre_norm": _hyper(CHUNK),
    "hc_post": _hyper(STREAM_ROWS),
    "hc_head": _hyper(STREAM_ROWS),
    "ffn": [*at("dim", HIDDEN, tokens=2), *at("inter", INTER, tokens=2), *at("tokens", CHUNK, dim=128)],
    "moe": [
        *at("dim", HIDDEN, tokens=2, topk=1, experts=2),
        *at("inter", INTER, tokens=2, topk=1, experts=2),
        *at("experts", EXPERTS[1], tokens=33, topk=6),
        *at("experts", 1, topk=1),
        *at("first_expert", PRO.n_routed_experts - 32, experts=32, tokens=65, topk=6),
        *(c for k in (1, 4, 6) for c in at("topk", k)),
        *at("tokens", 303, ("buckets",), topk=2, experts=14),
    ],
    "cache_write": [*at("slots", SLOTS, n=65), *at("n", CHUNK, slots=CHUNK + 3)],
    "cache_read": [*at("slots", SLOTS, n=65), *at("n", COPIES)],
    "concat": [*at("n", COPIES, dim=8), *at("dim", HIDDEN), *at("parts", 9)],
}
"""Per op the changes to its first case; sizes and scalars by name, and ``data``."""

FORMATS: Mapping[str, Sequence[str]] = {
    "linear": ("bf16", "fp8", "fp4"),
    "grouped_linear": ("bf16", "fp8"),
    "expert_linear": ("fp4", "fp8"),
    "cache_write": ("kv", "key", "plain"),
    "cache_read": ("kv", "key", "plain"),
    "act_qdq": ("kv", "key"),
    "sample": ("greedy", "warm"),
    "swiglu": ("routed", "shared"),
}
"""Ops whose first case does not stand for all: the cases that the changes are made to."""

UNEVEN = 37  # no multiple of any vector, and more than one
WIDTHS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("embedding", "rms_norm", "hc_expand", "hc_add", "hc_pre", "hc_pre_norm"), ("dim",)),
    **dict.fromkeys(("hc_post", "hc_head", "combine", "compress", "cached_compress", "concat"), ("dim",)),
    **dict.fromkeys(("gate", "gate_hash"), ("dim", "experts")),
    **dict.fromkeys(("sparse_attn",), ("dim", "heads")),
    **dict.fromkeys(
        ("index_scores", "index_topk", "cached_index_topk", "cached_sparse_attn", "apply_rope"), ("heads",)
    ),
    "sample": ("vocab",),
    "linear": ("in", "out"),
    "grouped_linear": ("in",),
    "logits": ("dim", "vocab"),
    "dispatch": ("dim", "n_experts"),
    "swiglu": ("inter",),
    "kv_score": ("dim", "width"),
    "rms_norm_rope": ("heads",),
}
"""Per op the axes that the contract leaves free, each tried at ``UNEVEN``."""


def extended(op: str, cases: Sequence[Case]) -> list[Case]:
    """The op's cases at published extents, at those with one row and with more than a tile, and at
    uneven widths, from those that are declared.
    """
    by_name = {c.name: c for c in cases}
    bases = [by_name[n] for n in FORMATS[op]] if op in FORMATS else [cases[0]]
    found = []
    for base in bases:
        prefix = [base.name] if len(bases) > 1 else []
        found += [_changed(op, base, change, prefix) for change in EXTENTS[op]]
        found += [
            _changed(op, base, {**wide, rows_of(base): n}, prefix, f"{rows_of(base)}={n}")
            for n in ROW_CLASSES
            if n <= MOST.get(op, n)
            for axis in dict.fromkeys(next(iter(c)) for c in EXTENTS[op])
            if axis not in {rows_of(base), *DEAR}
            for wide in _widest(op, axis, n)
        ]
    for axis in WIDTHS.get(op, ()):
        uneven: Change = {axis: UNEVEN}
        found.append(cases[0].but(f"at_{axis}={UNEVEN}", **uneven))
    return list({c.name: c for c in found}.values())


def _widest(op: str, axis: str, rows: int) -> list[Change]:
    """The changes to the largest extent of an axis that so many rows leave affordable, and to the
    largest of those that are no power of two.
    """
    fitting = [c for c in EXTENTS[op] if next(iter(c)) == axis and rows * c[axis] <= AFFORDABLE]
    uneven = [c for c in fitting if c[axis] & (c[axis] - 1)]
    found = [max(some, key=lambda c: c[axis]) for some in (fitting, uneven) if some]
    return list({c[axis]: c for c in found}.values())


def _changed(op: str, base: Case, change: Change, prefix: Sequence[str], suffix: str = "") -> Case:
    sizes = {k: v for k, v in change.items() if k != "data" and (k in base.sizes or k in base.scalars)}
    axis, data = next(iter(change)), change["data"]
    if op in {"act_qdq", "cache_write", "cache_read"}:
        sizes.pop("dim", None)
    words = [*prefix, f"at_{axis}={change[axis]}", *([data] if data != "normal" else []), *([suffix] if suffix else [])]
    return base.but("_".join(words), "standard", data=data, **sizes)
