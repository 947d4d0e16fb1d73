"""Picks, judged by the scores behind them: another pick is an error only if the scores' own budget
cannot explain it.

Where the scores leave no doubt (sums that every order computes exactly, scores that are operands),
ties follow the published rule: the lower index.
"""

from __future__ import annotations

import itertools
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
    every, none = np.ones(len(logits)), np.zeros(len(logits), int)
    wishes = Wishes(temperature * every, top_p * every, none, none, uniform)
    return judge_drawn(got, logits, wishes, backend, by_share=True)


@dataclass(frozen=True)
class Wishes:
    """How each row is to be drawn: [rows] each, ``top_k`` 0 for all."""

    temperature: Host
    top_p: Host
    top_k: Host
    min_p: Host
    uniform: Host


def judge_drawn(got: Host, x: Host, wishes: Wishes, backend: Backend, *, by_share: bool = False) -> Verdict:
    """Tokens drawn from logits [rows, vocab] in float64, each row with a finite largest one: each
    token's share of the cumulative distribution holds the random number, give or take rounding.

    ``by_share``: probabilities are sorted and not logits, so that those which rounding makes equal,
    as a high temperature does, may stand in any order.
    """
    verdict = Verdict()
    tokens, vocab = x.shape
    if not tokens:
        return verdict
    if ((got < 0) | (got >= vocab)).any():
        at = place((got < 0) | (got >= vocab))
        return Verdict([f"token {list(at)} is {int(got[at])}, outside the vocabulary of {vocab}"], math.inf)
    got, largest = got.astype(np.int64), x.max(-1, keepdims=True)
    order = np.argsort(-x, axis=-1, kind="stable")
    cut = np.where(wishes.top_k > 0, np.minimum(wishes.top_k, vocab), vocab)
    sorted_x = np.take_along_axis(x, order, -1)
    sorted_p = np.exp((sorted_x - largest) / wishes.temperature[:, None].astype(np.float64))
    sorted_p[np.arange(vocab) >= cut[:, None]] = 0
    share = sorted_p / sorted_p.sum(-1, keepdims=True)
    running = np.cumsum(share, -1)
    finite = np.where(np.isfinite(x), np.abs(x), 0).max(-1) / wishes.temperature
    slack = (
        SAFETY * roundoff(backend.wide_dtype) * (np.sqrt(vocab) / 3 + finite)
    )  # a sum of `vocab` terms; exp of the largest
    rank = np.take_along_axis(np.argsort(order, -1), got[:, None], -1)[:, 0]
    token, behind = np.arange(tokens), np.arange(vocab) - rank[:, None]
    same = sorted_x == x[token, got][:, None]
    movable = same if backend.ties == "any" else np.zeros_like(same)  # it may stand anywhere among these
    if by_share:
        own, near = sorted_p[token, rank], SAFETY * roundoff(backend.wide_dtype) * (1 + finite)
        movable = movable | ~same & (np.abs(sorted_p - own[:, None]) <= (near * own)[:, None])
    first, last = rank - (movable & (behind < 0)).sum(-1), rank + (movable & (behind > 0)).sum(-1)
    upper, lower = running[token, last], running[token, first] - share[token, first]
    fits = np.zeros(tokens, bool)
    for edge, least in itertools.product((-slack, slack), (-slack, slack)):  # rounding may take one token more or less
        prefix = (running < (wishes.top_p + edge)[:, None]).sum(-1) + 1
        likely = (sorted_p >= (wishes.min_p * (1 + least))[:, None]).sum(-1)
        kept = np.maximum(np.minimum(np.minimum(prefix, likely), cut), 1) - 1
        goal = wishes.uniform * running[token, kept]
        fits |= (first <= kept) & (goal >= lower - slack) & (goal <= upper + slack)
    fits &= np.isfinite(x[token, got])
    if not fits.all():
        t = int(np.argmin(fits))
        verdict.worst = {"element": [t], "got": int(got[t]), "budget": float(slack[t])}
        verdict.used = math.inf
        verdict.problems.append(
            f"{int((~fits).sum())} of {tokens} tokens cannot be what the random number selects; token {t}: got {int(got[t])}, whose share of the "
            f"cumulative distribution is {lower[t]:.7g} .. {upper[t]:.7g}; uniform {float(wishes.uniform[t]):.7g}, budget {slack[t]:.3g}"
        )
    return verdict


def judge_sample_each(call: Call, results: list[Host], backend: Backend) -> Verdict:
    """Tokens by the logits as they are changed, in the wide dtype, so that every comparison of two
    is exact; likely ids by those that were given; log-probabilities within their rounding.
    """
    o, wide = call.named(), backend.wide_dtype
    token, logprob, most, logprobs = results
    given = o["logits"]
    x, vocab = given.copy(), given.shape[1]
    for row, ids, added in zip(x, o["ids"], o["added"], strict=True):
        row[ids[ids >= 0]] += added[ids >= 0].astype(row.dtype)
    if o["allowed"] is not None:
        v = np.arange(vocab)
        x[o["allowed"][:, v // 32] >> (v % 32) & 1 == 0] = -np.inf
    x, raw = x.astype(np.float64), given.astype(np.float64)
    sound = np.isfinite(raw.max(-1, initial=-np.inf)) & np.isfinite(x.max(-1, initial=-np.inf))
    for name, got, none in (("token", token, -1), ("likely", most, -1)):
        verdict = judge_exact(got[~sound], Expected(np.full(got[~sound].shape, none, np.int32), "int32"))
        if not verdict.ok:
            verdict.problems = [f"{name} of a row that cannot be chosen from: {p}" for p in verdict.problems]
            return verdict
    likely = call.scalars["likely"]
    best = np.argsort(-raw, axis=-1, kind="stable")[:, :likely]
    greedy, verdict = sound & (o["temperature"] == 0), Verdict()
    first = x.argmax(-1)
    if backend.ties == "any":
        taken = np.clip(token, 0, vocab - 1)
        first = np.where(np.take_along_axis(x, taken[:, None], 1)[:, 0] == x.max(-1, initial=-np.inf), token, first)
        values = np.take_along_axis(raw, np.clip(most, 0, vocab - 1).astype(np.int64), 1)
        distinct = [len(set(line)) == likely for line in most.tolist()]
        equal = (values == np.take_along_axis(raw, best, 1)).all(-1) & np.array(distinct, bool)
        best = np.where(equal[:, None], most, best)
    for name, got, want in (("token", token[greedy], first[greedy]), ("likely", most[sound], best[sound])):
        verdict.add(judge_exact(got, Expected(want.astype(np.int32), "int32")), f"{name}: ")
    drawn = sound & ~greedy
    wishes = Wishes(*(o[name][drawn] for name in ("temperature", "top_p", "top_k", "min_p", "uniform")))
    verdict.add(judge_drawn(token[drawn], x[drawn], wishes, backend), "token: ")
    if not verdict.ok:
        return verdict
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        largest = np.where(sound, raw.max(-1, initial=-np.inf), 0)[:, None]
        total = np.log(np.exp(raw - largest).sum(-1, keepdims=True))
        told = np.where(sound[:, None], raw - largest - total, np.nan)
    for name, got, ids in (("logprob", logprob[:, None], token[:, None]), ("likely_logprobs", logprobs, most)):
        at = np.clip(ids, 0, vocab - 1).astype(np.int64)
        value = np.take_along_axis(told, at, 1)
        logit = np.take_along_axis(raw, at, 1)
        size = (
            np.sqrt(vocab) / 3 + np.abs(largest) + sum(np.where(np.isfinite(z), np.abs(z), 0) for z in (logit, value))
        )
        spread = roundoff(wide) * size  # the sum's terms, their logarithm, two subtractions
        verdict.add(judge_rounded(got, Expected(value, wide, SAFETY * spread, spread)), f"{name}: ")
    return verdict


def judge_discrete(call: Call, results: list[Host], oracle: Oracle, backend: Backend) -> Verdict:
    """Judge an op that returns picks."""
    if call.op == "gate":
        return judge_gate(call, results, oracle, backend)
    if call.op == "sample":
        return judge_sample(call, results, backend)
    if call.op == "sample_each":
        return judge_sample_each(call, results, backend)
    return judge_index(call, results, oracle, backend)
