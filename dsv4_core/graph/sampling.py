"""How a token is chosen from logits: one request's wishes, and the choice where the backend's
``sample`` is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dsv4_core.contract.dtypes import Host

MOST_LOGPROBS = 20  # likely ids that may be asked for beside the chosen one, as in OpenAI's protocol


COLDEST, HOTTEST = 1e-4, 1e4
"""Temperatures that sampling takes beside 0. Logits are divided by them in float32: 1e-4 leaves a
logit of 10^34 finite, and differs from greedy only where two logits agree to a thousandth. Above
1e4 no model's logits matter any more.
"""


@dataclass(frozen=True)
class Sampling:
    """``temperature = 0`` is greedy. A request's draws depend on its ``seed`` alone, never on its
    company.

    ``top_k`` (0: off), then ``top_p``, then ``min_p`` narrow the choice, after penalties, ``bias``
    (added to the logits of its ids) and temperature. ``presence_penalty`` is taken off the logit of
    each id that was generated already, ``frequency_penalty`` as often as it was. ``logprobs``: how
    many likely ids to report beside the chosen one (None: none, and no log-probability of the
    chosen one); they are the model's own, before all the above.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | tuple[int, ...] = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` naming a value outside its range."""
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy), or from {COLDEST} to {HOTTEST:g}")
        if isinstance(self.seed, int) and not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed = {self.seed} must be from 0 to 2^64 - 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be 0 (off) or more")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p = {self.min_p} must be in [0, 1)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} = {getattr(self, name)} must be in [-2, 2]")
        if any(not -100 <= value <= 100 for value in self.bias.values()):
            raise ValueError("a bias must be in [-100, 100]")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs = {self.logprobs} must be in 0 .. {MOST_LOGPROBS}")

    @property
    def by_backend(self) -> bool:
        """Whether the ``sample`` op alone serves it."""
        narrowed = self.top_k or self.min_p or self.presence_penalty or self.frequency_penalty or self.bias
        return not narrowed and self.logprobs is None


GREEDY = Sampling()


NO_NUMBER = (
    "`dsv4 inspect MODEL` finds weights that are no numbers, `dsv4 conformance localise MODEL` the op that makes them"
)


class NoNumberError(ValueError):
    """Logits that a token cannot be chosen by."""

    def __init__(self, token: int) -> None:
        """``token``: its place in the text, prompt included."""
        super().__init__(f"token {token} cannot be chosen: its logits hold NaN or infinity; {NO_NUMBER}")


class Constraint(Protocol):
    """What a request may say next, e.g. a grammar. It is asked before each token and told of each
    one.
    """

    def free(self) -> int:
        """How many of the next tokens may be any: ``allowed`` is not asked for them."""

    def allowed(self) -> Host:
        """Bits of the allowed ids, int32 [ceil(vocab / 32)], id ``32 i + j`` being bit j of element
        i.
        """

    def accept(self, token: int) -> None:
        """Note that the token was chosen."""


@dataclass(frozen=True)
class Chosen:
    """A token; its log-probability and the likely ids' (id, log-probability), where they were asked
    for.
    """

    token: int
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()


def choose(
    logits: Host, sampling: Sampling, uniform: float, generated: Mapping[int, int], allowed: Host | None = None
) -> Chosen:
    """Choose from one row of logits [vocab], in float64 on the host; rules as of the ``sample`` op
    (-1: nothing to choose by), and ``Sampling``.

    ``generated``: how often each id was generated. Raises ``ValueError`` where ``allowed`` allows
    nothing.
    """
    raw = np.asarray(logits, np.float64)
    if not np.isfinite(raw.max()):
        return Chosen(-1)
    x = raw.copy()
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = np.fromiter(generated.keys(), np.int64)
        counts = np.fromiter(generated.values(), np.float64)
        x[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.bias:
        x[np.fromiter(sampling.bias.keys(), np.int64)] += np.fromiter(sampling.bias.values(), np.float64)
    if allowed is not None:
        bits = np.unpackbits(np.ascontiguousarray(allowed, "<i4").view(np.uint8), bitorder="little")[: len(x)]
        if not bits.any():
            raise ValueError("the constraint allows no token")
        x[bits == 0] = -np.inf
    token = int(x.argmax()) if sampling.temperature == 0 else _drawn(x / sampling.temperature, sampling, uniform)
    return _reported(token, raw, sampling.logprobs)


def _drawn(x: Host, sampling: Sampling, uniform: float) -> int:
    order = np.argsort(-x, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(x[order] - x[order[0]])
    running = np.cumsum(p)
    kept = min(int((running < sampling.top_p * running[-1]).sum()) + 1, len(order))
    if sampling.min_p:
        kept = min(kept, int((p >= sampling.min_p).sum()))
    running = running[:kept]
    chosen = min(int((running <= uniform * running[-1]).sum()), kept - 1)
    return int(order[chosen])


def _reported(token: int, raw: Host, likely: int | None) -> Chosen:
    if likely is None:
        return Chosen(token)
    logprobs = log_softmax(raw)
    return Chosen(token, float(logprobs[token]), top_ids(logprobs, likely))


def log_softmax(logits: Host) -> Host:
    """Log-probabilities of one row or many, [..., vocab], float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def top_ids(logprobs: Host, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest ids of a row and their log-probabilities, the lower id first on a
    tie.
    """
    if count == 0:
        return ()
    least = np.partition(logprobs, -count)[-count] if count < len(logprobs) else -np.inf
    ids = np.flatnonzero(logprobs >= least)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:count]
    return tuple((int(i), float(logprobs[i])) for i in ids)


def packed_bits(ids: Sequence[int], vocab: int) -> Host:
    """The layout of ``Constraint.allowed`` for a set of ids."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")
