"""The kernels' document and report as they are committed: judged without Triton."""

from __future__ import annotations

import json
from pathlib import Path

from dsv4_backend_cuda import build, document, launch
from dsv4_backend_torch import interpret

ROOT = Path(__file__).parents[2]


def test_the_document_holds_the_committed_report():
    text = (ROOT / document.DOCUMENT).read_text()
    assert document.fresh(text, json.loads((ROOT / document.REPORT).read_text())) == text, (
        "run python -m dsv4_backend_cuda.document"
    )


def test_the_report_is_whole_and_has_no_failure():
    report = json.loads((ROOT / document.REPORT).read_text())
    assert report["triton"] in interpret.TESTED_TRITON
    assert not [r for r in report["results"] if r["failures"]]
    assert {r["arch"] for r in report["results"]} == set(launch.ARCHITECTURES)
    assert {(s["model"], s["arch"]) for s in report["decode"]} == {
        (m, a) for m in ("flash", "pro") for a in launch.ARCHITECTURES
    }
    known = json.loads(build.baseline(report["triton"]).read_text())
    for r in report["results"]:
        if not r["unsupported"]:
            assert known[f"{r['kernel']}/{r['variant']}/sm_{r['arch']}"] == {
                k: r[k] for k in ("spills", "loop_instructions")
            }
