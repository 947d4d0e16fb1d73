"""Triton's JIT on the values that the backend really passes, without a GPU: each run is
``jit_path.py`` in a process of its own.

DSV4_OLDEST_TRITON names a folder with the oldest supported Triton (``pip install --no-deps --target
DIR triton==3.4.0``); without it only the installed one is tried.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dsv4_backend_cuda import launch
from faults import Fault
from plant import planted

SCRIPT = Path(__file__).with_name("jit_path.py")
DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
OLDEST = os.environ.get("DSV4_OLDEST_TRITON")
TRITONS = ["", pytest.param(OLDEST, marks=pytest.mark.skipif(not OLDEST, reason="DSV4_OLDEST_TRITON is not set"))]
AS_A_CONTEXT_GROWS = 8
"""Specialisations of one kernel that differ in nothing but lengths: a conversation may not meet
more. Today's most is dense_matmul's eight: weights alone, in pairs, five at once and by groups,
each for few tokens and for many, and a head whose outputs are no multiple of 16.
"""
LAUNCHES = [20, 23, 29]
"""Of a layer of Flash with ratio 0, 128 and 4, for one token after 8191, as in docs/kernels.md."""


def run(*args: str, first_on_path: str = "") -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [p for p in (first_on_path, str(SCRIPT.parent), *sys.path) if p]
    environment |= {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, SCRIPT, *args], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def documented() -> list[dict[str, int]]:
    """Launches by kernel that docs/kernels.md gives for the window alone, ratio 128 and ratio 4."""
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| (\d) \| (\d) \| (\d) \| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    by: list[dict[str, int]] = [{}, {}, {}]
    for kernel, *counts in rows:
        for found, count in zip(by, map(int, counts), strict=True):
            found[f"{kernel}_kernel"] = found.get(f"{kernel}_kernel", 0) + count
    return [{kernel: count for kernel, count in found.items() if count} for found in by]


@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("what", ["cases", "conversation"])
def test_the_jit_takes_every_launch(what, triton):
    found = run(what, "--depth", "parse", first_on_path=triton)
    assert found["failures"] == {}
    assert found["launches"] > 500
    assert len(found["specialisations"]) > 20
    if what == "conversation":
        most = max(found["specialisations"].items(), key=lambda item: item[1])
        assert most[1] <= AS_A_CONTEXT_GROWS, most


def test_full_size_layers_take_no_torch_but_for_joining():
    """Flash and Pro at batch 1, 8, 64, a prefill of 4096 and a million tokens of context."""
    found = run("layers", "--depth", "parse")
    assert found["failures"] == {}
    for name, layer in found["ran"].items():
        assert layer["copies"] == 0, name
        assert set(layer["torch"]) <= {"cat"}, (name, layer["torch"])
    launches = {name: layer["triton"] + sum(layer["torch"].values()) for name, layer in found["ran"].items()}
    assert [launches[f"flash {ratio} 1x1@8191"] for ratio in (0, 128, 4)] == LAUNCHES
    assert [found["ran"][f"flash {ratio} 1x1@8191"]["kernels"] for ratio in (0, 128, 4)] == documented()
    # dense_matmul has eleven: groups of Flash and Pro, one, two and five weights, split and whole
    assert max(found["specialisations"].values()) <= 11, found["specialisations"]


def test_a_replayed_step_launches_nothing_and_copies_one_buffer():
    """The step is captured without a value read on the host (the meta device has none) and without
    a copy from it.
    """
    found = run("capture", "--depth", "count")["ran"]
    eager, captured = found["eager"], found["captured"]
    assert eager["triton"] > 60
    assert captured["triton"] == 3 * eager["triton"]  # two to warm up, and the capture
    assert captured["torch"].pop("copy_") == 1  # the step's addresses, to where the graph reads them
    assert set(captured["torch"]) == set(eager["torch"])
    assert captured["copies"] == 0
    for name in ("replayed", "replayed where a window closes"):
        assert found[name] == {"triton": 0, "torch": {"copy_": 1}, "copies": 0, "allocations": 0}


def test_what_the_jit_refuses_is_found(tmp_path):
    """A batch of one makes a specialised bound a Python number: a step of one token would not
    compile.
    """
    mhc = Fault("", "mhc", "tl.cast(tokens, tl.int64)", "tokens.to(tl.int64)", "hc_pre")
    kernel = planted(mhc, tmp_path) / "dsv4_backend_cuda" / "kernels" / "mhc.py"
    kernel.write_text(kernel.read_text().replace('do_not_specialize=["tokens", "pieces", "iters"]', ""))
    found = run("cases", "--depth", "parse", first_on_path=str(tmp_path))
    assert any("'int' object has no attribute 'to'" in why for why in found["failures"].values()), found["failures"]


def test_a_length_as_a_constant_is_found(tmp_path):
    """What a conversation would have recompiled for every closed window."""
    topk = Fault(
        "",
        "index",
        "picks, rows, topk, length, WHOLE: ",
        "picks, rows, topk: tl.constexpr, length, WHOLE: ",
        "index_select",
    )
    kernel = planted(topk, tmp_path) / "dsv4_backend_cuda" / "kernels" / "index.py"
    kernel.write_text(kernel.read_text().replace('["rows", "topk", "length"]', '["rows", "length"]'))
    found = run("conversation", "--depth", "count", first_on_path=str(tmp_path))
    assert found["specialisations"]["index_select_kernel"] > AS_A_CONTEXT_GROWS


@pytest.mark.proof
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
@pytest.mark.parametrize("what", ["cases", "conversation", "layers"])
def test_every_specialisation_compiles(what, arch, triton):
    found = run(what, "--depth", "compile", "--arch", str(arch), first_on_path=triton)
    assert found["failures"] == {}
