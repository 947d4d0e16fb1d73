"""Recording a model's run: every call of an op with its operands and results on the host, by step
and layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.check import describe
from dsv4_conformance.verdict.calls import Call, Outcome, as_tuple, result_dtype, seed_of
from dsv4_core.checkpoint.source import WeightSource
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray, dtype_name
from dsv4_core.contract.spec import OPS
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Block, Model
from dsv4_core.graph.step import Fed, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Array


@dataclass(frozen=True)
class Recorded:
    """One call: when (``prefill``, ``decode250``), where (``layer3``, ``embedding``, ``head``),
    which of its kind there.

    ``results``: what the backend returned. ``positions``: of the step's tokens,
    -1 for padding.
    """

    time: str
    place: str
    number: int
    call: Call
    results: list[Host]
    positions: Host
    parts: int = 0
    """How many calls of other ops were made inside it."""

    @property
    def name(self) -> str:
        """As in the recorded traces: ``decode250.layer3.rms_norm``; later calls of an op in a layer
        count from ``@2``.
        """
        return f"{self.time}.{self.place}.{self.call.op}" + (f"@{self.number}" if self.number > 1 else "")


class UnknownOperandError(LookupError):
    """A weight in a form of the backend's own: the call that was given it is not recorded."""


@dataclass
class Recorder:
    """Stands between a backend and everything that calls its ops, the backend itself included
    (fused ops made of required ones).

    ``keep(time, place)`` chooses what is recorded.
    """

    backend: Backend
    keep: Callable[[str, str], bool] = lambda time, place: True  # noqa: ARG005
    calls: list[Recorded] = field(default_factory=list)
    time: str = "prefill"
    place: str = "embedding"
    positions: Host = field(default_factory=lambda: np.zeros(0, np.int64))
    under_way: str = ""
    """The op called last."""
    ended: str = ""
    """What ended the run before its time; empty if nothing did."""
    known: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Weights on the backend, by id, with what they were made of."""
    _counts: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def __enter__(self) -> Recorder:  # noqa: PYI034  typing.Self is younger than Python 3.10
        for name in OPS:
            setattr(self.backend, name, self._recording(name, getattr(self.backend, name)))
        for name in ("load", "load_experts"):
            setattr(self.backend, name, self._loading(getattr(self.backend, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*OPS, "load", "load_experts"):
            delattr(self.backend, name)

    def _loading(self, load: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def loading(weight: Any) -> Any:
            loaded = load(weight)
            self.known[id(loaded)] = (loaded, weight)
            return loaded

        return loading

    def _recording(self, op: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def recording(*operands: Any, **scalars: Any) -> Any:
            self.under_way = op
            if not self.keep(self.time, self.place):
                return method(*operands, **scalars)
            try:
                before = [self.host(o) for o in operands]
            except UnknownOperandError:
                return method(*operands, **scalars)
            earlier = len(self.calls)
            returned = method(*operands, **scalars)
            results = self.formed(Call(op, before, scalars), returned)
            hosts = [self.host(r) for r in results]
            parts = len(self.calls) - earlier
            self.finished(self.add(op, before, scalars, hosts, parts), operands, results)
            return returned

        return recording

    def formed(self, call: Call, returned: Any) -> Sequence[Any]:
        """What was returned, as a sequence; raise ``TypeError`` where it has not the contract's
        form, for later ops fail over it.
        """
        outcome = Outcome()
        results = as_tuple(call, returned, outcome)
        for i, result in enumerate(results):
            wanted, got = result_dtype(call, i, self.backend), dtype_name(result)
            if got != wanted:
                outcome.problems.append(f"result {i} has dtype {got}; the contract says {wanted}")
        if outcome.problems:
            raise TypeError("; ".join(outcome.problems))
        return results

    def finished(self, recorded: Recorded, operands: Sequence[Any], returned: Sequence[Any]) -> None:
        """What more is done with a call that is over, its operands and results on the backend;
        nothing here.
        """

    def add(
        self, op: str, operands: list[Any], scalars: dict[str, Any], results: list[Host], parts: int = 0
    ) -> Recorded:
        """Note a call that is over."""
        key = (self.time, self.place, op)
        self._counts[key] = number = self._counts.get(key, 0) + 1
        seed = seed_of(".".join((*key, str(number))))
        recorded = Recorded(
            self.time, self.place, number, Call(op, operands, scalars, seed=seed), results, self.positions, parts
        )
        self.calls.append(recorded)
        return recorded

    def host(self, operand: Any) -> Any:
        """A weight as it came from the checkpoint, an array as a copy on the host."""
        if operand is None:
            return None
        if (known := self.known.get(id(operand))) is not None:
            return known[1]
        if isinstance(operand, (list, tuple)):
            return [self.host(part) for part in operand]
        if isinstance(operand, (ScaledArray, Experts)):
            raise UnknownOperandError
        return np.array(self.backend.to_numpy(operand))


class TracedModel(Model):
    """Tells a recorder which layer runs."""

    def __init__(self, source: WeightSource, recorder: Recorder) -> None:
        self.recorder = recorder
        super().__init__(source, recorder.backend)

    def forward(self, step: Fed, taps: list[Array] | None = None) -> Array:
        """As the model's, from ``embedding`` to ``head``."""
        self.recorder.place = "embedding"
        h = super().forward(step, taps)
        self.recorder.place = "head"
        return h

    def block(self, block: Block, h: Array, step: Fed) -> Array:
        """As the model's, in ``layer{i}``."""
        self.recorder.place = f"layer{block.index}"
        return super().block(block, h, step)


def record(source: WeightSource, recorder: Recorder, tokens: Host, decode: int) -> list[Recorded]:
    """Run ``tokens`` [batch, total], the last ``decode`` of them one by one; give the calls in the
    order in which they end. What the backend raises ends the run, and is noted in
    ``recorder.ended``.
    """
    try:
        _record(source, recorder, tokens, decode)
    except Exception as error:  # noqa: BLE001  whatever the backend raises is its result
        recorder.ended = f"op {recorder.under_way}, {recorder.place}, {recorder.time}: {describe(error)}"
    return recorder.calls


def _record(source: WeightSource, recorder: Recorder, tokens: Host, decode: int) -> None:
    total = tokens.shape[1]
    with recorder:
        model = TracedModel(source, recorder)
        cache = Cache(recorder.backend, source.config, len(tokens), total, rewindable=0)
        begin = 0
        for n in (total - decode, *[1] * decode):
            recorder.time = f"decode{begin}" if begin else "prefill"
            step = Step(cache, tokens[:, begin : begin + n])
            recorder.positions = step.host_positions.reshape(-1)
            model.logits(model.forward(step))
            cache.advance(step.sequences, step.ends)
            begin += n
