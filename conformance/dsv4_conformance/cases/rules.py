"""The operands of every op, in the order of its signature."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dsv4_conformance.cases.flavours import fill
from dsv4_conformance.cases.operands import BUCKETS, FAR, FEW, SMALL, Maker, builds, quantiser_input
from dsv4_core.contract.dtypes import E2M1_VALUES, FP4_GROUP, KV_BLOCK, Host, RowLayout, numpy_dtype


@builds("embedding")
def _embedding(m: Maker) -> list[Any]:
    ids = m.ints(0, m["vocab"], m["tokens"])
    if m.data == "ids_outside":
        outside = (-1, m["vocab"], -m["vocab"] - 1, 2**31 - 1)[: len(ids)]
        ids[: len(outside)] = outside
    if m.data == "ends":
        ids = _ends(m)
    return [ids, m.weight("weight", m["vocab"], m["dim"])]


def _ends(m: Maker) -> Host:
    """Ids at both ends of the vocabulary, and where another bit begins."""
    ends = [m["vocab"] - 1, 0, m["vocab"] - 2, 1, *(n + d for n in (1 << 15, 1 << 16) for d in (-1, 0))]
    return np.resize(np.array([i for i in ends if i < m["vocab"]], np.int32), m["tokens"])


@builds("sample")
def _sample(m: Maker) -> list[Any]:
    ordinary = dict.fromkeys(("no_number", "masked", "only_one", "last"), "normal")
    flavour = {"ties": "integers", **ordinary}.get(m.data, m.data)
    logits = m.floats(m["tokens"], m["vocab"], dtype=m.wide, data=flavour, scale=3.0)
    if m.data == "no_number":  # of every two rows one cannot be chosen from
        for row, value in zip(logits[::2], itertools.cycle((np.nan, np.inf, -np.inf)), strict=False):
            row[slice(None) if value == -np.inf else int(m.rng.integers(m["vocab"]))] = value
    if m.data == "last":  # the vocabulary's last token is the likeliest by far
        logits[:, -1] = 100
    uniform = m.rng.random(m["tokens"]).astype(np.float32)
    if m.data == "edges":  # the least and the largest number that may be drawn, and their neighbours
        uniform = np.resize(np.array([0, 1 - 2.0**-24, 2.0**-24, 1 - 2.0**-23], np.float32), m["tokens"])
    if m.data == "masked":
        logits[m.rng.random(logits.shape) < 0.9] = -np.inf
        logits[:, m["vocab"] // 2] = 0
    return [logits, uniform]


@builds("sample_each")
def _sample_each(m: Maker) -> list[Any]:
    """Rows of unlike wishes: every third is greedy, and each of the others narrows in its own
    way.
    """
    logits, uniform = _sample(m)
    t, vocab, changed = m["tokens"], m["vocab"], m["changed"]

    def one_of(*values: float, dtype: Any = np.float32) -> Host:
        return m.rng.choice(np.array(values, dtype), t)

    temperature = np.where(np.arange(t) % 3 == 0, np.float32(0), one_of(0.5, 1, 2.5))
    wishes = [one_of(1, 0.9, 0.3), one_of(0, 1, 3, 40, vocab, dtype=np.int32), one_of(0, 0.02, 0.5)]
    ids = np.stack([m.rng.permutation(vocab)[:changed] for _ in range(t)]) if t else np.zeros((0, changed))
    ids[1::2, changed // 2 :] = -1  # rows name unlike many
    added = m.plain(t, changed, scale=4.0)
    added[2::4] *= 8
    allowed = None
    if m.case.dtypes.get("allowed") != "none":
        bits = m.rng.random((t, -(-vocab // 32) * 32)) < np.where(np.arange(t) % 2, 0.5, 0.02)[:, None]
        bits[:, : -(-vocab // 32) * 32 : 40] = True  # also beyond the vocabulary, where nothing may look
        bits[3::4] = True
        if m.data == "only_one":
            bits[:] = np.arange(bits.shape[1]) == m.rng.integers(vocab, size=(t, 1))
        allowed = np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32)
    if m.data == "holes":  # of a list any place may be nothing; more are kept than a sampler's registers hold
        ids = np.where(m.rng.random(ids.shape) < 0.4, -1, ids)
        ids[:, :1] = -1
        temperature = np.where(np.arange(t) % 2, np.float32(30), np.float32(0))
        added += 40
        wishes = [np.ones(t, np.float32), np.resize(np.array((65, 129, vocab - 1), np.int32), t), wishes[2] * 0]
    return [logits, uniform, temperature.astype(np.float32), *wishes, ids.astype(np.int32), added, allowed]


@builds("rms_norm")
def _rms_norm(m: Maker) -> list[Any]:
    weight = None if m.case.dtypes.get("weight") == "none" else m.plain(m["dim"], dtype="bfloat16")
    return [m.floats(m["tokens"], m["dim"]), weight]


@builds("apply_rope")
def _apply_rope(m: Maker) -> list[Any]:
    positions = m.ints(FAR - 4096, FAR, m["tokens"]) if m.data == "far" else m.ints(0, 4096, m["tokens"])
    if m.data == "everywhere":  # both ends of every power of two, and positions between them
        octave = 1 << (np.arange(m["tokens"]) // 4 % FAR.bit_length())
        place = np.stack([octave - 1, octave, octave + m.rng.integers(0, octave), 2 * octave - 2])
        token = np.arange(m["tokens"])
        positions = np.minimum(place[token % 4, token], FAR - 1).astype(np.int32)
    return [m.floats(m["tokens"], m["heads"], m["dim"]), positions, m.freqs(m["half"])]


@builds("rms_norm_rope")
def _rms_norm_rope(m: Maker) -> list[Any]:
    x, positions, freqs = _apply_rope(m)
    weight = None if m.case.dtypes.get("weight") == "none" else m.plain(m["dim"], dtype="bfloat16")
    return [x, weight, positions, freqs]


@builds("act_quant")
def _act_quant(m: Maker) -> list[Any]:
    return [quantiser_input(m, "e4m3", m.case.scalars["block"], m["dim"])]


@builds("act_qdq")
def _act_qdq(m: Maker) -> list[Any]:
    s = m.case.scalars
    return [quantiser_input(m, s["format"], s["block"], s["channels"])]


@builds("hadamard")
def _hadamard(m: Maker) -> list[Any]:
    return [m.floats(m["tokens"], m["dim"])]


def _linear_input(m: Maker, *shape: int) -> Host:
    if m.data == "one_hot":
        x = m.floats(*shape, data="normal") * 0
        step = max(1, shape[-1] // shape[0])  # from one end of a row to the other
        x[np.arange(shape[0]), ..., step * np.arange(shape[0]) % shape[-1]] = 2.0**13  # both scales' product is normal
        return x
    return m.floats(*shape)


@builds("linear")
def _linear(m: Maker) -> list[Any]:
    return [_linear_input(m, m["tokens"], m["in"]), m.weight("weight", m["out"], m["in"])]


@builds("logits")
def _logits(m: Maker) -> list[Any]:
    return [m.floats(m["tokens"], m["dim"]), m.weight("weight", m["vocab"], m["dim"])]


@builds("grouped_linear")
def _grouped_linear(m: Maker) -> list[Any]:
    return [_linear_input(m, m["tokens"], m["groups"], m["in"]), m.weight("weight", m["out"], m["in"])]


@builds("expert_linear")
def _expert_linear(m: Maker) -> list[Any]:
    rows, experts = m["rows"], m["experts"]
    last = {"nothing_here": 0, "other_ranks": rows - rows // 3}.get(m.data, rows)
    if m.data == "buckets":
        offsets = np.cumsum([0, *BUCKETS])
    elif m.data == "one_expert":
        offsets = np.where(np.arange(experts + 1) > 1, rows, 0)
    else:
        inner = np.sort(m.rng.integers(0, last + 1, experts - 1))
        offsets = np.concatenate([[0], inner, [last]])
    return [_linear_input(m, rows, m["in"]), m.experts("weight", experts, m["out"], m["in"]), offsets.astype(np.int32)]


def _gate_input(m: Maker) -> tuple[Host, Host]:
    data = "integers" if m.data == "ties" else m.data
    x = m.floats(m["tokens"], m["dim"], data=data)
    if m.data == "very_negative":  # logits of -3 to -90: positive tokens, negative experts
        level = fill("very_negative", m.rng, (m["experts"], 1)) / m["dim"]
        x = (1 + 0.1 * m.rng.standard_normal((m["tokens"], m["dim"]))).astype(x.dtype)
        return x, (level * (1 + 0.1 * m.rng.standard_normal((m["experts"], m["dim"])))).astype(numpy_dtype("bfloat16"))
    if m.data == "ties":  # experts in equal pairs, logits exact: the lower id of a pair comes first
        half = m.floats(m["experts"] // 2, m["dim"], dtype="bfloat16", data="integers", scale=1 / 8)
        return x, np.repeat(half, 2, axis=0)
    if m.data == "equal":  # padding: every expert is as good as any other
        x = 0 * x
    return x, m.plain(m["experts"], m["dim"], dtype="bfloat16", scale=m["dim"] ** -0.5)


@builds("gate")
def _gate(m: Maker) -> list[Any]:
    x, weight = _gate_input(m)
    if m.data == "ties":
        bias = np.repeat(m.plain(m["experts"] // 2, scale=0.25), 2)
    elif m.data == "equal":
        bias = np.zeros(m["experts"], np.float32)
    elif m.data == "near_ties" and m["tokens"]:  # the first token's biased scores all within a few units of each other
        logits = x[0].astype(np.float64) @ weight.astype(np.float64).T
        bias = (4.0 - np.sqrt(np.logaddexp(0, logits)) + m.rng.integers(-3, 4, logits.shape) * 2.0**-22).astype(
            np.float32
        )
    else:
        bias = m.plain(m["experts"], scale=4.0 if m.data == "strong_bias" else 0.1)
    return [x, weight, bias]


@builds("gate_hash")
def _gate_hash(m: Maker) -> list[Any]:
    x, weight = _gate_input(m)
    table = np.argsort(m.rng.random((m["vocab"], m["experts"])), axis=1)[:, : m["topk"]].astype(np.int64)
    return [x, weight, table, _ends(m) if m.data == "ends" else m.ints(0, m["vocab"], m["tokens"])]


@builds("dispatch")
def _dispatch(m: Maker) -> list[Any]:
    s = m.case.scalars
    indices = m.routes(m["tokens"], m["topk"], s["first_expert"] + s["n_experts"] + (2 if s["first_expert"] else 0))
    return [m.floats(m["tokens"], m["dim"]), m.rng.random((m["tokens"], m["topk"])).astype(m.wide), indices]


@builds("swiglu")
def _swiglu(m: Maker) -> list[Any]:
    weights = None if m.case.dtypes.get("weights") == "none" else m.rng.random(m["rows"]).astype(m.wide)
    if weights is not None and m.data == "outliers":  # of either sign
        weights[::2] *= -1
    scale = 1.0 if m.data in {"clamp", "very_negative"} else 3.0
    return [m.floats(m["rows"], m["inter"], scale=scale), m.floats(m["rows"], m["inter"], scale=scale), weights]


@builds("combine")
def _combine(m: Maker) -> list[Any]:
    topk, experts = m.case.scalars["topk"], m["experts"]
    routes = m.routes(m["tokens"], topk, experts).reshape(-1)
    local = np.minimum(routes, experts)
    order = np.argsort(local, kind="stable").astype(np.int32)
    offsets = np.searchsorted(local[order], np.arange(experts + 1)).astype(np.int32)
    rows = m.floats(m["tokens"] * topk, m["dim"])
    if m.data == "cancel":  # a token's first two copies nearly cancel
        copies = rows[np.argsort(order)].reshape(m["tokens"], topk, m["dim"])
        copies[:, 1] = -copies[:, 0]
        rows = np.ascontiguousarray(copies.reshape(rows.shape)[order])
    shared = None if m.case.dtypes.get("shared") == "none" else m.floats(m["tokens"], m["dim"])
    return [rows, order, offsets, shared]


@builds("compress")
def _compress(m: Maker) -> list[Any]:
    rows, ratio, dim = m["rows"], m["ratio"], m.case.scalars["dim"]
    overlap = 2 if ratio == 4 else 1
    width, tokens = overlap * dim, (rows + 1) * ratio
    pool = np.concatenate(
        [
            m.floats(tokens, width, dtype=m.wide, data="outliers" if m.data == "outliers" else "normal"),
            m.floats(tokens, width, dtype=m.wide),
        ],
        1,
    )
    idxs = (np.arange(rows)[:, None] + (2 if overlap == 2 else 1)) * ratio + np.arange(-overlap * ratio, 0)
    if m.data == "first_row" and rows:
        idxs[0, :ratio] = -1
    if m.data == "padding":
        idxs[::2] = -1
    if m.data == "holes":
        idxs[m.rng.random(idxs.shape) < 0.3] = -1
    if m.data in {"far_above", "far_below"}:  # further than an exponential reaches
        pool[:, width:] += 150 if m.data == "far_above" else -150
    if m.data == "late":
        pool[:, width:] += np.linspace(0, 30, tokens)[:, None].astype(pool.dtype)
    return [pool, m.plain(ratio, width), idxs.astype(np.int32)]


@builds("kv_score")
def _kv_score(m: Maker) -> list[Any]:
    weights = [m.weight(name, m["width"], m["dim"]) for name in ("wkv", "wgate")]
    return [m.floats(m["tokens"], m["dim"]), *weights]


@builds("cached_compress")
def _cached_compress(m: Maker) -> list[Any]:
    pool, ape, idxs = _compress(m)
    recent = len(pool) // 2
    slots = m.slots(m["slots"], min(recent, m["slots"]))
    recent = len(slots)
    state = m.floats(m["slots"], pool.shape[1], dtype=m.wide, data="normal")
    state[slots] = pool[:recent]
    if m.data == "absent":
        slots[m.rng.random(recent) < 0.3] = -1
        slots[:1] = -1
    return [pool[recent:], state, slots, ape, idxs]


def _index_operands(m: Maker) -> tuple[Host, Host, Host]:
    """Queries, head weights (of either sign) and keys, the latter as the graph gives them: on the
    FP4 grid.
    """
    b, s, h, d, n = m["batch"], m["seq"], m["heads"], m["dim"], m["rows"]
    if m.data == "close":
        return _close(m)
    data = "integers" if m.data == "ties" else m.data
    q, keys = m.floats(b * s * h, d, data=data), m.floats(b * n, d, data=data)
    if m.data not in {"ties", "outliers"}:
        q, keys = m.on_grid(q, "e2m1", FP4_GROUP, d), m.on_grid(keys, "e2m1", FP4_GROUP, d)
    weights = m.floats(b, s, h, dtype=m.wide, data="integers" if m.data == "ties" else "normal")
    return q.reshape(b, s, h, d), weights, keys.reshape(b, n, d)


def _close(m: Maker) -> tuple[Host, Host, Host]:
    """Scores that are whole numbers next to each other, far from zero: exact in float32 whatever
    the order, equal in bfloat16.

    A key's channels are 6 but for the first two, which spell its place; the first head alone has a
    weight.
    """
    b, s, h, d, n = m["batch"], m["seq"], m["heads"], m["dim"], m["rows"]
    place = np.stack([m.rng.permutation(n) for _ in range(b)]) % 64
    keys = np.full((b, n, d), 6.0)
    keys[..., 0], keys[..., 1] = E2M1_VALUES[place % 8], E2M1_VALUES[place // 8]
    q = np.full((b, s, h, d), 4.0)
    q[..., :2] = 0.5, 6.0
    weights = np.zeros((b, s, h))
    weights[..., 0] = 1
    return q.astype(numpy_dtype(m.act)), weights.astype(m.wide), keys.astype(numpy_dtype(m.act))


@builds("index_scores")
def _index_scores(m: Maker) -> list[Any]:
    return list(_index_operands(m))


def _visible(m: Maker) -> list[Any]:
    rows, topk, shape = m["rows"], m.case.scalars["topk"], (m["batch"], m["seq"])
    low, high = {"few_visible": (0, topk), "all_visible": (rows, rows + 1)}.get(m.data, (rows // 2, rows + 1))
    visible = m.ints(low, high, *shape)
    offset = 100 + np.arange(m["batch"])[:, None] * rows + 3 * np.arange(m["seq"])  # another for every token
    return [visible, offset.astype(np.int32)]


@builds("index_select")
def _index_select(m: Maker) -> list[Any]:
    shape = (m["batch"], m["seq"], m["rows"])
    scores = m.floats(*shape, dtype=m.wide, data="integers" if m.data == "ties" else m.data)
    if m.data == "equal":
        scores[:] = 0
    elif m.data == "near_ties":
        scores = (1 + m.rng.integers(0, 4, shape) * 2.0**-23).astype(scores.dtype)
    elif m.data == "negative":
        scores = -np.abs(scores) - 1
    return [scores, *_visible(m)]


@builds("index_topk")
def _index_topk(m: Maker) -> list[Any]:
    return [*_index_operands(m), *_visible(m)]


@builds("cached_index_topk")
def _cached_index_topk(m: Maker) -> list[Any]:
    q, weights, keys = _index_operands(m)
    layout: RowLayout = m.scalars()["layout"]
    filled = 2 * m["rows"] if m.data == "sparse" else m["slots"]
    if m.data == "sparse":
        cache = m.far_cache(m["slots"], filled, layout)
    else:
        rows = m.floats(m["slots"], m["dim"], data="integers" if m.data == "ties" else "normal")
        if m.data == "close":
            rows = np.resize(keys.reshape(-1, m["dim"]), rows.shape)
        cache = _cache_of(rows, layout)
    picks = [m.slots(filled, m["rows"]) for _ in range(m["batch"])]
    if m.data == "runs":  # blocks of neighbours in any order, the last one cut short
        run = layout.run
        blocks = [m.rng.permutation(filled // run)[: -(-m["rows"] // run)] for _ in picks]
        picks = [(b[:, None] * run + np.arange(run)).reshape(-1)[: m["rows"]] for b in blocks]
    index = (len(cache) - filled + np.concatenate(picks)).astype(np.int32)
    return [q, weights, cache, index, *_visible(m)]


def _cache_of(rows: Host, layout: RowLayout) -> Host:
    if layout.kind == "plain":
        return rows
    from dsv4_core.contract.dtypes import E8M0_VALUES, encode, pack_fp4, power_of_two_scale

    blocks = rows.astype(np.float32).reshape(len(rows), layout.dim // FP4_GROUP, FP4_GROUP)
    scale = power_of_two_scale(np.abs(blocks).max(-1), "e2m1")
    codes = encode(blocks / E8M0_VALUES[scale][..., None], "e2m1").reshape(rows.shape)
    return np.concatenate([pack_fp4(codes), scale], axis=1)


def _rising(m: Maker, tokens: int, heads: int, rows: int) -> tuple[Host, Host]:
    """Queries and keys whose scores grow with the row (``early``: fall), by some thirty from end to
    end: each tile has a new maximum.
    """
    q, kv = m.floats(tokens, heads, m["dim"], data="normal"), m.floats(rows, m["dim"], data="normal")
    q[..., 0], kv[:, 0] = m["dim"] ** 0.5, np.linspace(0, 30, rows)[:: -1 if m.data == "early" else 1]
    return q, kv


def _far_below(m: Maker, tokens: int, heads: int) -> tuple[Host, Host]:
    """Queries against keys of one sign, and sinks: every score is far below zero, beyond what an
    exponential reaches.
    """
    q = m.floats(tokens, heads, m["dim"], data="positive", scale=-150 / (m.case.scalars["softmax_scale"] * m["dim"]))
    return q, m.plain(heads) - 150


@builds("sparse_attn")
def _sparse_attn(m: Maker) -> list[Any]:
    t, h, d, rows, picks = m["tokens"], m["heads"], m["dim"], m["rows"], m["picks"]
    if m.data == "shared_rows":
        idxs = np.minimum(np.arange(t)[:, None] + np.arange(picks), rows - 1).astype(np.int32)
    elif m.data == "repeated":
        idxs = m.ints(0, max(1, picks // 3), t, picks)
    else:
        idxs = np.stack([m.slots(rows, picks) for _ in range(t)]) if t else np.zeros((0, picks), np.int32)
    idxs = m.some_missing(idxs)
    if m.data == "padding" and t:
        idxs[0] = -1  # a token with no row
    scale = 4.0 if m.data == "peaked" else 1.0
    if m.data in {"late", "early"}:
        return [*_rising(m, t, h, rows), m.plain(h), np.sort(idxs, axis=1)]
    if m.data == "far_below":
        q, sink = _far_below(m, t, h)
        return [q, m.floats(rows, d), sink, idxs]
    return [
        m.floats(t, h, d, scale=scale),
        m.floats(rows, d),
        m.plain(h) + (30 if m.data == "strong_sink" else 0),
        idxs,
    ]


@builds("cached_sparse_attn")
def _cached_sparse_attn(m: Maker) -> list[Any]:
    layout: RowLayout = m.scalars()["layout"]
    t, h, d = m["tokens"], m["heads"], m["dim"]
    windowed = m.case.dtypes.get("rows") == "none"
    old = 0 if windowed else m["old"]
    ring, ring_index = m.packed(m["ring_slots"], layout), m.ints(0, m["ring_slots"], m["recent"])
    if m["recent"]:
        ring_index[: m["recent"] // 4] = -1  # before the sequence's beginning
    kv = m.on_grid(m.floats(t, d), "e4m3", KV_BLOCK, d - m["rope_dim"])
    rows = row_index = None
    if not windowed:
        rows = m.far_cache(m["row_slots"], 2 * old, layout) if m.data == "sparse" else m.packed(m["row_slots"], layout)
        first = len(rows) - 2 * old if m.data == "sparse" or len(rows) > SMALL else 0
        row_index = m.ints(first, len(rows), old)
        row_index[-1:] = len(rows) - 1
    total = m["recent"] + t + old
    lowest = total - FEW if total > SMALL else m["recent"] // 4  # of very many rows the last ones
    idxs = (
        m.some_missing(m.ints(lowest, max(total, 1), t, m["picks"]))
        if total > m["recent"] // 4
        else np.full((t, m["picks"]), -1, np.int32)
    )
    q, sink = m.floats(t, h, d), m.plain(h) + (30 if m.data == "strong_sink" else 0)
    if m.data == "far_below":
        q, sink = _far_below(m, t, h)
    return [q, kv, ring, ring_index, rows, row_index, sink, idxs]


@builds("hc_expand")
def _hc_expand(m: Maker) -> list[Any]:
    return [m.floats(m["tokens"], m["dim"])]


@builds("hc_add")
def _hc_add(m: Maker) -> list[Any]:
    return [m.floats(m["tokens"], m["hc"], m["dim"]), m.floats(m["tokens"], m["dim"])]


def _mix_scale(m: Maker) -> tuple[Host, Host]:
    """``scale`` and ``base`` of the mixes: near one for ordinary data, far apart where Sinkhorn
    shall converge slowly.
    """
    hc = m.case.sizes.get("hc") or m.case.scalars["hc"]
    scale, base = np.abs(m.plain(3)) + 0.5, m.plain(hc * (hc + 2))
    if m.data == "slow":
        scale[2] = 2.0
        near_permutation = 8.0 * np.eye(hc)  # a dominant entry a row, two rows sharing a column
        near_permutation[1] = near_permutation[0]
        base[2 * hc :] = near_permutation.reshape(-1)
    if m.data == "turned":  # learned, and of either sign
        scale = -scale
    return scale, base


@builds("hc_split_sinkhorn")
def _hc_split_sinkhorn(m: Maker) -> list[Any]:
    hc = m.case.scalars["hc"]
    scale, base = _mix_scale(m)
    return [m.floats(m["tokens"], hc * (hc + 2), dtype=m.wide), scale, base]


def _streams(m: Maker) -> Host:
    return m.floats(m["tokens"], m["hc"], m["dim"])


def _fn(m: Maker, rows: int) -> Host:
    wide = m["hc"] * m["dim"]
    return m.plain(rows, wide, scale=wide**-0.5)


@builds("hc_pre")
def _hc_pre(m: Maker) -> list[Any]:
    hc = m["hc"]
    return [_streams(m), _fn(m, hc * (hc + 2)), *_mix_scale(m)]


@builds("hc_pre_norm")
def _hc_pre_norm(m: Maker) -> list[Any]:
    return [*_hc_pre(m), m.plain(m["dim"], dtype="bfloat16")]


@builds("hc_post")
def _hc_post(m: Maker) -> list[Any]:
    t, hc = m["tokens"], m["hc"]
    comb = m.rng.random((t, hc, hc)) ** 4
    comb = comb / comb.sum(-1, keepdims=True)
    h = _streams(m)
    if m.data == "cancel":
        h[:, 1::2] = -h[:, 0::2]
        comb[:, 1::2] = comb[:, 0::2]
    if m.data == "outliers":  # of either sign
        comb[:, ::2] *= -1
    return [m.floats(t, m["dim"]), h, (2 * m.rng.random((t, hc))).astype(m.wide), comb.astype(m.wide)]


@builds("hc_head")
def _hc_head(m: Maker) -> list[Any]:
    return [_streams(m), _fn(m, m["hc"]), np.abs(m.plain(1)) + 0.5, m.plain(m["hc"])]


@builds("ffn")
def _ffn(m: Maker) -> list[Any]:
    d, i = m["dim"], m["inter"]
    return [m.floats(m["tokens"], d), m.weight("w1", i, d), m.weight("w3", i, d), m.weight("w2", d, i)]


@builds("moe")
def _moe(m: Maker) -> list[Any]:
    t, d, i, e, k = (m[a] for a in ("tokens", "dim", "inter", "experts", "topk"))
    shared = None if m.case.dtypes.get("shared") == "none" else m.floats(t, d)
    indices = m.routes(t, k, e + m.case.scalars["first_expert"])
    weights = [m.experts("w1", e, i, d), m.experts("w3", e, i, d), m.experts("w2", e, d, i)]
    return [m.floats(t, d), m.rng.random((t, k)).astype(m.wide), indices, shared, *weights]


RUNS = ("run", "run_with_holes")


def _run(m: Maker) -> Host:
    """Neighbouring slots in their order, across the ends of pages; or with some missing among
    them.
    """
    index = np.arange(3, 3 + m["n"], dtype=np.int32)
    if m.data == "run_with_holes":
        index[m["n"] // 3 :: 5] = -1
    return index


@builds("cache_write")
def _cache_write(m: Maker) -> list[Any]:
    layout: RowLayout = m.scalars()["layout"]
    rows = m.floats(
        m["n"],
        layout.dim,
        dtype=m.wide if m.case.dtypes.get("cache") == "wide" else "",
        data="outliers" if m.data == "off_grid" else "",
    )
    if layout.kind != "plain" and m.data != "off_grid":
        fmt, block = ("e4m3", KV_BLOCK) if layout.kind == "kv" else ("e2m1", FP4_GROUP)
        rows = m.on_grid(rows, fmt, block, layout.dim - layout.rope_dim)  # type: ignore[arg-type]
    if m.data == "sparse":  # a cache of more than 2^31 bytes, its last rows written
        cache = m.far_cache(m["slots"], m["n"], layout)
        return [cache, rows, np.arange(len(cache) - m["n"], len(cache), dtype=np.int32)]
    index = _run(m) if m.data in RUNS else m.slots(m["slots"], m["n"])
    return [m.packed(m["slots"], layout), rows, m.some_missing(index)]


@builds("cache_read")
def _cache_read(m: Maker) -> list[Any]:
    layout: RowLayout = m.scalars()["layout"]
    if m.data == "sparse":
        cache = m.far_cache(m["slots"], m["n"], layout)
        return [cache, np.arange(len(cache) - m["n"], len(cache), dtype=np.int32)]
    many = m["slots"] > SMALL and m["n"] <= m["slots"]
    index = m.slots(m["slots"], m["n"]) if many else m.ints(0, m["slots"], m["n"])
    if m.data == "every_code":
        index = np.arange(m["n"], dtype=np.int32)
    if m.data in RUNS:
        index = _run(m)
    return [m.packed(m["slots"], layout), m.some_missing(index)]


@builds("concat")
def _concat(m: Maker) -> list[Any]:
    def part(i: int) -> Host:
        size = [m["n"], m["dim"]]
        axis = m.case.scalars["axis"]
        size[axis] = 0 if m.data == "an_empty_part" and i == 1 else size[axis] + i
        return m.ints(-1, 1000, *size) if m.data == "int32" else m.floats(*size)

    return [[part(i) for i in range(m["parts"])]]
