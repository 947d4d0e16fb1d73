"""How a token is chosen from logits: one request's wishes, and what the op ``sample_each`` is told
of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from dsv4_core.contract import choosing

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


@dataclass(frozen=True)
class Choice:
    """How one token is chosen: ``added`` to the logits of its ids (bias, penalties), of the
    ``allowed`` ids (as ``Constraint.allowed``). ``logprobs``: as of ``Sampling``.
    """

    sampling: Sampling
    uniform: float
    added: Mapping[int, float] = field(default_factory=dict)
    allowed: Host | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the largest of the logits is all that is asked for."""
        narrowed = self.added or self.allowed is not None or self.logprobs is not None
        return self.sampling.temperature == 0 and not narrowed

    def told(self, token: int, report: Sequence[float]) -> Chosen:
        """What was chosen. ``report``: of ``sample_each`` the log-probability, the likely ids,
        theirs.
        """
        if self.logprobs is None or token < 0:
            return Chosen(token)
        logprob, likely = report[0], (len(report) - 1) // 2
        pairs = zip(report[1 : 1 + likely], report[1 + likely :], strict=True)
        return Chosen(token, logprob, tuple((int(i), p) for i, p in pairs)[: self.logprobs])


def choice(sampling: Sampling, uniform: float, generated: Mapping[int, int], allowed: Host | None = None) -> Choice:
    """The choice of a request's next token. ``generated``: how often each id was. Raises
    ``ValueError`` where ``allowed`` allows nothing.
    """
    if allowed is not None and not allowed.any():
        raise ValueError("the constraint allows no token")
    added = dict(sampling.bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in generated.items():
            taken = sampling.presence_penalty + sampling.frequency_penalty * count
            added[token] = added.get(token, 0.0) - taken
    return Choice(sampling, uniform, added, allowed, sampling.logprobs)


Packed: TypeAlias = "tuple[Host, Host, Host, Host, Host, Host, Host, Host | None]"


def packed(choices: Sequence[Choice], vocab: int) -> Packed:
    """The operands of ``sample_each`` after the logits, one row a choice."""

    def wishes(name: str, kind: type = np.float32) -> Host:
        return np.array([getattr(each.sampling, name) for each in choices], kind)

    uniform = np.array([each.uniform for each in choices], np.float32)
    ids = np.full((len(choices), max(len(each.added) for each in choices)), -1, np.int32)
    added = np.zeros(ids.shape, np.float32)
    for i, each in enumerate(choices):
        count = len(each.added)
        ids[i, :count], added[i, :count] = list(each.added.keys()), list(each.added.values())
    allowed = None
    if any(each.allowed is not None for each in choices):
        everything = np.full(-(-vocab // 32), -1, np.int32)
        masks = [everything if each.allowed is None else each.allowed for each in choices]
        allowed = np.stack(masks).astype(np.int32)
    narrowing = wishes("top_p"), wishes("top_k", np.int32), wishes("min_p")
    return uniform, wishes("temperature"), *narrowing, ids, added, allowed


def drawn(logits: Host, one: Choice) -> int:
    """Choose from one row of logits [vocab] on the host, as ``sample_each`` does."""
    return int(choosing.sample_each(logits[None], *packed([one], len(logits)), likely=0)[0][0])


def packed_bits(ids: Sequence[int], vocab: int) -> Host:
    """The layout of ``Constraint.allowed`` for a set of ids."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")
