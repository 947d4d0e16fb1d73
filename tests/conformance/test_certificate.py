"""A report's certificate: it is of these files, and what was changed in a report is seen."""

import json

import pytest
from click.testing import CliRunner
from dsv4_conformance.cli import verify
from dsv4_conformance.files.forms import CertifiedReport
from dsv4_conformance.report import certificate, matrix
from dsv4_conformance.report.short import short, whole

from dsv4_core.cli import root
from dsv4_core.contract import registry
from dsv4_core.files.reading import FileError, checked, json_file


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    words = [
        "conformance",
        "run",
        "--backend",
        "reference",
        "--op",
        "hc_add",
        "--tier",
        "smoke",
        "--report",
        str(folder),
    ]
    assert CliRunner().invoke(root, words).exit_code == 0
    return folder / "report.json"


def test_a_report_is_verified_and_a_changed_one_is_not(report, tmp_path):
    done = CliRunner().invoke(root, ["conformance", "verify", str(report), "--sample", "3", "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert "VERIFIED" in done.output
    data = json.loads(report.read_text())
    for finding in data["findings"]:
        finding["inputs"] = "0" * 32
        finding["status"] = "failed"
    data["level"] = 4
    data["certificate"]["suite"] = "0" * 32
    (tmp_path / "report.json").write_text(json.dumps(data))
    done = CliRunner().invoke(root, ["conformance", "verify", str(tmp_path), "--sample", "3", "--seed", "1"])
    assert done.exit_code == 1
    for said in ("level 4 in the report", "failed in the report, passed here", f"here {certificate.suite()}"):
        assert said in done.output


def test_what_a_report_says_of_itself_is_held_to_its_findings(report):
    held = json_file(report, CertifiedReport, "")
    assert verify.consistent(held) == []
    assert verify.same_files(held) == []
    held.partial = False
    assert any("checks of tier smoke are not in the report" in line for line in verify.consistent(held))


def test_the_backend_that_is_asked_for_its_checks_has_the_reports_options(report, monkeypatch):
    held = json_file(report, CertifiedReport, "")
    held.partial, held.certificate.arguments = False, ["--numerics", "native", "--option", "batch_invariant=true"]
    given = {}
    right = registry.create
    monkeypatch.setattr(registry, "create", lambda name, **options: given.update(options) or right(name, **options))
    verify.consistent(held)
    assert given == {"numerics": "native", "batch_invariant": "true"}


def test_words_of_a_report_that_are_no_options_are_refused(report):
    data = json.loads(report.read_text())
    data["certificate"]["arguments"] = ["--report", "/"]
    with pytest.raises(FileError, match="arguments"):
        checked(data, CertifiedReport, "report.json", "")


def test_a_hash_sees_names_and_bytes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hashed_package").mkdir()
    (tmp_path / "hashed_package" / "__init__.py").write_text("a = 1\n")
    first = certificate.hashed(["hashed_package"])
    (tmp_path / "hashed_package" / "more.py").write_text("")
    second = certificate.hashed(["hashed_package"])
    (tmp_path / "hashed_package" / "more.py").write_text("b")
    assert len({first, second, certificate.hashed(["hashed_package"])}) == 3


def test_a_report_leaves_out_what_is_usual_and_is_read_whole(tmp_path):
    passed = {
        "id": "linear/small",
        "op": "linear",
        "group": "op",
        "level": 1,
        "status": "passed",
        "used": 0.1234567,
        "metrics": {"factor": 1.5, "bias_units": 2.0},
        "seed": 7,
    }
    assert short(passed) == {"id": "linear/small", "level": 1, "used": 0.1235, "metrics": {"factor": 1.5}}
    failed = whole({**passed, "status": "failed", "claimed": False, "worst": {"element": [0], "got": 1.0}})
    assert short(failed)["worst"] == failed["worst"]
    assert whole(short(failed)) == failed | {"counts": False}
    model = whole({"id": "model/tiny/distance", "op": "tiny", "group": "model", "level": 3, "metrics": {"KL": 0.0}})
    assert whole(short(model)) == model
    for finding in (passed, failed, model):
        assert short(whole(short(finding))) == short(finding)


def test_the_matrix_reads_short_reports_and_long_ones(report, tmp_path):
    data = json.loads(report.read_text())
    assert all("status" not in finding for finding in data["findings"])
    long = {**data, "findings": [whole(f) for f in data["findings"]]}
    (tmp_path / "report.json").write_text(json.dumps(long))
    assert matrix.matrix([matrix.load(tmp_path)]) == matrix.matrix([matrix.load(report)])
