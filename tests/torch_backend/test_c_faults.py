"""Faults planted in the C kernels, one at a time: the conformance suite must notice each in the op
that it is in.
"""

import os
import shutil
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend, compiled, kept  # noqa: E402
from dsv4_conformance import check as checks  # noqa: E402
from dsv4_conformance.run import runner  # noqa: E402


class Fault(NamedTuple):
    """``found`` stands once in ``source`` and becomes ``planted``; ``op``: where the suite must
    fail, at ``tier``; ``level``: the kind of CPU that it is compiled for (this one where it says
    nothing).
    """

    source: str
    found: str
    planted: str
    op: str
    tier: str = "smoke"
    level: str = ""


class NoticedError(Exception):
    """A check that counts has failed."""


def stop_at_a_failure(finding, *_):
    """One is enough."""
    if finding.status == "failed" and finding.claimed:
        raise NoticedError(finding.id)


FAULTS = {
    "odd channels of BF16 weights meet even ones of x": Fault("weights.c", "load(at + odd)", "load(at)", "linear", level="avx2"),
    "a row of FP8 weights uses its first block's scale": Fault(
        "halves.h", "scale_value(scale[begin / E4M3_BLOCK])", "scale_value(scale[0])", "linear", "standard", "avx2",
    ),
    "the scale of a row of FP8 blocks is taken a row of blocks early": Fault(
        "weights.c", "w->scale + i / E4M3_BLOCK *", "w->scale + (i - 1) / E4M3_BLOCK *", "linear", "standard",
    ),
    "two groups of FP4 share two scales the wrong way": Fault(
        "halves.h", "part[v][0] * one + part[v][1] * other", "part[v][1] * one + part[v][0] * other", "linear", level="avx2",
    ),
    "four words of FP4 share two scales the wrong way": Fault(
        "codes.h", "shift[lane] = lane / 4 * 8", "shift[lane] = (LANES - 1 - lane) / 4 * 8", "linear", level="avx512",
    ),
    "channels of BF16 pairs stand 32 too early": Fault("pairs.h", "w + j + 32 * k", "w + j + 32 * (k / 2)", "linear", level="avx512bf16"),
    "all vectors of a pass are the first": Fault(
        "pairs.h", "part[v][k], pairs, of(x[v])", "part[v][k], pairs, of(x[0])", "linear", level="avx512bf16",
    ),
    "a tile's second rows are its first": Fault("amx.c", "rows + 2 * k + TALL * stride", "rows + 2 * k", "linear", "standard", "amx"),
    "more vectors than a tile has are the first ones": Fault(
        "amx.c", "vectors > TALL ? laid + laid_bytes(cols) : NULL", "vectors > TALL ? laid : NULL", "linear", "standard", "amx",
    ),
    "a vector's channels meet those of its neighbour": Fault(
        "amx.c", "turn(square, TALL, to, TALL);", "memcpy(to, square, sizeof square);", "linear", "standard", "amx",
    ),
    "a panel of BF16 rows begins with the weight": Fault("panel.c", "w->data + first * p->stride;", "w->data;", "linear", "standard", "amx"),
    "products of a shape share the first one's vectors": Fault("gemv.c", "own->x == last->x && ", "", "grouped_linear", "standard", "amx"),
    "an expert's sets of vectors are those of the first": Fault("moe.c", "(s->of.sets[e] + (n - ", "((n - ", "moe", "standard", "amx"),
    "a set begins where its expert does": Fault("moe.c", "s->begins[e] + (set - s->sets[e]) * TALL", "s->begins[e]", "moe", "standard", "amx"),
    "pairs of FP8 use their first block's scale": Fault(
        "pairs.h", "scale_value(scale[j / E4M3_BLOCK])", "scale_value(scale[0])", "linear", "standard", "avx512bf16",
    ),
    "pairs of FP8 lose their signs": Fault("pairs.h", "_mm512_and_si512(code, sign)", "_mm512_and_si512(low, sign)", "linear", level="avx512bf16"),
    "channels of FP4 stand in each other's place": Fault(
        "pairs.h", "j % 4 * 32 + j % 128 / 4", "(j ^ 1) % 4 * 32 + j % 128 / 4", "linear", level="avx512bf16",
    ),
    "two groups of FP4 have each other's scale": Fault(
        "pairs.h", "(0, 0, 0, 0, 1, 1, 1, 1, 2,", "(1, 1, 1, 1, 0, 0, 0, 0, 2,", "linear", level="avx512bf16",
    ),
    "FP4 knows no six": Fault(
        "pairs.h", "bfloat16(e2m1((uint8_t)code))", "bfloat16(e2m1((uint8_t)(code % 8 == 7 ? code - 1 : code)))", "linear", level="avx512bf16",
    ),
    "a panel's last rows are the ones before": Fault("gemv.c", "p->first + row, rows", "p->first + (row ? row - 1 : 0), rows", "linear", "standard"),
    "a panel of FP8 uses its first block's scale": Fault(
        "panel.c", "blocks + begin / E4M3_BLOCK", "blocks + 0 * begin", "linear", "standard", "avx512",
    ),
    "a panel of FP4 has its first group's scale": Fault(
        "panel.c", "(k + i) * each / E2M1_GROUP", "0 * (k + i)", "linear", "standard", "avx512",
    ),
    "a panel of BF16 has neighbours in each other's place": Fault(
        "panel.c", "k ? word & 0xffff0000u : word << 16", "k ? word << 16 : word & 0xffff0000u", "linear", "standard", "avx512",
    ),
    "a panel of BF16 pairs uses its first block's scale": Fault(
        "panel.c", "/ E4M3_BLOCK) + begin / E4M3_BLOCK];", "/ E4M3_BLOCK) + 0 * begin];", "linear", "standard", "avx512bf16",
    ),
    "a panel of FP4 has one scale a row": Fault(
        "panel.c", "(scales[j / E2M1_GROUP] - 127)", "(scales[0 * j] - 127)", "moe", "standard", "avx512bf16",
    ),
    "the last of a panel's vectors is left out": Fault(
        "panel.c", "default: call(IN_REGISTERS)", "default: call(IN_REGISTERS - 1)", "linear", "standard", "avx512bf16",
    ),
    "of many rows the shared expert is left out": Fault(
        "moe.c", "l->shared ? get(l->shared, l->act_type, r * l->dim + row + i) : 0", "0 * (l->shared != 0)", "moe", "standard",
    ),
    "of many rows another pair's share is taken": Fault(
        "moe.c", "l->share[s->of.order[n + v]]", "l->share[s->of.order[n]]", "moe", "standard",
    ),
    "of few rows an expert takes its first one for all": Fault("moe.c", "x + own[n] / l.topk", "x + own[0] / l.topk", "moe"),
    "many tokens attend to each other's rows": Fault(
        "attention.c", "memset(own->times, 0", "if (token == first) memset(own->times, 0", "sparse_attn", "standard",
    ),
    "a row that is listed twice counts once": Fault("attention.c", "* s->picks + j]]]++", "* s->picks + j]]] = 1", "sparse_attn", "standard"),
    "up is not clamped from below": Fault("moe.c", "up < -limit ? -limit : up", "up", "moe"),
    "the activation is not quantised for w2": Fault("moe.c", "coded && !quantise(", "0 && !quantise(", "ffn"),
    "the shared expert is left out": Fault("moe.c", "l.shared ? get(l.shared, l.act_type, r * dim + i) : 0", "0 * (l.shared != 0)", "moe"),
    "of equal experts the higher one is taken": Fault("gate.c", "scores[e] + r->bias[e] > scores[best]", "scores[e] + r->bias[e] >= scores[best]", "gate"),
    "shares are of biased scores": Fault(
        "gate.c", "shares[j] = own[indices[j]]", "shares[j] = own[indices[j]] + (r.bias ? r.bias[indices[j]] : 0)", "gate",
    ),
    "Sinkhorn stops an iteration early": Fault("mhc.c", "half < 2 * iters", "half < 2 * iters - 2", "hc_pre"),
    "comb is used as it stands": Fault(
        "mhc.c", "a0 = comb[n], a1 = comb[HC + n], a2 = comb[2 * HC + n], a3 = comb[3 * HC + n]",
        "a0 = comb[4 * n], a1 = comb[4 * n + 1], a2 = comb[4 * n + 2], a3 = comb[4 * n + 3]", "hc_post",
    ),
    "eps is added to the root": Fault("norm.c", "1 / sqrt((double)square / dim + a[7].d)", "1 / (sqrt((double)square / dim) + a[7].d)", "rms_norm"),
    "the inverse rotation turns forwards": Fault("rope.c", "a[8].i ? -1 : 1", "1", "apply_rope"),
    "a scale's exponent is not raised where mantissa bits are set": Fault("formats.h", " + 0x7fffff) >> 23", ") >> 23", "act_qdq"),
    "ties are rounded away from zero": Fault("formats.h", "(y + shift) - shift", "(y * 1.0000005f + shift) - shift", "act_qdq", "standard"),
    "zero loses its sign": Fault("formats.h", "& 0x7fffffff) | sign)", "& 0x7fffffff) | (sign & (words)((y + shift) - shift != 0)))", "cache_write"),
    "an absent row is stored in the first slot": Fault("cache.c", "if (index[i] < 0) continue;", "if (index[i] < 0) to = a[0].p;", "cache_write"),
    "an absent row is not cleared": Fault("rows.h", "put(to, type, at + j, 0)", "put(to, type, at + j, 1)", "cache_read"),
    "a rank's experts are counted from the first of all": Fault("moe.c", "a[10].i, a[11].i, a[12].i", "a[10].i, 0, a[12].i", "moe"),
    "an angle is rounded no more": Fault(
        "rope.c",
        "(float)positions[k / half] * freqs[k % half]",
        "(double)positions[k / half] * freqs[k % half]",
        "apply_rope",
    ),
    "Hadamard is not orthonormal": Fault("quant.c", "(float)(1 / sqrt((double)dim))", "1.0f / dim", "hadamard"),
    "the head's streams are weighted without eps": Fault("mhc.c", "sigmoid(weights[i]) + a[9].d", "sigmoid(weights[i])", "hc_head", "standard"),
    "an id outside the vocabulary reads its first row": Fault(
        "embed.c",
        "outside ? 0 : get(a[1].p, a[2].i, ids[k] * dim + j)",
        "get(a[1].p, a[2].i, (outside ? 0 : ids[k]) * dim + j)",
        "embedding",
    ),
    "padding attends to row 0": Fault(
        "attention.c",
        "if (s->idxs[k * s->picks + j] >= 0) listed[count++] = s->idxs[k * s->picks + j];",
        "listed[count++] = s->idxs[k * s->picks + j] < 0 ? 0 : s->idxs[k * s->picks + j];",
        "sparse_attn",
    ),
    "the sink is left out": Fault("attention.c", "total(parts) + (float)exp((double)sink - top)", "total(parts)", "cached_sparse_attn"),
    "exp without the maximum": Fault("attention.c", "exponential(load(scores + r) - top)", "exponential(load(scores + r))", "sparse_attn"),
    "the last tile's padding has weight": Fault("attention.c", "scores[r] = -INFINITY;", "scores[r] = 0;", "sparse_attn"),
    "a window's halves of channels are swapped": Fault("attention.c", "j >= ratio ? dim : 0", "j < ratio ? dim : 0", "compress"),
    "ape begins anew with each token": Fault("attention.c", "ape + j % ratio * width", "ape + j / ratio * width", "compress"),
    "the state's rows are in the order of slots": Fault("attention.c", "i < recent ? index[i] : 0", "i < recent ? i : 0", "cached_compress"),
    "a state row that is absent is the first slot": Fault(
        "attention.c", "i < recent ? index[i] : 0", "i < recent && index[i] >= 0 ? index[i] : 0", "cached_compress",
    ),
    "a window of rows before and rows of this step has no ape": Fault(
        "attention.c", "floats score = load(ape + j % ratio * width + at);", "floats score = all(0);", "cached_compress",
    ),
    "odd channels of FP4 rows are the even ones": Fault("rows.h", "pair | pair << 28", "pair | pair << 32", "cache_read"),
    "relu is forgotten": Fault("index.c", "(words)hit & ~(words)(hit < 0)", "(words)hit", "cached_index_topk"),
    "of equal scores the higher row is taken": Fault(
        "index.c",
        "for (int64_t r = 0; r < seen && count < wanted; r++)",
        "for (int64_t r = seen - 1; r >= 0 && count < wanted; r--)",
        "cached_index_topk",
        "standard",
    ),
    "rows that are not visible yet are picked": Fault("index.c", "x.visible[token] < x.rows ? x.visible[token] : x.rows", "x.rows", "cached_index_topk"),
}  # fmt: skip


@pytest.mark.proof  # a compilation each
@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_notices(name, tmp_path, monkeypatch):
    fault = FAULTS[name]
    if fault.level and not (fault.level in kept.LEVELS and kept.LEVELS[fault.level][1] <= kept.cpu_flags()):
        pytest.skip(f"this CPU runs no {fault.level}")
    source = shutil.copytree(kept.SOURCES, tmp_path / "c") / fault.source
    text = source.read_text()
    assert text.count(fault.found) == 1
    source.write_text(text.replace(fault.found, fault.planted))
    monkeypatch.setattr(kept, "SOURCES", tmp_path / "c")
    monkeypatch.setattr(
        kept, "FLAGS", ("-O1", *(flag for flag in kept.FLAGS if flag != "-O3"))
    )  # built in a third of the time
    made = tmp_path / "faulty.so"
    flags = kept.LEVELS[fault.level][0] if fault.level else ("-march=native",)
    try:
        kept.compile_kernels([os.environ.get("CC", "cc"), *flags], made)
    except kept.NotCompiledError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(str(error))
    backend = TorchBackend()
    backend.compiled = compiled.Kernels(made, "faulty")
    with pytest.raises(NoticedError):
        runner.run(checks.Session(backend, fault.tier), ops=[fault.op], progress=stop_at_a_failure)
