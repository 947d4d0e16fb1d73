"""How a wrong backend is made: the right one with one op replaced by a function that is given the
right op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv4_core.contract.backend import Backend
from dsv4_core.contract.spec import OPS

Op = Callable[..., Any]
Fault = Callable[..., Any]
"""``fault(backend, right, *operands, **scalars)``: the wrong op; ``right`` is the bound right
one.
"""


@dataclass(frozen=True)
class Mutant:
    """A backend with one fault. ``seen``: where such a fault was met, or why it is likely."""

    name: str
    seen: str
    faults: dict[str, Fault] = field(default_factory=dict)
    numeric: bool = True
    """Whether results are off by an amount (the safety factor's experiment counts these)."""

    def build(self, base: type[Backend]) -> type[Backend]:
        """The class: ``base`` with the faults in it."""
        return altered(base, self.name, self.faults)


MUTANTS: dict[str, Mutant] = {}


def altered(base: type[Backend], name: str, replaced: dict[str, Fault], **attributes: Any) -> type[Backend]:
    """Subclass ``base`` with some ops (or internal steps) replaced."""
    members = {op: _method(base, op, fault) for op, fault in replaced.items()}
    return type(name, (base,), {**members, **attributes, "__doc__": name})


def _method(base: type[Backend], op: str, fault: Fault) -> Op:
    original = getattr(base, op)

    @functools.wraps(original)
    def method(self: Any, *operands: Any, **scalars: Any) -> Any:
        return fault(self, functools.partial(original, self), *operands, **scalars)

    if op in OPS:
        method.__signature__ = OPS[op].signature  # type: ignore[attr-defined]  # the contract's, which the class is held to
    return method


def mutant(*ops: str, seen: str, name: str = "", numeric: bool = True) -> Callable[[Fault], Fault]:
    """Register a fault of ``ops``. Several functions with one ``name`` make one mutant."""

    def register(fault: Fault) -> Fault:
        key = name or fault.__name__
        known = MUTANTS.setdefault(key, Mutant(key, seen, {}, numeric))
        known.faults.update(dict.fromkeys(ops, fault))
        return fault

    return register
