"""Choosing tokens from rows of logits on the host: what ``sample_each`` is where a device has no
way of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host


def changed(logits: Host, ids: Host, added: Host, allowed: Host | None) -> Host:
    """Logits [tokens, vocab] with what ``sample_each`` adds to them and forbids."""
    x = np.array(logits)
    row, place = np.nonzero(ids >= 0)
    x[row, ids[row, place]] += added[row, place]
    if allowed is not None:
        bits = np.ascontiguousarray(allowed, "<i4").view(np.uint8)
        x[np.unpackbits(bits, axis=1, count=x.shape[1], bitorder="little") == 0] = -np.inf
    return x


def log_softmax(logits: Host) -> Host:
    """Log-probabilities of one row or many, [..., vocab], float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sample_each(
    logits: Host,
    uniform: Host,
    temperature: Host,
    top_p: Host,
    top_k: Host,
    min_p: Host,
    ids: Host,
    added: Host,
    allowed: Host | None,
    *,
    likely: int,
) -> tuple[Host, Host, Host, Host]:
    """The contract of that name, a row at a time; log-probabilities are float64."""
    tokens = len(logits)
    token, most = np.full(tokens, -1, np.int32), np.full((tokens, likely), -1, np.int32)
    logprob, logprobs = np.full(tokens, np.nan), np.full((tokens, likely), np.nan)
    x = changed(logits, ids, added, allowed)
    for t in range(tokens):
        if not (np.isfinite(logits[t].max()) and np.isfinite(x[t].max())):
            continue
        if temperature[t] == 0:
            token[t] = x[t].argmax()
        else:
            token[t] = _drawn(x[t].astype(np.float64), temperature[t], uniform[t], top_p[t], int(top_k[t]), min_p[t])
        told = log_softmax(logits[t])
        most[t] = top_ids(logits[t], likely)
        logprob[t], logprobs[t] = told[token[t]], told[most[t]]
    return token, logprob, most, logprobs


def _drawn(x: Host, temperature: float, uniform: float, top_p: float, top_k: int, min_p: float) -> int:
    order = np.argsort(-x, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp((x[order] - x[order[0]]) / temperature)
    running = np.cumsum(p)
    kept = min(int((running < top_p * running[-1]).sum()) + 1, len(order))
    kept = max(1, min(kept, int((p >= min_p).sum())))
    running = running[:kept]
    return int(order[min(int((running <= uniform * running[-1]).sum()), kept - 1)])


def top_ids(values: Host, count: int) -> Host:
    """Ids of the ``count`` largest of a row, descending, the lower id first on a tie."""
    if count == 0:
        return np.zeros(0, np.int64)
    least = np.partition(values, -count)[-count] if count < len(values) else -np.inf
    ids = np.flatnonzero(values >= least)
    return ids[np.argsort(-values[ids], kind="stable")][:count]
