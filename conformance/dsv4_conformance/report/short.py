"""Findings as ``report.json`` holds them: what is usual is left out, so that four thousand take
half a megabyte.

A key that is absent has the value in ``USUAL``; ``op`` is then the first part of the id, and
``counts`` what ``claimed`` is. What did not pass keeps every figure. Of what passed the seed and
the worst element are left out, of an op case also every figure but the noise factor, and figures
have four digits.
"""

from __future__ import annotations

from typing import Any

ALWAYS = {"id", "level"}
USUAL: dict[str, Any] = {
    "group": "op",
    "status": "passed",
    "message": "",
    "dtypes": "",
    "used": 0.0,
    "metrics": {},
    "worst": {},
    "seed": 0,
    "duration": 0.0,
    "claimed": True,
    "inputs": "",
    "ran": "",
}


def short(finding: dict[str, Any]) -> dict[str, Any]:
    """One finding without what is usual; ``id`` comes first."""
    said = whole(finding)
    said["duration"] = round(said["duration"], 2)
    if said["status"] == "passed":
        kept = {"factor"} if said["group"] == "op" else said["metrics"].keys()
        said["metrics"] = {k: in_digits(v) for k, v in said["metrics"].items() if k in kept}
        said |= {"used": in_digits(said["used"]), "worst": {}, "seed": 0}
    usual = {**whole({"id": said["id"]}), "counts": said["claimed"]}
    return {key: value for key, value in said.items() if key in ALWAYS or value != usual[key]}


def whole(finding: dict[str, Any]) -> dict[str, Any]:
    """One finding with every key: what ``short`` left out, as it is usual."""
    said = {"id": "", "op": finding["id"].partition("/")[0], **USUAL, **finding}
    return {"counts": said["claimed"], **said}


def in_digits(value: Any) -> Any:
    """A figure in four digits; text is left as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
