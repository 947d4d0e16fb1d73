"""Contracts that stay composed: by name, or because they failed in a self-test's report."""

import json

import pytest
from dsv4_backend_ascend.backend import AscendBackend

from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.spec import Operand

NORM = {"x": Operand("bfloat16", (4, 32)), "weight": None, "eps": 1e-6}


def test_a_contract_is_composed_by_name():
    backend = AscendBackend(soc="910B", composed="rms_norm, swiglu")
    assert backend.supports("rms_norm", **NORM).by == "composed: composed=rms_norm, swiglu was asked for"
    assert "composed: swiglu: composed=rms_norm, swiglu was asked for" in backend.describe()
    assert AscendBackend(soc="910B").supports("rms_norm", **NORM).by == "cann: npu_rms_norm"


@pytest.mark.parametrize("name", ["rms", "concat"])
def test_a_name_that_no_npu_op_runs_is_refused(name):
    with pytest.raises(BackendError, match=f"no npu op runs {name}; those that one runs: rms_norm, "):
        AscendBackend(soc="910B", composed=name)


def report(folder, **changes):
    outcome = {
        "contract": "rms_norm",
        "case": "tokens=33",
        "ops": ["npu_rms_norm"],
        "found": "raised EZ9999",
        "skipped": "",
    }
    other = outcome | {"contract": "swiglu", "found": ""}
    path = folder / "report.json"
    path.write_text(json.dumps({"chip": "910B", "outcomes": [outcome | changes, other]}))
    return path


def test_what_failed_in_a_self_test_is_composed(tmp_path):
    path = report(tmp_path)
    backend = AscendBackend(soc="910B", trust=str(path))
    assert backend.supports("rms_norm", **NORM).by == f"composed: {path}: tokens=33: raised EZ9999"
    gate = {"gate": Operand("bfloat16", (4, 32)), "up": Operand("bfloat16", (4, 32)), "weights": None, "limit": 10.0}
    assert backend.supports("swiglu", **gate).by == "cann: npu_clipped_swiglu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is no report of"),
        ('{"chip": "910B"}', "is no report of"),
        ('{"chip": "910B", "outcomes": [{"contract": 3}]}', "is no report of"),
        ('{"outcomes": []}', "is no report of"),
        ('{"chip": "950", "outcomes": []}', "is a self-test on 950, this is 910B"),
    ],
)
def test_a_report_that_cannot_be_trusted_is_refused(tmp_path, text, said):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BackendError, match=said):
        AscendBackend(soc="910B", trust=str(path))
