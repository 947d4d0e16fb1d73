"""Offline compilation, its gates, and the launch table. Compiling takes a process of its own: here
kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from dsv4_backend_cuda import build, launch, roofline, sass
from dsv4_backend_cuda.launch import Work
from dsv4_backend_torch import interpret


def compiled(code: str, tmp_path) -> list[str]:
    """Run code in a process that compiles; give the lines it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_a_kernel_compiles_and_its_gates_hold_and_bite(tmp_path):
    code = """
import json
from dataclasses import replace
from dsv4_backend_cuda import build
spec = next(s for s in build.specs() if s.name == "linear_decode" and 90 in s.architectures)
right = build.build_one(spec, "flash", 90)
again = build.build_one(spec, "flash", 90)
wrong = build.build_one(replace(spec, mma={90: "UTCQMMA"}), "flash", 90)
print(json.dumps([right.mma, right.failures, right.registers, again == right, wrong.failures, right.spills, right.loop_instructions]))
"""
    mma, failures, registers, same, wrong, spills, loop = json.loads(compiled(code, tmp_path)[-1])
    assert all(m.startswith("QGMMA") for m in mma)
    assert failures == []
    assert 32 <= registers <= 255
    assert same
    assert wrong == ["tensor cores: expected UTCQMMA, found QGMMA"]
    known = json.loads(build.baseline().read_text())["linear_decode/flash/sm_90"]
    assert {"spills": spills, "loop_instructions": loop} == known


def test_limits_that_the_compiler_does_not_check_are_gates(tmp_path):
    code = """
import json
from dsv4_backend_cuda import build, launch
row = dict(launch.table()["bf16_linear_prefill", 89], config={"BLOCK_N": 128, "BLOCK_T": 128, "WORDS": 0, "num_warps": 8, "num_stages": 4})
launch.table()["bf16_linear_prefill", 89] = row
spec = next(s for s in build.specs() if s.name == "bf16_linear_prefill")
print(json.dumps(build.build_one(spec, "flash", 89).failures))
"""
    failures = json.loads(compiled(code, tmp_path)[-1])
    assert any(f.startswith("shared memory: ") and f.endswith(f"of {99 << 10}") for f in failures), failures


def test_the_interpreters_process_refuses_to_compile():
    with pytest.raises(interpret.InterpreterError, match="unset TRITON_INTERPRET"):
        next(build.specs())


def test_a_worse_hot_loop_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "BASELINES", tmp_path)
    good = build.Result("k", "v", 90, spills=2, loop_instructions=100)
    build.write_baseline([good])
    assert not build.against_baseline([good])[0].failures
    more = build.Result("k", "v", 90, spills=3, loop_instructions=101)
    assert build.against_baseline([more])[0].failures == [
        "spills: 3, baseline 2",
        "loop_instructions: 101, baseline 100",
    ]
    assert "no baseline for k/v/sm_80" in build.against_baseline([build.Result("k", "v", 80)])[0].failures[0]


def test_the_hot_loop_is_the_one_with_tensor_core_work():
    opcodes = ["LDG.E", "FADD", "BRA", "LDG.E.128", "HGMMA.64x16x16.F32", "STL", "BRA", "EXIT"]
    operands = ["", "", " `(.L_x_0)", "", "", "", " `(.L_x_1)", ""]
    instructions = [sass.Instruction(16 * i, o, a) for i, (o, a) in enumerate(zip(opcodes, operands, strict=True))]
    loops = sass._loops(instructions, {".L_x_0": 0, ".L_x_1": 3})
    first, last, mma, loads = max(loops, key=sass._heat)
    assert (first, last, mma, loads) == (3, 6, 1, 1)
    code = sass.Code(64, 0, tuple(instructions), tuple(instructions[first : last + 1]), has_loop=True)
    assert code.spills() == 1
    assert code.families() == ["HGMMA"]
    assert code.loop_bytes() == 32 * 16


def test_a_way_back_into_a_loop_is_no_loop():
    """A wait stands behind the program's end and goes back to where it was needed."""
    opcodes = ["LDG.E", "HGMMA.64x16x16.F32", "FADD", "BRA", "EXIT", "SYNCS", "BRA"]
    operands = ["", "", "", " `(.L_x_0)", "", "", " `(.L_x_1)"]
    instructions = [sass.Instruction(16 * i, o, a) for i, (o, a) in enumerate(zip(opcodes, operands, strict=True))]
    assert sass._loops(instructions, {".L_x_0": 0, ".L_x_1": 1}) == [(0, 3, 1, 1)]


def test_occupancy_by_hand():
    h100 = roofline.DEVICES[90]
    fits = roofline.blocks_per_multiprocessor
    assert fits(h100, registers=255, shared=0, warps=8, tensor_memory=0) == 1  # 8192 registers a warp, 65536 in all
    assert fits(h100, registers=128, shared=0, warps=8, tensor_memory=0) == 2
    assert fits(h100, registers=32, shared=100 << 10, warps=4, tensor_memory=0) == 2
    assert fits(h100, registers=32, shared=(227 << 10) + 1, warps=4, tensor_memory=0) == 0
    assert fits(roofline.DEVICES[100], registers=32, shared=0, warps=4, tensor_memory=512) == 1
    assert fits(roofline.DEVICES[100], registers=32, shared=0, warps=4, tensor_memory=576) == 0


def test_the_model_names_its_bound():
    h100 = roofline.DEVICES[90]
    model = roofline.estimate(h100, Work(bytes=8192, flops=2 * 64 * 16 * 128, rate="fp8"), instructions=1000, warps=4)
    assert model.bound == "issue"
    assert model.issue == 1000
    assert model.memory == pytest.approx(8192 / (3350 / 132 / 1.83))
    assert model.share == pytest.approx(model.memory / 1000)
    assert roofline.estimate(h100, Work(bytes=8192), instructions=10, warps=4).share == 1
    # the review's own example, FP4 decode of one block: 436 instructions, 12 barriers, 4 fences of
    # each kind, 4 waits for products
    stalls = 12 * 30 + 4 * 40 + 4 * 20 + 4 * 60
    alone = roofline.estimate(h100, Work(bytes=0), instructions=436, warps=4, stalls=stalls)
    assert (alone.bound, alone.predicted) == ("waiting", pytest.approx(1276))
    shared = roofline.estimate(h100, Work(bytes=0), instructions=436, warps=4, stalls=stalls, blocks=4)
    assert (shared.bound, shared.predicted) == ("issue", 436)
    slow = roofline.estimate(h100, Work(bytes=0), instructions=100, warps=4, conversions=64, blocks=4)
    assert (slow.bound, slow.predicted) == ("convert", 64 * 4 * 32 / 16)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [(80, 80), (86, 80), (89, 89), (90, 90), (100, 100), (103, 100), (120, 120), (121, 120)],
)
def test_architectures(capability, architecture):
    assert launch.compatible(capability) == architecture


def test_an_old_or_unknown_part_is_refused():
    for capability in (75, 110):
        with pytest.raises(ValueError, match="has no kernels here"):
            launch.compatible(capability)


def test_every_row_says_how_it_was_chosen_and_every_architecture_has_it():
    rows = json.loads(launch.TABLE.read_text())
    assert (
        len({(r["kernel"], r["arch"]) for r in rows})
        == len(rows)
        == len({r["kernel"] for r in rows}) * len(launch.ARCHITECTURES)
    )
    assert all(len(r["how"]) > 5 for r in rows)
    with pytest.raises(KeyError, match="dsv4 kernels tune"):
        launch.config("no_such_kernel", 90)
