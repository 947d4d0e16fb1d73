"""``dsv4 conformance matrix REPORT...``: the support matrix in Markdown, from reports alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsv4_conformance.files.forms import Report, plain
from dsv4_conformance.report.short import whole
from dsv4_conformance.run.runner import said_once
from dsv4_core.contract.spec import OPS
from dsv4_core.files.markdown import in_lines
from dsv4_core.files.reading import FileError, json_file

BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
HEAD = """# Support matrix

Made by `dsv4 conformance matrix REPORT...` from reports alone: a column a run, its command below; the number beside a result names the run that it is from.
"""


def between(document: str, text: str, name: str) -> str:
    """The document with the text between its two marks; raise ``ValueError`` where they are
    missing.
    """
    head, begin, rest = document.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{name}: no lines {BEGIN} and {END} to put the matrix between; write them where it belongs")
    return f"{head}{begin}{text}{end}{tail}"


def load(path: Path) -> dict[str, Any]:
    """Read a report; raise ``ValueError`` where it is none."""
    file = path / "report.json" if path.is_dir() else path
    advice = "write a report with dsv4 conformance run --report DIR"
    try:
        report = dict(plain(json_file(file, Report, advice)))
    except FileNotFoundError:
        raise FileError(f"{file}: no such file, so no conformance report; {advice}") from None
    return report | {"findings": [whole(f) for f in report["findings"]]}


def matrix(reports: list[dict[str, Any]]) -> str:
    """Ops down, reports across; each cell says passed, failed or not tested, and by which run."""
    stamps = [stamp(r, i) for i, r in enumerate(reports, 1)]
    heads = " | ".join(f"{name(r)} [{i}]" for i, r in enumerate(reports, 1))
    lines = [f"| op | {heads} |", "|---|" + "---|" * len(reports)]
    lines.append("| **level reached** | " + " | ".join(level(r) for r in reports) + " |")
    lines += [f"| `{op}` | " + " | ".join(cell(r, op, i) for i, r in enumerate(reports, 1)) + " |" for op in OPS]
    rest = dict.fromkeys(f["group"] for r in reports for f in r["findings"] if f["group"] != "op")
    lines += [
        f"| {group} checks | " + " | ".join(tally(r, group, i) for i, r in enumerate(reports, 1)) + " |"
        for group in rest
    ]
    return in_lines("\n".join([HEAD, *lines, "", *stamps]) + "\n")


def summary(reports: list[dict[str, Any]]) -> str:
    """Reports down: the level that each reached, and what did not pass."""
    lines = ["| backend | level reached | checks | on |", "|---|---|---|---|"]
    for r in reports:
        found = outcome(r["findings"])
        lines.append(f"| {name(r)} | {level(r)} | {found} | {r['device']}, tier {r['tier']}, {r['date']} |")
    return "\n".join(lines) + "\n"


def name(report: dict[str, Any]) -> str:
    """The backend with the options that it was run with, and the mode."""
    if "options" in report:
        options = [
            f"{name}={value.lower() if value in {'True', 'False'} else value}"
            for name, value in report["options"].items()
        ]
    else:  # a report of before November 28
        options = [value for option, value in pairwise(report["rerun"].split()) if option == "--option"]
    return ", ".join([report["backend"], *options, report["numerics"]])


def stamp(report: dict[str, Any], number: int) -> str:
    """What a column rests on."""
    suite = report["environment"]["suite"]
    proven = f" Proof: {said_once(report['proof'])}." if report.get("proof") else ""
    declared = [
        text
        for text, said in (
            ("subnormal numbers count as zero", report.get("flushes_subnormals")),
            ("ties are broken in any way", report.get("ties") == "any"),
        )
        if said
    ]
    proven += f" Declared: {', '.join(declared)}." if declared else ""
    return (
        f"[{number}] suite {suite}, {report['backend']} {report['version']}, device {report['device']}, {report['date']}, tier {report['tier']}: "
        f"`{command(report)}`.{proven}  "
    )


def command(report: dict[str, Any]) -> str:
    """The command that made a report; of one from before November 28 the one that its cases are run
    again with.
    """
    return str(report.get("command", report["rerun"]))


def level(report: dict[str, Any]) -> str:
    """The level that a run reached."""
    if report["partial"]:
        return "partial run"
    return "none" if report["level"] is None else str(report["level"])


def cell(report: dict[str, Any], op: str, number: int) -> str:
    """An op's cases in one report."""
    return f"{outcome([f for f in report['findings'] if f['op'] == op and f['group'] == 'op'])} [{number}]"


def tally(report: dict[str, Any], group: str, number: int) -> str:
    """A group's checks in one report."""
    return f"{outcome([f for f in report['findings'] if f['group'] == group])} [{number}]"


def fails_the_run(finding: dict[str, Any]) -> bool:
    """Whether a failure would have failed the run."""
    return bool(finding.get("counts", finding["claimed"]))  # reports from before November 28 have the one word for both


def outcome(findings: list[dict[str, Any]]) -> str:
    """How many passed, and what became of the others."""
    tested = [f for f in findings if f["status"] != "unsupported"]
    if not tested:
        return str(findings[0]["message"]) if findings else "not tested"
    counts = Counter(
        f["status"] if fails_the_run(f) or f["status"] == "passed" else f"{f['status']}, not claimed" for f in tested
    )
    passed = counts.pop("passed", 0)
    return (
        f"{passed} passed"
        if not counts
        else f"{passed} of {len(tested)} passed, " + ", ".join(f"{n} {s}" for s, n in counts.items())
    )
