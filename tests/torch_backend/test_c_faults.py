"""Faults planted in the C kernels, one at a time: the conformance suite must notice each in the op that it is in."""

import os
import shutil
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend, compiled, kept  # noqa: E402
from dsv4_conformance import check as checks  # noqa: E402
from dsv4_conformance.run import runner  # noqa: E402


class Fault(NamedTuple):
    """``found`` stands once in ``source`` and becomes ``planted``; ``op``: where the suite must fail, at ``tier``."""

    source: str
    found: str
    planted: str
    op: str
    tier: str = "smoke"


FAULTS = {
    "odd channels of BF16 weights meet even ones of x": Fault("weights.h", "load(odd + j / 2);", "load(x + j / 2);", "linear"),
    "a row of FP8 weights uses its first block's scale": Fault(
        "weights.h", "scale_value(scale[begin / E4M3_BLOCK])", "scale_value(scale[0])", "linear", "standard",
    ),
    "the scale of a row of FP8 blocks is taken a row of blocks early": Fault(
        "weights.h", "w->scale + i / E4M3_BLOCK *", "w->scale + (i - 1) / E4M3_BLOCK *", "linear",
    ),
    "four words of FP4 share two scales the wrong way": Fault(
        "weights.h", "shift[lane] = lane / 4 * 8", "shift[lane] = (LANES - 1 - lane) / 4 * 8", "linear",
    ),
    "up is not clamped from below": Fault("moe.c", "up < -limit ? -limit : up", "up", "moe"),
    "the activation is not quantised for w2": Fault("moe.c", "quantise ? rounded(", "0 ? rounded(", "ffn"),
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
    "ties are rounded away from zero": Fault("formats.h", "(y + shift) - shift", "(y + copysignf(0x1p-20f, y) + shift) - shift", "act_qdq", "standard"),
    "zero loses its sign": Fault("formats.h", "return copysignf((y + shift) - shift, y);", "return (y + shift) - shift;", "cache_write"),
    "an absent row is stored in the first slot": Fault("cache.c", "if (index[i] < 0) continue;", "if (index[i] < 0) to = a[0].p;", "cache_write"),
    "an absent row is not cleared": Fault("rows.h", "put(to, type, at + j, 0)", "put(to, type, at + j, 1)", "cache_read"),
    "experts of another rank are taken for its own": Fault(
        "moe.c",
        "l.chosen[p] - l.first;\n        if (e < 0 || e >= l.experts) continue;\n        int seen",
        "l.chosen[p];\n        if (e < 0 || e >= l.experts) continue;\n        int seen",
        "moe",
    ),
    "an angle is rounded no more": Fault(
        "rope.c",
        "(float)positions[k / half] * freqs[k % half]",
        "(double)positions[k / half] * freqs[k % half]",
        "apply_rope",
    ),
    "Hadamard is not orthonormal": Fault("quant.c", "(float)(1 / sqrt((double)dim))", "1.0f / dim", "hadamard"),
    "the head's streams are weighted without eps": Fault("mhc.c", "sigmoid(mixed[i]) + a[9].d", "sigmoid(mixed[i])", "hc_head", "standard"),
    "an id outside the vocabulary reads its first row": Fault(
        "embed.c",
        "outside ? 0 : get(a[1].p, a[2].i, ids[k] * dim + j)",
        "get(a[1].p, a[2].i, (outside ? 0 : ids[k]) * dim + j)",
        "embedding",
    ),
    "padding attends to row 0": Fault(
        "attention.c",
        "if (idxs[j] < 0) continue;\n            if (t->own == 0) listed[count] = idxs[j];",
        "if (t->own == 0) listed[count] = idxs[j] < 0 ? 0 : idxs[j];",
        "sparse_attn",
    ),
    "the sink is left out": Fault("attention.c", "total(parts) + (float)exp((double)sink - top)", "total(parts)", "cached_sparse_attn"),
    "exp without the maximum": Fault("attention.c", "exponential(load(scores + r) - top)", "exponential(load(scores + r))", "sparse_attn"),
    "the last tile's padding has weight": Fault("attention.c", "scores[r] = -INFINITY;", "scores[r] = 0;", "sparse_attn"),
    "a window's halves of channels are swapped": Fault("attention.c", "j >= ratio ? dim : 0", "j < ratio ? dim : 0", "compress"),
    "ape begins anew with each token": Fault("attention.c", "ape + j % ratio * width", "ape + j / ratio * width", "compress"),
    "relu is forgotten": Fault("index.c", "(tile_words)hits[g] & ~(tile_words)(hits[g] < 0)", "(tile_words)hits[g]", "cached_index_topk"),
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
def test_the_suite_notices(name, tmp_path):
    fault = FAULTS[name]
    source = shutil.copytree(kept.SOURCES, tmp_path / "c") / fault.source
    text = source.read_text()
    assert text.count(fault.found) == 1
    source.write_text(text.replace(fault.found, fault.planted))
    made = tmp_path / "faulty.so"
    try:
        kept.run(
            [
                os.environ.get("CC", "cc"),
                *kept.FLAGS,
                *map(str, (tmp_path / "c").glob("*.c")),
                "-lm",
                "-o",
                str(made),
            ]
        )
    except kept.NotCompiledError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(str(error))
    backend = TorchBackend()
    backend.compiled = compiled.Kernels(made, "faulty")
    ran = runner.run(checks.Session(backend, fault.tier), ops=[fault.op])
    assert [finding.id for finding in ran.findings if finding.status == "failed" and finding.claimed]
