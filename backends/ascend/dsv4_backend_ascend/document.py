"""The generated part of docs/ascend.md: which op runs what on which chip, how far that was proven, and what W8A8 loses."""

from __future__ import annotations

from typing import Any

from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.proof import RUNGS

BEGIN, END = "<!-- generated: tools/collect.py -->", "<!-- end of generated part -->"


def page(text: str, proofs: dict[str, Any], l3: dict[str, dict[str, Any]]) -> str:
    """The page with its generated part made new."""
    before, _, rest = text.partition(BEGIN)
    return (
        "\n".join([before + BEGIN, "", *_rungs(proofs), *_calls(proofs), *_composed(), *_runs(l3), END])
        + rest.partition(END)[2]
    )


def _rungs(proofs: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in proofs["versions"].items())
    return [
        f"Rungs of proof, of runs with {versions}:",
        "",
        *(f"- **{rung}** {says}" for rung, says in RUNGS.items()),
        "- **L6** on hardware: **not run**. Nothing below it proves that a vendor's kernel is right.",
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


def _composed() -> list[str]:
    """Where plain PyTorch ops run although an op looks as if it served."""
    lines = ["### composed tier: why", "", "| contract | chips | weights | reason |", "|---|---|---|---|"]
    for absence in table().absent:
        weights = ", ".join(name for names in absence.operands.values() for name in names) or "any"
        lines.append(
            f"| {', '.join(absence.contracts)} | {', '.join(absence.generations)} | {weights} | {absence.reason} |"
        )
    lines += ["", "npu ops that are not called:", ""]
    return [*lines, *(f"- `{op}`: {reason}" for op, reason in table().unused.items()), ""]


def _runs(l3: dict[str, dict[str, Any]]) -> list[str]:
    """The simulated runs, as their reports have them."""
    lines = [
        "### Conformance on simulated CANN",
        "",
        "| chip | tier | level | checks | self-test | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for chip, report in l3.items():
        counts = ", ".join(f"{n} {status}" for status, n in report["checks"].items())
        differ = len(report["self-test differences"])
        lines.append(
            f"| {chip} | {report['tier']} | {report['level']} | {counts} | {differ} differences | {report['CPU seconds']} |"
        )
    return [*lines, ""]
