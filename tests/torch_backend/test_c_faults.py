"""Faults planted in the C kernels, one at a time: the conformance suite must notice each in the op that it is in."""

import os
import shutil
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend, compiled  # noqa: E402
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
    "up is not clamped from below": Fault("experts.c", "up < -limit ? -limit : up", "up", "moe"),
    "the activation is not quantised for w2": Fault("experts.c", "quantise ? rounded(", "0 ? rounded(", "ffn"),
    "the shared expert is left out": Fault("experts.c", "shared ? get(shared, act_type, i) : 0", "0 * (shared != 0)", "moe"),
    "of equal experts the higher one is taken": Fault("gate.c", "scores[e] + bias[e] > scores[best]", "scores[e] + bias[e] >= scores[best]", "gate"),
    "shares are of biased scores": Fault(
        "gate.c", "shares[k] = scores[indices[k]]", "shares[k] = scores[indices[k]] + (bias ? bias[indices[k]] : 0)", "gate",
    ),
    "Sinkhorn stops an iteration early": Fault("mhc.c", "half < 2 * iters", "half < 2 * iters - 2", "hc_pre"),
    "comb is used as it stands": Fault(
        "mhc.c", "a = comb[n], b = comb[HC + n], c = comb[2 * HC + n], d = comb[3 * HC + n]",
        "a = comb[4 * n], b = comb[4 * n + 1], c = comb[4 * n + 2], d = comb[4 * n + 3]", "hc_post",
    ),
    "eps is added to the root": Fault("norm.c", "1 / sqrt((double)square / dim + eps)", "1 / (sqrt((double)square / dim) + eps)", "rms_norm"),
    "the inverse rotation turns forwards": Fault("rope.c", "inverse ? -1 : 1", "1", "apply_rope"),
    "a scale's exponent is not raised where mantissa bits are set": Fault("formats.h", " + 0x7fffff) >> 23", ") >> 23", "act_qdq"),
    "ties are rounded away from zero": Fault("formats.h", "(y + shift) - shift", "(y + copysignf(0x1p-20f, y) + shift) - shift", "act_qdq", "standard"),
    "zero loses its sign": Fault("formats.h", "return copysignf((y + shift) - shift, y);", "return (y + shift) - shift;", "cache_write"),
    "an absent row is stored in the first slot": Fault("cache.c", "if (index[i] < 0) continue;", "if (index[i] < 0) to = cache;", "cache_write"),
    "an absent row is not cleared": Fault("cache.c", "put(rows, row_type, at + j, 0)", "put(rows, row_type, at + j, 1)", "cache_read"),
}  # fmt: skip


@pytest.mark.proof  # a compilation each
@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_notices(name, tmp_path):
    fault = FAULTS[name]
    source = shutil.copytree(compiled.SOURCES, tmp_path / "c") / fault.source
    text = source.read_text()
    assert text.count(fault.found) == 1
    source.write_text(text.replace(fault.found, fault.planted))
    made = tmp_path / "faulty.so"
    try:
        compiled.run(
            [
                os.environ.get("CC", "cc"),
                *compiled.FLAGS,
                *map(str, (tmp_path / "c").glob("*.c")),
                "-lm",
                "-o",
                str(made),
            ]
        )
    except compiled.NotCompiledError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(str(error))
    backend = TorchBackend()
    backend.compiled = compiled.Kernels(made, "faulty")
    ran = runner.run(checks.Session(backend, fault.tier), ops=[fault.op])
    assert [finding.id for finding in ran.findings if finding.status == "failed" and finding.claimed]
