"""Self-test for hardware: every contract of the cann tier against the composed tier on the same
chip, and both against recorded expectations, with the same operands.

A difference names the contract, its npu ops, the tier at fault, the case and the element.
Expectations (``data/selftest.npz``, written by ``tools/record_selftest.py``) are the oracle's exact
results at some elements, each with what it may be off by.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from dsv4_backend_torch.backend import TorchBackend

from dsv4_backend_ascend.selftest_cases import CASES, Call, Case
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray
from dsv4_core.contract.ops import EveryOp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dsv4_backend_ascend.chip import ChipBackend

ULPS = 4 * 2.0**-8  # two BF16 units each way at the low end of a binade: both tiers round, and sum in their own order
SAMPLES = 256  # elements of a result that are recorded
CHOOSERS = ("index_topk", "cached_index_topk")
STRIDE = 7919  # a prime, so that samples walk through every axis


class Outcome(NamedTuple):
    """What one case showed. ``ops``: the npu ops that ran; ``found``: what differs, empty where all
    agree; ``skipped``: why the cann tier was not asked (the composed tier was held against the
    recorded expectation all the same).
    """

    contract: str
    case: str
    ops: tuple[str, ...]
    found: str = ""
    skipped: str = ""


class Recorded(NamedTuple):
    """What is expected of one result at some of its elements (flat indices), and how far off each
    may be.
    """

    at: Host
    value: Host
    allowed: Host


@functools.cache
def _archive() -> dict[str, Host]:
    with resources.files("dsv4_backend_ascend").joinpath("data/selftest.npz").open("rb") as file:
        return dict(np.load(file))


def recorded(case: Case, seed: int) -> list[Recorded]:
    """Expectations of a case's results; none for other operands than the recorded ones."""
    if seed:
        return []
    found: list[Recorded] = []
    while (key := f"{case.id}/{len(found)}") in _archive():
        size, *_ = (int(n) for n in _archive()[f"{key}/size"])
        found.append(Recorded(sampled(size), _archive()[key].astype(np.float64), _archive()[f"{key}/allowed"]))
    return found


def sampled(size: int) -> Host:
    """Flat indices of the elements that are recorded of a result of ``size`` elements."""
    return np.unique(np.arange(SAMPLES, dtype=np.int64) * STRIDE % max(size, 1))[:size]


def allowance(want: Host, *, exact: bool) -> Host:
    """How far off each element may be: a few units of its own, and of a hundredth of its row's
    largest where sums cancel.
    """
    if exact or not want.size:
        return np.zeros(want.shape)
    size = np.abs(want)
    return ULPS * (size + 0.01 * size.max(-1, keepdims=True))


def run(
    backend: ChipBackend, cases: Sequence[Case] = CASES, *, seed: int = 0, small: bool = False
) -> Iterator[Outcome]:
    """Run case after case. ``small``: without those at high addresses, which need gigabytes."""
    for case in cases:
        if not (small and case.gigabytes):
            yield compare(backend, case, seed=seed)


def chosen(contracts: Sequence[str] = ()) -> Sequence[Case]:
    """Cases of these contracts, or all. Raises ``BackendError`` for a contract that has none."""
    known = dict.fromkeys(case.contract for case in CASES)
    if unknown := [name for name in contracts if name not in known]:
        raise BackendError(f"ascend selftest: contract {unknown[0]!r} is not one of {', '.join(known)}")
    return [case for case in CASES if not contracts or case.contract in contracts]


def apart(
    cases: Sequence[Case], *, seed: int = 0, small: bool = False, device: str | None = None, words: Sequence[str] = ()
) -> Iterator[Outcome]:
    """As ``run``, each contract in a process of its own: an exception on AI Core leaves a process
    without a usable device.

    ``words``: more of the command line. Launches are waited for one by one, so that the one that
    raises is named. A process that leaves no report fails its contract.
    """
    command = [sys.executable, "-m", "dsv4_core", "ascend", "selftest", "--together", "--seed", str(seed), *words]
    command += [*(["--small"] if small else []), *(["--device", device] if device else [])]
    for contract in dict.fromkeys(case.contract for case in cases):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            done = subprocess.run(  # noqa: S603  our own command
                [*command, "--contract", contract, "--report", str(report)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "ASCEND_LAUNCH_BLOCKING": "1"},
            )
            if report.exists():
                found = json.loads(report.read_text(encoding="utf-8"))["outcomes"]
                yield from (Outcome(**{**outcome, "ops": tuple(outcome["ops"])}) for outcome in found)
            else:
                last = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
                yield Outcome(contract, "all cases", (), f"its process ended with {done.returncode}: {last}")


def compare(backend: ChipBackend, case: Case, *, seed: int = 0) -> Outcome:
    """Run a case in both tiers."""
    call = case.call(seed)
    arrays = tuple(_loaded(backend, array) for array in call.arrays)
    answer = backend.planned(case.contract, arrays, call.scalars)
    asked = answer.tier != "composed"
    ops = tuple(dict.fromkeys(c.op for c in answer.calls)) or (("triton",) if asked else ())
    skipped = "" if asked else answer.reason
    composed = getattr(TorchBackend if TorchBackend.implements(case.contract) else EveryOp, case.contract)
    low = tuple(
        held if call.low is None and not isinstance(array, Experts) else _loaded(backend, array, in_rows=True)
        for held, array in zip(arrays, call.yardstick, strict=True)
    )
    runs: dict[str, Callable[[], Any]] = {}
    if asked:
        runs[answer.tier] = lambda: getattr(backend, case.contract)(*arrays, **call.scalars)
    plain = functools.partial(composed, backend, *low, **call.scalars)
    runs["composed"] = functools.partial(_all_composed, backend, plain) if asked else plain
    try:  # the npu ops first: a kernel that the installed CANN lacks, or that refuses what its document allows, raises
        results = {
            tier: _comparable(backend, case, call, ask(), whole=tier != "composed") for tier, ask in runs.items()
        }
    except RuntimeError as error:
        return Outcome(case.contract, case.name, ops, f"raised {str(error).strip().splitlines()[0]}", skipped)
    return Outcome(case.contract, case.name, ops, _verdict(results, recorded(case, seed), exact=case.exact), skipped)


def _all_composed(backend: ChipBackend, run: Callable[[], Any]) -> Any:
    """Run a contract with those that it is made of composed, too."""
    tier, plans = backend.tier, backend.plans
    backend.tier, backend.plans = "composed", {}
    try:
        return run()
    finally:
        backend.tier, backend.plans = tier, plans


def problem(backend: ChipBackend, case: Case) -> str:
    """What is wrong with a case, with the npu ops that it went through."""
    outcome = compare(backend, case)
    return f"{', '.join(outcome.ops) or 'composed'}: {outcome.found}" if outcome.found else ""


def _loaded(backend: ChipBackend, array: Any, *, in_rows: bool = False) -> Any:
    """An operand on the device. ``in_rows``: experts as plain PyTorch ops read them, in no order of
    an npu op's.
    """
    if array is None:
        return None
    if isinstance(array, Experts):
        return backend.stacked_experts(array) if in_rows else backend.load_experts(array)
    return backend.load(array) if isinstance(array, ScaledArray) else backend.from_numpy(array)


def _comparable(backend: ChipBackend, case: Case, call: Call, result: Any, *, whole: bool) -> list[Host]:
    """Results on the host in float64; of picks their exact scores, so that near-ties may be picked
    either way.
    """
    flat = result if isinstance(result, tuple) else (result,)
    host = [backend.to_numpy(r) for r in flat]
    if whole:
        host = [h[call.part] for h in host]
    if case.contract in CHOOSERS:
        return [pick_scores(call.yardstick, host[0])]
    return [h.astype(np.float64) for h in host]


def pick_scores(arrays: Sequence[Host], picks: Host) -> Host:
    """Scores of each token's picks by the formula of ``index_topk`` in float64, best first; -inf
    for none. Of ``cached_index_topk`` the keys are those that its index names.

    A pick that is hidden or stands there twice is no pick.
    """
    q, weights, keys, *index, visible, offset = arrays
    if index:
        keys = keys[index[0]].reshape(q.shape[0], -1, keys.shape[1])
    scores = np.full(picks.shape, -np.inf)
    for b, s in np.ndindex(*picks.shape[:2]):
        rows = np.unique(picks[b, s] - offset[b, s])
        rows = rows[(rows >= 0) & (rows < visible[b, s])]
        hits = np.maximum(q[b, s].astype(np.float64) @ keys[b, rows].astype(np.float64).T, 0)
        scores[b, s, : rows.size] = np.sort(weights[b, s].astype(np.float64) @ hits)[::-1]
    return scores


def _verdict(results: dict[str, list[Host]], expected: list[Recorded], *, exact: bool) -> str:
    """The first difference in words: of a tier from what was recorded, else of the ops' tier from
    the composed one.
    """
    lines = []
    for tier, found in results.items():
        for i, (got, want) in enumerate(zip(found, expected, strict=False)):
            if line := _difference(i, got, want, tier):
                lines.append(line)
                break
    ops_tier = next((tier for tier in results if tier != "composed"), None)
    if lines or ops_tier is None:
        return "; ".join(lines)
    for i, (a, b) in enumerate(zip(results[ops_tier], results["composed"], strict=True)):
        if a.shape != b.shape:
            return f"{ops_tier} tier, result {i}: shape {list(a.shape)}, composed {list(b.shape)}"
        everywhere = Recorded(np.arange(b.size), b.ravel(), allowance(_finite(b), exact=exact).ravel())
        if line := _difference(i, a, everywhere, ops_tier, other="composed"):
            return line
    return ""


def _finite(want: Host) -> Host:
    return np.where(np.isfinite(want), want, 0)


def _difference(index: int, got: Host, want: Recorded, tier: str, other: str = "recorded") -> str:
    """The element that is furthest off, in words; nothing where all are within what is allowed."""
    if not want.at.size:
        return ""
    if got.size <= want.at[-1]:
        return f"{tier} tier, result {index}: shape {list(got.shape)}; {other} has element {want.at[-1]}"
    a = got.ravel()[want.at]
    with np.errstate(invalid="ignore"):
        excess = np.where(a == want.value, -1.0, np.abs(a - want.value) - want.allowed)
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return ""
    element = [int(i) for i in np.unravel_index(int(want.at[worst]), got.shape)]
    wrong = f"{int((excess > 0).sum())} of {want.at.size} differ"
    return f"{tier} tier, result {index}{element}: {tier} {a[worst]:.6g}, {other} {want.value[worst]:.6g} ({wrong})"


def expectation(case: Case, results: Any) -> dict[str, Host]:
    """What is recorded of the oracle's results on a case: entries of ``data/selftest.npz``."""
    call = case.call()
    flat = results if isinstance(results, tuple) else (results,)
    wide = (
        [pick_scores(call.yardstick, flat[0])]
        if case.contract in CHOOSERS
        else [np.asarray(r, np.float64) for r in flat]
    )
    entries: dict[str, Host] = {}
    for i, want in enumerate(wide):
        at = sampled(want.size)
        key = f"{case.id}/{i}"
        entries[key] = want.ravel()[at].astype(np.float32)
        entries[f"{key}/allowed"] = allowance(_finite(want), exact=case.exact).ravel()[at].astype(np.float32)
        entries[f"{key}/size"] = np.array([want.size], np.int64)
    return entries
