"""The catalogue: every check of a tier, and those that an id outside it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_conformance.cases import checks as cases
from dsv4_conformance.cases import every_size
from dsv4_conformance.check import TIERS, Check
from dsv4_conformance.exchange.replay import SUFFIX, SavedCase, read
from dsv4_conformance.laws import arrays, in_a_row, invariance, nonfinite
from dsv4_conformance.laws import checks as laws
from dsv4_conformance.model import checks as models
from dsv4_conformance.model import replayed, shadowed, traces
from dsv4_conformance.run import device
from dsv4_core.checkpoint.shards import ShardError

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics, Tier


def collect(tier: Tier, numerics: Numerics, backend: Backend | None = None) -> list[Check]:
    """Every check of a tier and of those below it, in the order of a run: ops, invariance, traces,
    laws, models, device.

    ``backend`` adds those of the weight formats that it declares and those that it brings for its
    device.
    """
    formats = backend.weight_formats if backend else ()
    found: list[Check] = [*cases.declared(formats), *models.declared(formats, numerics)]
    for room in (arrays, cases, every_size, nonfinite, in_a_row, invariance, traces, laws, shadowed, replayed):
        found += room.checks(numerics)
    found += models.checks(numerics, backend)
    found += device.checks(backend) if backend else []
    return [c for c in found if TIERS.index(c.tier) <= TIERS.index(tier)]


def find(case_id: str) -> Check | None:
    """The check that an id outside the catalogue stands for: ``law/NAME:EXAMPLE`` or the path of a
    saved call; None for any other id.
    """
    if case_id.startswith(laws.PREFIX) and ":" in case_id:
        return laws.example_check(case_id)
    if not case_id.endswith(SUFFIX):
        return None
    try:
        return SavedCase(case_id, read(Path(case_id))[2]["op"])
    except (OSError, ShardError) as error:
        raise ValueError(f"--case {case_id}: not a saved case ({error}); `localise` writes them") from None
