"""Laws as checks: examples that are known to bite, then Hypothesis hunts for others; what fails and
is claimed is shrunk to a case that can be re-run.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from dsv4_conformance.check import Check, Finding, Group, Session, claimed, describe
from dsv4_conformance.laws import of_drafts, of_engine, of_models, of_moved_arrays, of_ops
from dsv4_conformance.laws import strategies as some
from dsv4_conformance.laws.small_model import Stage
from dsv4_conformance.verdict.calls import seed_of
from dsv4_conformance.verdict.ties import to_the_lower
from dsv4_core.contract.spec import UnsupportedOpError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_conformance.laws.strategies import Example
    from dsv4_core.contract.spec import Numerics, Tier

EXAMPLES: dict[Tier, int] = {"smoke": 0, "standard": 25, "full": 300}
SHRINKING = 60  # trials after the first failure: a minute of a small model, most of what shrinking gains
PREFIX = "law/"
ALL_KINDS = (0, 4, 128)


@dataclass(frozen=True)
class Law:
    """A law, how examples of it are drawn, and examples that are always tried."""

    holds: Callable[..., str | None]
    strategy: dict[str, st.SearchStrategy[Any]]
    always: tuple[Example, ...]
    tier: Tier = "standard"
    level: int = 3
    bits: str = ""
    """Which bitwise claim it tests: ``batch_invariance`` or ``determinism``."""

    @property
    def name(self) -> str:
        """The function's."""
        return self.holds.__name__


_chunked = {"ratios": some.ratios, "chunks": some.chunks, "seed": some.seeds}
_ragged = {
    "ratios": some.ratios,
    "lengths": st.lists(some.lengths_or_none, min_size=2, max_size=4),
    "padding": st.integers(0, 3),
    "more": st.integers(0, 3),
    "seed": some.seeds,
}
_cut = {"ratios": ALL_KINDS, "chunks": [1, 70, 33, 60], "seed": 0}
_batch = {"ratios": ALL_KINDS, "lengths": [129, 0, 17, 5], "padding": 2, "more": 2, "seed": 0}
_extents = {**_chunked, "least": st.sampled_from((0, 8, 128))}
_extent = {"ratios": ALL_KINDS, "chunks": [1, 1, 1, 4, 120, 1, 1, 3], "least": 128, "seed": 0}
_moved = {
    "ratios": some.ratios,
    "prompts": st.lists(some.lengths, min_size=2, max_size=2),
    "moves": st.lists(st.integers(0, 3), min_size=1, max_size=12),
    "seed": some.seeds,
}
_moves = {"ratios": ALL_KINDS, "prompts": [121, 3], "moves": [0, 0, 0, 1, 1, 2, 3, 2, 0, 3, 1, 2], "seed": 0}
_few = st.integers(0, 40)
_scheduled = {
    "ratios": some.ratios,
    "prompts": st.lists(some.lengths | st.integers(250, 300), min_size=1, max_size=6),
    "moves": st.lists(st.sampled_from((0, 0, 0, 1, 1, 2)), max_size=30),
    "slots": st.integers(1, 4),
    "chunk": st.sampled_from((1, 7, 50, 128, 512)),
    "seed": some.seeds,
}
_schedule = {
    "ratios": ALL_KINDS,
    "prompts": [290, 40, 129, 270, 200, 3, 300],
    "moves": [1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 2],
    "slots": 3,
    "chunk": 100,
    "seed": 0,
}
_prefix = {
    "ratios": some.ratios,
    "prefix": st.integers(128, 300),
    "first": st.integers(1, 30),
    "own": some.lengths.map(lambda n: min(n, 60)),
    "further": st.integers(0, 19),
    "seed": some.seeds,
}

LAWS = (
    Law(of_models.chunked_is_full, _chunked, (_cut,), "smoke"),
    Law(
        of_models.prefill_is_decode,
        {"ratios": some.ratios, "prompt": some.lengths, "steps": some.steps, "seed": some.seeds},
        ({"ratios": ALL_KINDS, "prompt": 123, "steps": [1, 1, 2, 1, 3], "seed": 0},),
        "smoke",
    ),
    Law(of_models.batch_and_padding, _ragged, (_batch,), "smoke"),
    Law(of_models.extents_do_not_show, _extents, (_extent,), "smoke"),
    Law(of_models.replay_is_forward, _moved, (_moves,), "smoke"),
    Law(
        of_moved_arrays.arrays_may_move,
        {"ratios": some.ratios, "chunks": some.chunks, "seed": some.seeds},
        ({"ratios": ALL_KINDS, "chunks": [30, 1, 1, 4], "seed": 0},),
    ),
    Law(
        of_models.reach,
        {
            "ratio": st.sampled_from(ALL_KINDS),
            "window": st.sampled_from((1, 2, 3, some.WINDOW, 64)),
            "changed": st.integers(0, 139),
            "total": some.lengths,
            "seed": some.seeds,
        },
        (
            {"ratio": 0, "window": some.WINDOW, "changed": 3, "total": 40, "seed": 0},
            {"ratio": 4, "window": 2, "changed": 8, "total": 40, "seed": 0},
            {"ratio": 128, "window": some.WINDOW, "changed": 5, "total": 140, "seed": 0},
        ),
        "smoke",
    ),
    Law(
        of_models.rewind,
        {
            "ratios": some.ratios,
            "at": some.lengths,
            "wrong": st.lists(st.integers(1, 5), min_size=1, max_size=3),
            "more": st.integers(1, 12),
            "seed": some.seeds,
        },
        (
            {"ratios": ALL_KINDS, "at": 126, "wrong": [5, 3], "more": 9, "seed": 0},
            {"ratios": (4,), "at": 33, "wrong": [2], "more": 3, "seed": 0},
        ),
        "smoke",
    ),
    Law(
        of_models.anywhere_as_the_oracle,
        {
            "ratios": some.ratios,
            "start": st.sampled_from((0, 4095, 1 << 15, (1 << 16) - 3, 1 << 16, 1 << 20)),
            "chunks": st.lists(st.integers(1, 40), min_size=1, max_size=3),
            "seed": some.seeds,
        },
        (
            {"ratios": ALL_KINDS, "start": 0, "chunks": [130, 1, 6], "seed": 0},
            {"ratios": (0, 128), "start": 1 << 20, "chunks": [30, 1], "seed": 0},
        ),
        "smoke",
    ),
    Law(
        of_models.speculative_is_greedy,
        {"ratios": some.ratios, "prompt": st.integers(1, 40), "tokens": st.integers(1, 30), "seed": some.seeds},
        ({"ratios": ALL_KINDS, "prompt": 20, "tokens": 40, "seed": 0},),
    ),
    Law(
        of_drafts.drafts_in_decode,
        {"ratios": some.ratios, "prompt": some.lengths, "steps": some.steps, "seed": some.seeds},
        ({"ratios": ALL_KINDS, "prompt": 30, "steps": [1, 1, 2, 1], "seed": 0},),
        "smoke",
    ),
    Law(
        of_drafts.blocks_are_the_oracles,
        {
            "ratios": some.ratios,
            "steps": some.steps,
            "rejected": st.integers(0, 5),
            "behind": st.integers(0, 30),
            "seed": some.seeds,
        },
        (
            {"ratios": ALL_KINDS, "steps": [30, 1, 4, 2], "rejected": 3, "behind": 25, "seed": 0},
            {"ratios": (0,), "steps": [1], "rejected": 0, "behind": 0, "seed": 1},
        ),
        "smoke",
    ),
    Law(
        of_models.drafts_are_accepted,
        {"ratios": some.ratios, "prompt": st.integers(1, 40), "tokens": st.integers(8, 30), "seed": some.seeds},
        (
            {"ratios": ALL_KINDS, "prompt": 9, "tokens": 30, "seed": 0},
            {"ratios": (128,), "prompt": 30, "tokens": 13, "seed": 23},  # the model has the last token's draft right
        ),
    ),
    Law(
        of_models.two_models_alive,
        {"ratios": some.ratios, "prompt": st.integers(1, 40), "steps": st.integers(1, 3), "seed": some.seeds},
        ({"ratios": (0, 4), "prompt": 20, "steps": 2, "seed": 0},),
    ),
    Law(
        of_ops.expert_permutation,
        {"tokens": _few, "topk": st.integers(1, 6), "seed": some.seeds},
        ({"tokens": 9, "topk": 2, "seed": 0},),
    ),
    Law(
        of_ops.experts_over_ranks,
        {"tokens": _few, "cuts": st.lists(st.integers(0, 4), max_size=4), "seed": some.seeds},
        ({"tokens": 9, "cuts": [1, 3], "seed": 0},),
    ),
    Law(
        of_ops.combine_undoes_dispatch,
        {"tokens": _few, "topk": st.integers(0, 2), "seed": some.seeds},
        ({"tokens": 9, "topk": 1, "seed": 0},),
        "smoke",
    ),
    Law(
        of_ops.sinkhorn,
        {"tokens": _few, "spread": st.integers(0, 32), "seed": some.seeds},
        ({"tokens": 33, "spread": 4, "seed": 0}, {"tokens": 33, "spread": 24, "seed": 0}),
        "smoke",
    ),
    Law(
        of_ops.packing_rounds,
        {"tokens": _few, "keys": st.integers(0, 1), "seed": some.seeds},
        ({"tokens": 9, "keys": 0, "seed": 0}, {"tokens": 9, "keys": 1, "seed": 0}),
        "smoke",
    ),
    Law(
        of_ops.fused_is_composed,
        {"tokens": st.integers(1, 40), "seed": some.seeds},
        ({"tokens": 1, "seed": 0}, {"tokens": 9, "seed": 0}),
        "smoke",
    ),
    Law(of_models.same_bits_twice, _chunked, (_cut,), level=4, bits="determinism"),
    Law(of_models.same_bits_in_chunks, _chunked, (_cut,), level=4, bits="batch_invariance"),
    Law(of_models.same_bits_replayed, _moved, (_moves,), level=4, bits="determinism"),
    Law(of_models.same_bits_rounded_up, _extents, (_extent,), level=4, bits="batch_invariance"),
    Law(of_models.same_bits_in_a_batch, _ragged, (_batch,), level=4, bits="batch_invariance"),
    Law(of_engine.in_company, _scheduled, (_schedule,), level=4, bits="batch_invariance"),
    Law(of_engine.drafts_do_not_show, _scheduled, (_schedule,), level=4, bits="batch_invariance"),
    Law(
        of_engine.taken_up_is_cold,
        _prefix,
        ({"ratios": ALL_KINDS, "prefix": 257, "first": 9, "own": 20, "further": 19, "seed": 0},),
        level=4,
        bits="batch_invariance",
    ),
    Law(
        of_engine.forked_is_cold,
        {
            "ratios": some.ratios,
            "blocks": st.integers(0, 1),
            "junk": st.integers(0, 140),
            "further": st.integers(0, 19),
            "seed": some.seeds,
        },
        ({"ratios": ALL_KINDS, "blocks": 1, "junk": 140, "further": 9, "seed": 0},),
        level=4,
        bits="batch_invariance",
    ),
    Law(
        of_engine.seed_decides,
        {
            "ratios": some.ratios,
            "prompt": st.integers(1, 40),
            "copies": st.integers(1, 4),
            "slots": st.integers(1, 4),
            "seed": some.seeds,
        },
        ({"ratios": ALL_KINDS, "prompt": 20, "copies": 3, "slots": 2, "seed": 0},),
        level=4,
        bits="batch_invariance",
    ),
    Law(
        of_engine.nobody_starves,
        {
            "ratios": some.ratios,
            "prompts": st.lists(st.integers(1, 90), min_size=1, max_size=6),
            "slots": st.integers(1, 3),
            "chunk": st.integers(1, 64),
            "seed": some.seeds,
        },
        ({"ratios": (4,), "prompts": [5, 60, 3, 20], "slots": 2, "chunk": 9, "seed": 5},),
    ),
    Law(
        of_engine.mask_holds,
        {
            "ratios": some.ratios,
            "prompt": some.lengths,
            "allowed": st.lists(st.integers(0, 15), max_size=8),
            "seed": some.seeds,
        },
        ({"ratios": ALL_KINDS, "prompt": 20, "allowed": [3, 7, 11], "seed": 0},),
        level=4,
        bits="batch_invariance",
    ),
    Law(
        of_engine.refusals_change_nothing,
        {"ratios": some.ratios, "prompt": some.lengths, "seed": some.seeds},
        ({"ratios": ALL_KINDS, "prompt": 20, "seed": 0},),
        level=4,
        bits="batch_invariance",
    ),
)


class BrokenError(AssertionError):
    """An example that breaks a law."""


def trial(law: Law, stage: Stage, example: Example) -> str | None:
    """Try an example; what the backend raises counts as broken."""
    try:
        return law.holds(stage, **example)
    except UnsupportedOpError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the backend raises is its result
        return describe(error)


def hunt(law: Law, stage: Stage, examples: int, seed: int, *, shrink: bool = True) -> tuple[Example, str] | None:
    """Let Hypothesis look for an example that breaks a law, and ``shrink`` it; None if it finds
    none.
    """
    broken: dict[str, tuple[Example, str]] = {}
    kept: dict[str, bool] = {}
    tried_since = 0
    smallest: list[tuple[Example, str]] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, *[Phase.shrink] * shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        print_blob=False,
    )
    @given(st.fixed_dictionaries(law.strategy))
    def search(example: Example) -> None:
        nonlocal tried_since
        key = some.written(example)
        if key not in broken and key not in kept and tried_since < SHRINKING:
            tried_since += bool(broken)
            problem = trial(law, stage, example)
            if problem:
                broken[key] = (example, problem)
            else:
                kept[key] = True
        if key in broken:
            smallest[:] = [broken[key]]
            raise BrokenError(key)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hypothesis' remarks on how its examples are drawn
        try:
            search()
        except BrokenError:
            return smallest[0]
    return None


@dataclass(frozen=True)
class LawCheck:
    """A law as a check, or one example of it."""

    law: Law
    example: tuple[tuple[str, Any], ...] | None = None

    @property
    def group(self) -> Group:
        """Laws about bits are claimed by what they test."""
        return "invariance" if self.law.bits else "law"

    @property
    def id(self) -> str:
        """``law/NAME``, or ``law/NAME:EXAMPLE``."""
        at = f":{some.written(dict(self.example))}" if self.example is not None else ""
        return f"{PREFIX}{self.law.name}{at}"

    @property
    def op(self) -> str:
        """The law's name, or the claim that it tests."""
        return self.law.bits or self.law.name

    @property
    def tier(self) -> Tier:
        """The law's."""
        return self.law.tier

    @property
    def level(self) -> int:
        """3, or 4 for laws about bits."""
        return self.law.level

    def run(self, session: Session) -> Finding:
        """Try the examples; at ``standard`` and ``full`` hunt for others, and for a smaller one
        than what failed, unless nobody claims the law: one example says that it does not hold.
        """
        if "stage" not in session.shared:
            session.shared["stage"] = Stage.of(session.backend)
        stage: Stage = session.shared["stage"]
        with ExitStack() as stack:
            for backend in {stage.own, stage.exact} if session.backend.ties == "any" else ():
                stack.enter_context(to_the_lower(backend))
            return self.tried(session, stage)

    def tried(self, session: Session, stage: Stage) -> Finding:
        """The finding, on a stage."""
        seed = seed_of(self.id, session.repeat)
        examples = [dict(self.example)] if self.example is not None else self.law.always
        found = next(((e, p) for e in examples if (p := trial(self.law, stage, e))), None)
        wanted = claimed(self, session.backend)
        if self.example is None and EXAMPLES[session.tier] and (wanted or not found):
            found = hunt(self.law, stage, EXAMPLES[session.tier], seed, shrink=wanted) or found
        finding = Finding(
            self.id,
            self.op,
            self.group,
            self.level,
            "passed",
            seed=seed,
            dtypes=(stage.own if self.law.bits else stage.exact).numerics,
        )
        if found:
            example, problem = found
            finding.status, finding.used, finding.worst = "failed", float("inf"), {"example": some.written(example)}
            finding.message = f"{problem}; this example: --case {PREFIX}{self.law.name}:{some.written(example)}"
        return finding


def example_check(case_id: str) -> LawCheck:
    """The check of one example, by the id that a failure printed; raise ``ValueError`` where there
    is no such law or key.
    """
    name, _, text = case_id.removeprefix(PREFIX).partition(":")
    law = next((w for w in LAWS if w.name == name), None)
    if law is None:
        raise ValueError(f"--case {case_id!r}: no law {name!r}; laws: {', '.join(w.name for w in LAWS)}")
    return LawCheck(law, tuple(some.read(text, law.always[0]).items()))


def checks(numerics: Numerics) -> list[Check]:
    """Every law."""
    del numerics
    return [LawCheck(law) for law in LAWS]
