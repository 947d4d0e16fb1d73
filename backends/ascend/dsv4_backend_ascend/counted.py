"""The report of ``dsv4 ascend launches``."""

from __future__ import annotations

import datetime as dt
import itertools
from typing import TYPE_CHECKING, Any

from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.capture import dry_capture
from dsv4_backend_ascend.launches import count, lines
from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.backend import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIERS = ("composed", "cann", "vendor")
SHOWN = 8  # contracts that a line names


def report(
    model: str,
    socs: Sequence[str] = (),
    tiers: Sequence[str] = (),
    *,
    start: int,
    batch: int,
    before: dict[str, Any] | None = None,
    said: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Count and capture one decode step for each chip and tier, without and with kernels of our
    own; ``said`` is told of each in words.

    Raises ``BackendError`` for a model, a chip or a tier that there is not.
    """
    for what, given, known in (("model", [model], [*PRESETS]), ("soc", socs, GENERATIONS), ("tier", tiers, TIERS)):
        if unknown := [name for name in given if name not in known]:
            raise BackendError(f"ascend launches: {what} {unknown[0]!r} is not one of {', '.join(known)}")
    if start < 1 or batch < 1:
        raise BackendError(
            f"ascend launches: start {start} and batch {batch} must be 1 or more: a decode step follows a prompt"
        )
    config = PRESETS[model]
    steps: dict[str, Any] = {}
    for soc in socs or GENERATIONS:
        for tier, prefer in itertools.product(tiers or TIERS[1:], ("", "triton")):
            if tier == "composed" and prefer:
                continue
            name = f"{soc} {tier}{' triton' if prefer else ''}"
            given: dict[str, Any] = {"tier": tier, "start": start, "batch": batch, "prefer": prefer}
            step = count(config, soc, **given)  # type: ignore[arg-type]
            captured = dry_capture(config, soc, **given)  # type: ignore[arg-type]
            found = {
                "launches": step.launched(),
                "outside layers": step.launched(None),
                "layers": {str(i): step.launched(i) for i in step.layers if i is not None},
                "contracts": step.by_contract(),
                "AICPU": sum(step.at("AICPU").values()),
                "unknown": sum(step.at("unknown").values()),
                "recorded": {
                    "buffers": captured.buffers,
                    "moved": list(captured.moved),
                    "read on the host": captured.host,
                },
            }
            old = (before or {}).get("steps", {}).get(f"{soc} {tier}")  # what kernels of our own save, too
            if old:
                found["before"] = old["launches"]
            steps[name] = found
            for line in lines(step):
                said(line.replace(f"tier {tier}", f"tier {tier}, prefer=triton") if prefer else line)
            most = ", ".join(f"{name or 'the graph'} {n}" for name, n in list(found["contracts"].items())[:SHOWN])
            said(f"  by contract: {most}")
            wrong = captured.host or ", ".join(captured.moved)
            said(
                f"  as a graph: {f'cannot be recorded: {wrong}' if wrong else f'{captured.buffers} buffers, the same each time'}"
            )
            if old:
                said(f"  before: {old['launches']}")
    return {
        "says": f"operators that one decode step of {model} launches, {start} tokens before it, {batch} sequences; counted on tensors "
        "without data, no NPU was present",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "steps": steps,
    }


def clean(found: dict[str, Any]) -> bool:
    """Whether nothing runs on AICPU or at a place that is not known, and every step can be
    recorded.
    """
    return not any(
        step["AICPU"] or step["unknown"] or step["recorded"]["moved"] or step["recorded"]["read on the host"]
        for step in found["steps"].values()
    )
