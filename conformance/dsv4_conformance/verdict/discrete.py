"""Picks, judged by the scores behind them: another pick is an error only if the scores' own budget
cannot explain it.

Where the scores leave no doubt (sums that every order computes exactly, scores that are operands),
ties follow the published rule: the lower index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.verdict.budget import SAFETY, SAMPLES, Expected, allowance, deviations, roundoff
from dsv4_conformance.verdict.calls import Call
from dsv4_conformance.verdict.judge import Verdict, judge_exact, judge_rounded, place
from dsv4_core.contract.dtypes import Host

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.registry import Oracle


@dataclass(frozen=True)
class Scores:
    """Scores [rows, n] in float64, their budgets, and which of them are certain (so that equal ones
    are ties).
    """

    value: Host
    budget: Host
    certain: Host


def judge_picks(picks: Host, scores: Scores, visible: Host, *, lower: bool = True) -> Verdict:
    """Judge picks [rows, k] of each row's first ``visible`` scores: valid, distinct, the best by
    margin, in any order; -1 where there are fewer than k. ``lower``: of equal scores the lower
    index is to be picked.
    """
    verdict = Verdict()
    rows, n = scores.value.shape
    k = picks.shape[1]
    count = np.minimum(visible, k)
    expected_valid = np.arange(k) < count[:, None]
    outside = (
        (picks >= visible[:, None]) | (picks < -1) | ((picks < 0) & expected_valid) | ((picks >= 0) & ~expected_valid)
    )
    if outside.any():
        at = place(outside)
        verdict.problems.append(
            f"pick {list(at)} is {int(picks[at])}; of {int(visible[at[0]])} visible the first {int(count[at[0]])} picks are valid and the rest -1"
        )
        verdict.worst, verdict.used = {"element": list(at), "got": int(picks[at])}, math.inf
        return verdict
    chosen = np.zeros((rows, n + 1), np.int64)  # the last column collects -1
    np.add.at(chosen, (np.arange(rows)[:, None], np.where(picks < 0, n, picks)), 1)
    twice = chosen[:, :n] > 1
    if twice.any():
        at = place(twice)
        verdict.problems.append(f"row {at[0]} picks {at[1]} more than once; picks are distinct")
        verdict.worst, verdict.used = {"element": list(at), "got": int(at[1])}, math.inf
        return verdict
    if not n or not k:
        return verdict
    picked, seen = chosen[:, :n] == 1, np.arange(n) < visible[:, None]
    _by_margin(verdict, scores, picked, seen & ~picked)
    if lower:
        _ties(verdict, scores, picked, seen & ~picked)
    return verdict


def _by_margin(verdict: Verdict, scores: Scores, picked: Host, left: Host) -> None:
    """No score left out may beat a picked one by more than both budgets."""
    rows = np.flatnonzero(picked.any(1) & left.any(1))
    if not rows.size:
        return
    value, budget = scores.value[rows], scores.budget[rows]
    best = np.where(left[rows], value - budget, -np.inf).argmax(1)
    least = np.where(picked[rows], value + budget, np.inf).argmin(1)
    at = np.arange(len(rows))
    gap, allowed = value[at, best] - value[at, least], budget[at, best] + budget[at, least]
    share = np.where(gap <= 0, 0.0, np.divide(gap, allowed, out=np.full(len(rows), np.inf), where=allowed > 0))
    worst = int(share.argmax())
    verdict.used = max(verdict.used, float(share[worst]))
    if share[worst] > 1:
        row, b, p = int(rows[worst]), int(best[worst]), int(least[worst])
        verdict.worst = {"element": [row, p], "got": p, "want": b, "budget": float(allowed[worst])}
        verdict.problems.append(
            f"{int((share > 1).sum())} of {len(picked)} rows pick worse than their scores allow; row {row} picks {p} (score {value[worst, p]:.9g}) "
            f"and leaves {b} (score {value[worst, b]:.9g}); budget {allowed[worst]:.3g}"
        )


def _ties(verdict: Verdict, scores: Scores, picked: Host, left: Host) -> None:
    """Of certain scores that are equal at the last place, the lower index is picked."""
    level = np.where(picked, scores.value, np.inf).min(1, keepdims=True)
    tied = (scores.value == level) & scores.certain
    column = np.arange(scores.value.shape[1])
    last_picked = np.where(tied & picked, column, -1).max(1)
    first_left = np.where(tied & left, column, len(column)).min(1)
    wrong = first_left < last_picked
    if wrong.any():
        row = int(wrong.argmax())
        verdict.worst, verdict.used = (
            {"element": [row], "got": int(last_picked[row]), "want": int(first_left[row]), "budget": 0.0},
            math.inf,
        )
        verdict.problems.append(
            f"{int(wrong.sum())} rows break ties by the higher index; row {row} picks {int(last_picked[row])} and leaves {int(first_left[row])}, both with "
            f"score {level[row, 0]:.9g}: on a tie the lower index wins (a backend may declare ties = 'any')"
        )


def _sampled(
    oracle: Oracle, call: Call, op: str, operands: list[Any], scalars: dict[str, Any]
) -> tuple[Host, list[Host]]:
    with np.errstate(all="ignore"):
        exact, perturbed = oracle.evaluate(op, operands, scalars, samples=SAMPLES, seed=call.seed % 2**32)
    return exact, perturbed


def judge_gate(call: Call, results: list[Host], oracle: Oracle, backend: Backend) -> Verdict:
    """Experts by biased score; weights recomputed for the experts that were chosen."""
    weights, indices = results
    operands = call.named()
    logits, perturbed = _sampled(
        oracle, call, "linear", [operands["x"], operands["weight"]], {"out_dtype": backend.wide_dtype}
    )

    def score(z: Host) -> Host:
        return np.sqrt(np.logaddexp(z, 0.0))

    exact, samples = score(logits), [score(z) for z in perturbed]
    u, bias = roundoff(backend.wide_dtype), operands["bias"].astype(np.float64)
    spread = deviations(exact, samples)
    biased = exact + bias
    budget = SAFETY * (spread + u * (np.abs(exact) + np.abs(biased)))
    certain = deviations(logits, perturbed) == 0
    visible = np.full(len(indices), exact.shape[1])
    verdict = judge_picks(indices, Scores(biased, budget, certain), visible, lower=backend.ties == "lower")
    if not verdict.ok or not indices.size:
        return verdict

    def normalised(s: Host) -> Host:
        chosen = np.take_along_axis(s, indices.astype(np.int64), 1)
        return np.asarray(chosen / chosen.sum(-1, keepdims=True) * call.scalars["route_scale"])

    value = normalised(exact)
    weight_spread = deviations(value, [normalised(s) for s in samples]) + u * np.abs(
        value
    )  # the sum and the division round too
    wide = backend.wide_dtype
    budget, noise = allowance(value, weight_spread, wide, wide)
    verdict.add(judge_rounded(weights, Expected(value, wide, budget, weight_spread, noise)), "weights: ")
    return verdict


def scores_of(call: Call, oracle: Oracle, backend: Backend) -> Scores:
    """The scores [tokens, rows] that the indexer picks by, whichever of its three forms computes
    them.
    """
    operands = call.named()
    if call.op == "index_select":
        exact, spread = operands["scores"].astype(np.float64), np.zeros(operands["scores"].shape)
    else:
        keys = operands.get("keys")
        if keys is None:
            batch, _, _, dim = operands["q"].shape
            read, _ = oracle.evaluate(
                "cache_read",
                [operands["cache"], operands["index"]],
                {"layout": call.scalars["layout"]},
                samples=0,
                seed=0,
            )
            keys = read.reshape(batch, -1, dim)
        exact, perturbed = _sampled(
            oracle, call, "index_scores", [operands["q"], operands["weights"], keys], {"scale": call.scalars["scale"]}
        )
        spread = deviations(exact, perturbed)
    rows = exact.shape[-1]
    certain = spread == 0
    budget = np.where(certain, 0, SAFETY * (spread + roundoff(backend.wide_dtype) * np.abs(exact)))
    return Scores(exact.reshape(-1, rows), budget.reshape(-1, rows), certain.reshape(-1, rows))


def judge_index(call: Call, results: list[Host], oracle: Oracle, backend: Backend) -> Verdict:
    """The indexer's picks."""
    operands, flat = call.named(), scores_of(call, oracle, backend)
    offset, visible = operands["offset"].reshape(-1), operands["visible"].reshape(-1)
    picks = results[0].reshape(-1, call.scalars["topk"]).astype(np.int64)
    picks = np.where(picks < 0, picks, picks - offset[:, None])
    return judge_picks(picks, flat, visible, lower=backend.ties == "lower")


def judge_sample(call: Call, results: list[Host], backend: Backend) -> Verdict:
    """Greedy: the exact token. Otherwise a token whose share of the cumulative distribution holds
    the random number, give or take rounding. Of a row that nothing can be chosen from, -1.
    """
    operands = call.named()
    logits, got, uniform = operands["logits"].astype(np.float64), results[0], operands["uniform"]
    temperature, top_p = call.scalars["temperature"], call.scalars["top_p"]
    sound = np.isfinite(logits.max(-1, initial=-np.inf))
    if not sound.all():
        verdict = judge_exact(np.where(sound, -1, got), Expected(np.full(len(got), -1, np.int32), "int32"))
        if verdict.problems or not sound.any():
            return verdict
        logits, got, uniform = logits[sound], got[sound], uniform[sound]
    if temperature == 0 and backend.ties == "any":
        largest = np.take_along_axis(logits, np.clip(got, 0, logits.shape[1] - 1)[:, None].astype(np.int64), 1)[:, 0]
        return judge_exact(largest, Expected(logits.max(-1, initial=-np.inf), "float64"))
    if temperature == 0:
        return judge_exact(got, Expected(logits.argmax(-1).astype(np.int32), "int32"))
    verdict = Verdict()
    tokens, vocab = logits.shape
    if not tokens:
        return verdict
    if ((got < 0) | (got >= vocab)).any():
        at = place((got < 0) | (got >= vocab))
        return Verdict([f"token {list(at)} is {int(got[at])}, outside the vocabulary of {vocab}"], math.inf)
    scaled = logits / temperature
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")
    sorted_p = np.take_along_axis(p, order, -1)
    running = np.cumsum(sorted_p, -1)
    slack = (
        SAFETY * roundoff(backend.wide_dtype) * (np.sqrt(vocab) / 3 + np.abs(scaled).max(-1))
    )  # a sum of `vocab` terms; exp of the largest
    rank = np.take_along_axis(np.argsort(order, -1), got[:, None].astype(np.int64), -1)[:, 0]
    token = np.arange(tokens)
    upper, lower = running[token, rank], running[token, rank] - sorted_p[token, rank]
    fits = np.zeros(tokens, bool)
    for edge in (-slack, slack):  # rounding may take one token more or less into the prefix
        kept = np.minimum((running < top_p + edge[:, None]).sum(-1), vocab - 1)
        goal = uniform * running[token, kept]
        fits |= (rank <= kept) & (goal >= lower - slack) & (goal <= upper + slack)
    if not fits.all():
        t = int(np.argmin(fits))
        verdict.worst = {"element": [t], "got": int(got[t]), "budget": float(slack[t])}
        verdict.used = math.inf
        verdict.problems.append(
            f"{int((~fits).sum())} of {tokens} tokens cannot be what the random number selects; token {t}: got {int(got[t])}, whose share of the "
            f"cumulative distribution is {lower[t]:.7g} .. {upper[t]:.7g}; uniform {float(uniform[t]):.7g}, budget {slack[t]:.3g}"
        )
    return verdict


def judge_discrete(call: Call, results: list[Host], oracle: Oracle, backend: Backend) -> Verdict:
    """Judge an op that returns picks."""
    if call.op == "gate":
        return judge_gate(call, results, oracle, backend)
    if call.op == "sample":
        return judge_sample(call, results, backend)
    return judge_index(call, results, oracle, backend)
