"""The generated part of docs/ascend.md: which op runs what on which chip, how far that was proven, and what runs on
simulated CANN showed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.proof import RUNGS

BEGIN, END = "<!-- generated: tools/collect.py -->", "<!-- end of generated part -->"


def page(
    text: str,
    proofs: dict[str, Any],
    runs: dict[str, dict[str, Any]],
    selftests: dict[str, dict[str, Any]],
    planted: dict[str, Any],
    l1: dict[str, Any],
) -> str:
    """The page with its generated part made new. ``runs``: of the conformance suite, ``selftests``: at full sizes, by chip."""
    before, _, rest = text.partition(BEGIN)
    lines = [
        *_rungs(proofs, l1),
        *_calls(proofs),
        *_composed(proofs),
        *_runs(runs),
        *_selftests(selftests),
        *_planted(planted),
    ]
    return "\n".join([before + BEGIN, "", *lines, END]) + rest.partition(END)[2]


def _rungs(proofs: dict[str, Any], l1: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in proofs["versions"].items())
    return [
        f"Rungs of proof, of runs with {versions}:",
        "",
        *(f"- **{rung}** {says}" for rung, says in RUNGS.items()),
        "- **L6** on hardware: **not run**. Nothing below it proves that a vendor's kernel is right.",
        "",
        *_drift(l1),
    ]


def _drift(l1: dict[str, Any]) -> list[str]:
    """What the comparison with the wheel found."""
    if not l1:
        return ["The comparison with the wheel was not run.", ""]
    drift = [*l1["drift"]["schemas"], *(f"{entry['call']} ({entry['op']})" for entry in l1["drift"]["shapes"])]
    calls = sum(map(len, l1["calls"].values()))
    refused = l1["calls that we refuse"]
    accepted = sum(entry["wheel"] == "accepted" for entry in refused)
    compared = f"{len(l1['ops'])} schemas and {calls} calls; drift: {', '.join(drift) or 'none'}"
    laxer = f"Of {len(refused)} calls that the backend refuses to make, the wheel's shape functions accept {accepted}"
    return [
        f"Compared with the wheel on {l1['date']}: {compared}. {laxer}: constraints are checked before the call.",
        "",
    ]


def _calls(proofs: dict[str, Any]) -> list[str]:
    """One row per call of the capability table: contracts, and per chip standing, CANN and rungs."""
    lines = [
        "### cann tier",
        "",
        f"| call | op | serves | {' | '.join(GENERATIONS)} |",
        f"|---|---|---|{'---|' * len(GENERATIONS)}",
    ]
    for call in table().calls:
        cells = []
        for generation in GENERATIONS:
            mine = [cell for cell in call.cells if generation in cell.generations]
            reached = " ".join(proofs["cann"][generation].get(call.name, [])) or "no rung"
            standings = ", ".join(dict.fromkeys(f"{cell.standing}, CANN {cell.min_cann}" for cell in mine))
            cells.append(f"{reached} ({standings})" if mine else "-")
        lines.append(f"| {call.name} | `{call.op}` | {', '.join(call.serves)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _composed(proofs: dict[str, Any]) -> list[str]:
    """Where plain PyTorch ops run although an op looks as if it served."""
    reached = "; ".join(f"{chip} {' '.join(rungs) or 'no rung'}" for chip, rungs in proofs["composed"].items())
    lines = [
        "### composed tier: why",
        "",
        f"Rungs of composed ops: {reached}; on hardware: not run.",
        "",
        "| contract | chips | weights | reason |",
        "|---|---|---|---|",
    ]
    for absence in table().absent:
        weights = ", ".join(name for names in absence.operands.values() for name in names) or "any"
        lines.append(
            f"| {', '.join(absence.contracts)} | {', '.join(absence.generations)} | {weights} | {absence.reason} |"
        )
    lines += ["", "npu ops that are not called:", ""]
    return [*lines, *(f"- `{op}`: {reason}" for op, reason in table().unused.items()), ""]


def _runs(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The suite's runs on simulated CANN, as their reports have them."""
    lines = [
        "### Conformance on simulated CANN",
        "",
        "| chip | tier | level | checks | of them self-test | calls of the table that ran | seconds | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chip, report in runs.items():
        findings = report["findings"]
        counts = Counter(
            finding["status"] + ("" if finding["claimed"] or finding["status"] == "passed" else ", not claimed")
            for finding in findings
        )
        device = [finding["status"] for finding in findings if finding["group"] == "device"]
        own = ", ".join(f"{n} {status}" for status, n in Counter(device).items()) or "not in this report"
        ran = {call for finding in findings for call in finding.get("ran", "").split()}
        claimed = [call for call in table().calls if any(chip in cell.generations for cell in call.cells)]
        lines.append(
            f"| {chip} | {report['tier']} | {report['level']} | {', '.join(f'{n} {s}' for s, n in counts.items())} | {own} "
            f"| {len(ran)} of {len(claimed)} | {report['duration']:.0f} | {report['date']} |"
        )
    return [*lines, ""]


def _selftests(selftests: dict[str, dict[str, Any]]) -> list[str]:
    """Dry runs of the self-test with its cases at high addresses."""
    lines = [
        "### Self-test, dry run at full sizes",
        "",
        "64 and 128 heads of 512 channels, indexer 64 x 128, rows past 2^31 bytes and past 2^31 elements, 81,920 key blocks, positions to 2^20.",
        "",
        "| chip | cases of the cann tier | of them at high addresses | composed | differ | date |",
        "|---|---|---|---|---|---|",
    ]
    for chip, report in selftests.items():
        asked = [o for o in report["outcomes"] if not o["skipped"]]
        high = sum("past_2^31" in o["case"] for o in asked)
        differ = sum(bool(o["found"]) for o in report["outcomes"])
        composed = len(report["outcomes"]) - len(asked)
        lines.append(
            f"| {chip}, {report['standing']} | {len(asked)} | {high} | {composed} | {differ} | {report['date']} |"
        )
    return [*lines, ""]


def _planted(planted: dict[str, Any]) -> list[str]:
    """Vendor bugs, and how the self-test words them."""
    lines = [
        "### Planted vendor bugs",
        "",
        "| bug | chip | op | cases that differ | the self-test says of the first |",
        "|---|---|---|---|---|",
    ]
    for name, bug in planted.get("bugs", {}).items():
        said = bug["first"] or "**not found**"
        lines.append(f"| {name} | {bug['chip']} | `{bug['op']}` | {len(bug['cases that differ'])} | {said} |")
    return [*lines, ""]
