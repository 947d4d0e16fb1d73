"""A case: sizes and scalars that an op is tried with; each family of ops has its own in the file of
that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from dsv4_core.contract.spec import OpSpec, Tier


@dataclass(frozen=True)
class Case:
    """Sizes and scalars that an op is tried with; ``name`` says what the case would break.

    ``data`` names how the operands are filled, ``dtypes`` the format of weights that are not
    bfloat16 (``e4m3``, ``e2m1``, ``int8``, ``float32``), ``views`` whether operands are
    non-contiguous. A scalar ``"act"`` or ``"wide"`` stands for that dtype's name, a ``layout`` of
    ``"kv"`` ... for its RowLayout.
    """

    name: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    data: str = "normal"
    tier: Tier = "standard"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    views: bool = False

    def but(
        self,
        name: str,
        tier: Tier = "standard",
        *,
        data: str = "",
        dtypes: Mapping[str, str] | None = None,
        views: bool = False,
        **changes: Any,
    ) -> Case:
        """The same case but for ``changes`` of sizes and scalars."""
        sizes = {k: changes.get(k, v) for k, v in self.sizes.items()}
        scalars = {k: changes.get(k, v) for k, v in self.scalars.items()}
        if unknown := changes.keys() - sizes.keys() - scalars.keys():
            raise TypeError(f"case {name!r} changes {sorted(unknown)}, which {self.name!r} does not have")
        return Case(name, sizes, scalars, data or self.data, tier, {**self.dtypes, **(dtypes or {})}, views)

    def odd(self, axis: str = "tokens", *, sizes: tuple[int, ...] = (0, 1, 17, 33, 65, 129)) -> tuple[Case, ...]:
        """No row, one, a prime, and one past each block that kernels are tiled by."""
        return tuple(
            self.but(f"{axis}={n}", "smoke" if n == 1 else "standard", **cast("dict[str, Any]", {axis: n}))
            for n in sizes
        )


def cases_of(spec: OpSpec) -> tuple[Case, ...]:
    """Cases of an op: the function of its name in this room's file of its family."""
    family = import_module(f"dsv4_conformance.cases.{spec.family}")
    return cast("tuple[Case, ...]", getattr(family, spec.name)())
