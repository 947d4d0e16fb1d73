"""One call of an op: its operands on the host, and what a backend makes of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.verdict.guard import Guarded, GuardedWeight
from dsv4_core.contract.dtypes import Experts, Host, RowLayout, ScaledArray, dtype_name
from dsv4_core.contract.spec import OPS, OpSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dsv4_core.contract.backend import Backend

LOADED = frozenset(
    {"weight", "w1", "w2", "w3", "fn", "scale", "base", "ape", "attn_sink", "bias", "tid2eid", "wkv", "wgate"}
)
"""Operands that the graph gets through ``Backend.load``: tensors of the checkpoint."""

SAMPLED = 1 << 28  # bytes of an operand of which the shape alone is hashed: caches past 2^31 bytes
MAY_ALIAS = frozenset({"concat", "act_qdq"})  # their contracts: a single part as it is; y = x in the exact modes


def seed_of(case_id: str, repeat: int = 0) -> int:
    """One stable seed per case: adding a case changes no other."""
    return int.from_bytes(hashlib.sha256(f"{case_id}#{repeat}".encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Call:
    """An op with operands on the host, in the order of its signature."""

    op: str
    operands: Sequence[Any]
    scalars: Mapping[str, Any]
    views: bool = False
    seed: int = 0

    @property
    def spec(self) -> OpSpec:
        """The op's contract."""
        return OPS[self.op]

    def named(self) -> dict[str, Any]:
        """Operands by name."""
        return dict(zip(self.spec.arrays, self.operands, strict=True))


@dataclass
class Outcome:
    """What a backend returned: results on the host and what is wrong with their form."""

    results: list[Host] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def hashed(call: Call) -> str:
    """A hash of the operands and scalars, the same wherever the call is made: 16 hexadecimal
    digits.
    """
    digest = hashlib.blake2b(f"{call.op} {sorted(call.scalars.items())!r}".encode(), digest_size=8)

    def add(name: str, operand: Any) -> None:
        if isinstance(operand, Experts):
            for e in range(operand.shape[0]):
                add(f"{name}[{e}]", operand[e])
        elif isinstance(operand, ScaledArray):
            add(f"{name}.data", operand.data)
            add(f"{name}.scale", operand.scale)
        elif isinstance(operand, (list, tuple)):
            for i, part in enumerate(operand):
                add(f"{name}[{i}]", part)
        elif operand is None or operand.nbytes > SAMPLED:
            digest.update(f"{name} {None if operand is None else operand.shape}".encode())
        else:
            digest.update(f"{name} {operand.dtype} {operand.shape}".encode())
            digest.update(operand.tobytes())

    for name, operand in call.named().items():
        add(name, operand)
    return digest.hexdigest()


def copied(operand: Any) -> Any:
    """Copy a mutable operand, so that a call leaves the original as it is."""
    return operand.copy() if isinstance(operand, np.ndarray) else operand


def result_dtype(call: Call, index: int, backend: Backend) -> str:
    """The dtype name that the contract demands of result ``index``."""
    spec = call.spec
    kind = spec.dtypes.get(f"return.{index}", spec.dtypes.get("return", ""))
    operands = call.named()
    layout = call.scalars.get("layout")
    if kind == "row":
        plain = isinstance(layout, RowLayout) and layout.kind == "plain"
        return dtype_name(operands["cache"]) if plain else backend.activation_dtype
    if kind == "parts":
        return dtype_name(operands["parts"][0])
    if kind == "cache":
        return dtype_name(operands["cache"])
    named = {
        "act": backend.activation_dtype,
        "wide": backend.wide_dtype,
        "out_dtype": str(call.scalars.get("out_dtype")),
    }
    return named.get(kind, kind)


def place(
    backend: Backend,
    name: str,
    operand: Any,
    array: Callable[[str, Host], Any],
    weight: Callable[[str, Host], Host] = lambda _, tensor: tensor,
) -> Any:
    """Hand an operand over as the graph does: tensors of the checkpoint (through ``weight``) by
    ``Backend.load``, others by ``array``.
    """

    def tensors(part: Any) -> Any:
        if isinstance(part, ScaledArray):
            return ScaledArray(weight(name, part.data), weight(f"{name}.scale", part.scale), part.format)
        return weight(name, part)

    if operand is None:
        return None
    if isinstance(operand, Experts):
        return backend.load_experts(Experts([tensors(operand[e]) for e in range(operand.shape[0])]))
    if isinstance(operand, ScaledArray) or name in LOADED:
        return backend.load(tensors(operand))
    if isinstance(operand, (list, tuple)):
        return [place(backend, f"{name}[{i}]", part, array, weight) for i, part in enumerate(operand)]
    return array(name, operand)


def execute(call: Call, backend: Backend, shapes: Sequence[tuple[int, ...]]) -> Outcome:
    """Run a call on a backend, guarded; ``shapes`` are those that the oracle's results have.
    Exceptions of the op pass through.
    """
    guards: list[Guarded] = []
    weights: list[GuardedWeight] = []

    def guarded(name: str, operand: Host) -> Any:
        guards.append(Guarded(backend, name, operand, view=call.views))
        return guards[-1].array

    def weight(name: str, tensor: Host) -> Host:
        weights.append(GuardedWeight(name, tensor))
        return weights[-1].array

    placed = [place(backend, name, operand, guarded, weight) for name, operand in call.named().items()]
    returned = getattr(backend, call.op)(*placed, **call.scalars)
    outcome = Outcome()
    results = as_tuple(call, returned, outcome)
    for i, result in enumerate(results):
        _take(call, i, result, backend, shapes, [*guards, *weights], outcome)
    for guard in guards:
        mutable = guard.name in call.spec.mutates
        outcome.problems += guard.problems(mutable=mutable)
    for tensor in weights:
        outcome.problems += tensor.problems()
    return outcome


def as_tuple(call: Call, returned: Any, outcome: Outcome) -> Sequence[Any]:
    """What an op returned as a sequence; a form that is not the contract's becomes a problem of
    ``outcome``.
    """
    expected = call.spec.returns
    if returned is None:
        outcome.problems.append(f"returned None; the contract returns {_form(call)}")
        return ()
    if len(expected) == 1:
        return (returned,)
    if not isinstance(returned, (tuple, list)) or len(returned) != len(expected):
        got = f"{len(returned)} results" if isinstance(returned, (tuple, list)) else type(returned).__name__
        outcome.problems.append(f"returned {got}; the contract returns {_form(call)}")
        return ()
    return tuple(returned)


def _form(call: Call) -> str:
    return ", ".join(f"[{axes}]" for axes in call.spec.returns)


def _take(
    call: Call,
    index: int,
    result: Any,
    backend: Backend,
    shapes: Sequence[tuple[int, ...]],
    guards: Sequence[Guarded | GuardedWeight],
    outcome: Outcome,
) -> None:
    where = f"result {index}" if len(call.spec.returns) > 1 else "result"
    if result is None or not hasattr(result, "dtype"):
        what = "None" if result is None else f"a {type(result).__name__}"
        outcome.problems.append(f"{where} is {what}; the contract returns an array [{call.spec.returns[index]}]")
        return
    wanted, got = result_dtype(call, index, backend), dtype_name(result)
    if got != wanted:
        outcome.problems.append(f"{where} has dtype {got}; the contract says {wanted}")
    if tuple(result.shape) != tuple(shapes[index]):
        outcome.problems.append(
            f"{where} has shape {list(result.shape)}; the contract says {list(shapes[index])} [{call.spec.returns[index]}]"
        )
    host = np.asarray(backend.to_numpy(result))
    if call.op not in MAY_ALIAS and not call.spec.mutates:
        outcome.problems += [
            f"{where} shares memory with operand {g.name!r}; a caller that changes one changes the other, return a copy"
            for g in guards
            if host.size and g.aliased_by(host)
        ]
    outcome.results.append(host.copy())


def operand_summary(call: Call) -> dict[str, str]:
    """Dtype and shape of every operand, for reports."""

    def form(value: Any) -> str:
        if value is None:
            return "None"
        if isinstance(value, (list, tuple)):
            return ", ".join(form(v) for v in value)
        return f"{dtype_name(value)}{list(value.shape)}"

    return {name: form(value) for name, value in call.named().items()}
