"""JUnit XML, as continuous integration reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

if TYPE_CHECKING:
    from dsv4_conformance.run.runner import Run


def junit(run: Run, rerun: str) -> str:
    """One test case per check; claimed or required failures are failures, the rest of what did not
    pass is skipped with its reason.
    """
    suite = Element(
        "testsuite",
        name=f"dsv4 conformance {run.backend}",
        tests=str(len(run.findings)),
        time=f"{run.duration:.3f}",
        timestamp=run.date,
    )
    failures = errors = skipped = 0
    for f in run.findings:
        case = SubElement(suite, "testcase", classname=f.op, name=f.id, time=f"{f.duration:.3f}")
        if run.fails(f):
            broken = f.status in {"error", "crashed", "timeout", "memory"}
            errors, failures = errors + broken, failures + (not broken)
            SubElement(
                case, "error" if broken else "failure", message=printable(f.message), type=f.status
            ).text = f"re-run: {rerun} --case {f.id}"
        elif f.status != "passed":
            skipped += 1
            SubElement(case, "skipped", message=printable(f"{f.status}: {f.message}"))
    for text in run.stale:
        failures += 1
        SubElement(
            SubElement(suite, "testcase", classname="xfails", name=printable(text)), "failure", message=printable(text)
        )
    suite.set("failures", str(failures))
    suite.set("errors", str(errors))
    suite.set("skipped", str(skipped))
    indent(suite)
    return tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def printable(text: str) -> str:
    """Drop the control characters that XML cannot hold."""
    return "".join(c for c in text if c >= " " or c in "\n\t")
