"""Exported cases: computed elsewhere, judged here."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance.exchange import export
from dsv4_conformance.files import tensorfile
from dsv4_conformance.verdict.calls import execute

from dsv4_core.cli import root
from dsv4_core.contract import registry

FOREIGN = """
import json, pathlib, struct, sys
import ml_dtypes, numpy as np
where, results = map(pathlib.Path, sys.argv[1:])
KINDS = {"BF16": ml_dtypes.bfloat16, "F32": "f4", "I32": "i4", "I64": "i8", "U8": "u1"}

def read(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    return {
        k: np.frombuffer(raw[8 + n + v["data_offsets"][0] : 8 + n + v["data_offsets"][1]], KINDS[v["dtype"]]).reshape(v["shape"])
        for k, v in header.items()
    }

def rms_norm(x, weight, eps):
    x = x.astype("f4")
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return (y if weight is None else y * weight.astype("f4")).astype(ml_dtypes.bfloat16)

for case in json.loads((where / "manifest.json").read_text())["cases"]:
    t, operands = read(where / case["inputs"]), case["call"]["operands"]
    x, weight = (None if operands[n] is None else t[operands[n]["tensor"]] for n in ("x", "weight"))
    y = rms_norm(x, weight, case["call"]["scalars"]["eps"])
    header = json.dumps({"y": {"dtype": "BF16", "shape": list(y.shape), "data_offsets": [0, y.nbytes]}}).encode()
    path = results / case["results"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + y.tobytes())
"""


def invoke(*words):
    return CliRunner().invoke(root, ["conformance", *map(str, words)])


def compute(directory, results, backend):
    """What a program does with an exported directory, by a backend of this project."""
    for entry in json.loads((directory / "manifest.json").read_text())["cases"]:
        case = export.Exported(directory, entry)
        call = case.call()
        with np.errstate(all="ignore"):
            outcome = execute(call, backend, [tuple(o["shape"]) for o in entry["outputs"]])
        assert not outcome.problems
        tensorfile.write(results / entry["results"], dict(zip(export.output_names(call), outcome.results, strict=True)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "cases"
    done = invoke("export", directory)
    assert done.exit_code == 0, done.output
    return directory


@pytest.fixture
def results(exported, tmp_path):
    compute(exported, tmp_path, registry.create("reference"))
    return tmp_path


def test_every_op_is_exported_and_right_results_pass(exported, results):
    findings = list(export.judge(exported, results))
    assert [f.id for f in findings if f.status != "passed"] == []
    from dsv4_core.contract.spec import OPS

    assert {f.op for f in findings} == set(OPS)
    assert "manifest.json" in (exported / "README.md").read_text()


def test_a_program_that_knows_only_the_description(tmp_path):
    directory, results = tmp_path / "cases", tmp_path / "results"
    assert invoke("export", directory, "--op", "rms_norm", "--tier", "standard").exit_code == 0
    script = tmp_path / "foreign.py"
    script.write_text(FOREIGN)
    subprocess.run([sys.executable, "-I", script, directory, results], check=True)
    done = invoke("judge", directory, results)
    assert done.exit_code == 0, done.output
    assert "PASSED" in done.output


def broken(exported, results, op, change):
    """Verdict on one case of ``op`` after its result file was changed."""
    entry = next(e for e in json.loads((exported / "manifest.json").read_text())["cases"] if e["op"] == op)
    path = results / entry["results"]
    changed = change(tensorfile.decode(path.read_bytes()))
    path.unlink()
    if changed is not None:
        tensorfile.write(path, changed)
    done = invoke("judge", exported, results, "--case", entry["id"])
    assert done.exit_code == 1, done.output
    return done.output


def add_one(tensors):
    y = tensors["y"].copy()
    y[-1, -1] += 1
    return {"y": y}


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("linear", add_one, r"1 of \d+ elements over budget; worst \[\d+, \d+\]: got .* want .* budget"),
        ("concat", add_one, "1 of .* elements differ where every bit is fixed"),
        ("linear", lambda t: {"out": t["y"]}, "no tensor 'y'; it has out"),
        ("linear", lambda t: {"y": t["y"].astype(np.float32)}, "has dtype float32; the contract says bfloat16"),
        ("linear", lambda t: {"y": t["y"][:, :-1]}, "has shape .* the contract says"),
        ("linear", lambda _: None, "no result: .* does not exist; write y there"),
        ("cache_write", lambda t: {"cache": t["cache"] ^ 1}, "differ where every bit is fixed"),
        ("gate", lambda t: {**t, "y1": t["y1"][:, ::-1].copy()}, "weights: 10 of 15 elements over budget"),
    ],
)
def test_wrong_results_are_named(exported, results, op, change, message):
    import re

    assert re.search(message, broken(exported, results, op, change))


def test_a_truncated_result_is_named(exported, results):
    entry = json.loads((exported / "manifest.json").read_text())["cases"][0]
    path = results / entry["results"]
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in invoke("judge", exported, results, "--case", entry["id"]).output


def test_nothing_is_overwritten(exported):
    done = invoke("export", exported)
    assert "not an empty directory" in str(done.exception)


def test_int8_weights_survive_a_file():
    from dsv4_conformance.files.stored_calls import Packer, unpack
    from dsv4_conformance.verdict.calls import Call

    from dsv4_core.contract.dtypes import quantise_int8

    weight = quantise_int8(np.random.default_rng(0).standard_normal((4, 128)))
    packer = Packer()
    stated = packer.call("", Call("linear", [np.ones((1, 128)), weight], {"out_dtype": "float32"}), share=False)
    tensors = tensorfile.decode(tensorfile.encode(packer.tensors))
    again = unpack(stated, tensors.__getitem__).named()["weight"]
    np.testing.assert_array_equal(again.dequantise(), weight.dequantise())
