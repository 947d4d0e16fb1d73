"""The tables of ``docs/kernels.md`` from the committed report; ``python -m
dsv4_backend_cuda.document`` brings the document up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4_core.files.markdown import in_lines
from dsv4_core.files.writing import write

REPORT, DOCUMENT = (
    Path("reports/cuda/kernels.json"),
    Path("docs/kernels.md"),
)  # of the repository, in whose root it is run
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def tables(report: dict[str, Any]) -> str:
    """Markdown: shares of a decode step, then a table of the machine code for each architecture."""
    steps = report["decode"]
    columns = sorted({s["arch"] for s in steps})
    lines = [
        f"{report['heading']}. Triton {report['triton']}.",
        "",
        "### Decode of one token: floor over predicted time",
        "",
        "The floor is the time of reading the weights once at the full rate; the prediction adds waiting, conversions and a launch, once for what shares one.",
        "",
    ]
    lines += _row("model", "product", "MB", *(f"sm_{a}" for a in columns)) + _row(*["---"] * (3 + len(columns)))
    for key in dict.fromkeys((s["model"], s["layer"], s["megabytes"]) for s in steps):
        shares = {s["arch"]: f"{s['share']:.0%}" for s in steps if (s["model"], s["layer"], s["megabytes"]) == key}
        lines += _row(key[0], key[1], f"{key[2]:.2f}", *(shares.get(a, "") for a in columns))
    for name, device in report["devices"].items():
        lines += ["", f"### {name} ({device['product']})", ""]
        head = (
            "kernel",
            "variant",
            "registers",
            "shared",
            "occupancy",
            "tensor cores",
            "loop",
            "spills",
            "bytes",
            "kflop",
            "bound",
            "floor / predicted",
            "gate",
        )
        lines += _row(*head) + _row(*["---"] * len(head))
        for r in report["results"]:
            if f"sm_{r['arch']}" != name:
                continue
            family = ", ".join(sorted({m.split(".")[0] for m in r["mma"]}))
            gate = f"unsupported: {r['unsupported']}" if r["unsupported"] else "; ".join(r["failures"]) or "passed"
            lines += _row(
                r["kernel"], r["variant"], r["registers"], r["shared"], f"{r['occupancy']:.0%}", family, r["loop_instructions"], r["spills"],
                f"{r['bytes']:.0f}", f"{r['flops'] / 1e3:.0f}", r["bound"], f"{r['share']:.0%}", gate,
            )  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(*cells: object) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |"]


def fresh(document: str, report: dict[str, Any]) -> str:
    """The document with the report's tables between its markers."""
    before, rest = document.split(BEGIN)
    return in_lines(before + BEGIN + tables(report) + END + rest.split(END)[1])


if __name__ == "__main__":
    write(DOCUMENT, fresh(DOCUMENT.read_text(), json.loads(REPORT.read_text())))
