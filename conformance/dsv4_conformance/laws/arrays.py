"""A backend's arrays: what it takes over, gives back and allocates is what it was given, for every
dtype that the graph has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4_conformance.check import Check, Finding, Group, Session
from dsv4_core.contract.dtypes import dtype_name, numpy_dtype

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics, Tier

SHAPES = ((0,), (1,), (7,), (5, 3), (0, 4), (2, 3, 4), (1, 1, 257), (4097, 3))
SPOILED = 3  # arrays that are filled and given up, so that an allocator has used memory to give


def wrong(backend: Backend, dtype: str) -> str:
    """Say what is wrong with arrays of a dtype, or nothing."""
    kind = numpy_dtype(dtype)
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        host = rng.integers(1, 100, shape).astype(kind)
        taken = backend.from_numpy(host.copy())
        for what, array, want in (
            ("from_numpy, then to_numpy", taken, host),
            ("the rows from the second on", taken[1:], host[1:]),
            ("zeros", backend.zeros(shape, dtype), np.zeros(shape, kind)),
        ):
            if dtype_name(array) != dtype or tuple(array.shape) != want.shape:
                return f"{what}: {dtype_name(array)}{list(array.shape)}; want {dtype}{list(want.shape)}"
            got = np.asarray(backend.to_numpy(array))
            if got.dtype != kind or np.ascontiguousarray(got).tobytes() != np.ascontiguousarray(want).tobytes():
                return f"{what} of {dtype}{list(want.shape)} gives other numbers than it was given"
        spoiled = [backend.from_numpy(np.full(shape, 99, kind)) for _ in range(SPOILED)]
        del spoiled
        if np.asarray(backend.to_numpy(backend.zeros(shape, dtype))).astype(np.float64).any():
            return f"zeros({list(shape)}, {dtype!r}) is not all zeros"
    return ""


@dataclass(frozen=True)
class Arrays:
    """The law for one dtype."""

    dtype: str
    op: str = "arrays"
    tier: Tier = "smoke"
    group: Group = "law"
    level: int = 0

    @property
    def id(self) -> str:
        """``arrays/DTYPE``."""
        return f"arrays/{self.dtype}"

    def run(self, session: Session) -> Finding:
        """Take over, give back, allocate."""
        finding = Finding(self.id, self.op, self.group, self.level, "passed", dtypes=self.dtype)
        if problem := wrong(session.backend, self.dtype):
            finding.status, finding.message, finding.used = "failed", problem, float("inf")
        return finding


def checks(numerics: Numerics) -> list[Check]:
    """The dtypes of the mode's arrays."""
    act = "bfloat16" if numerics == "native" else numerics
    wide = "float64" if numerics == "float64" else "float32"
    return [Arrays(dtype) for dtype in dict.fromkeys((act, wide, "float32", "int32", "uint8"))]
