"""What error the contract allows each element of a result.

    budget = half a unit of the output format
           + SAFETY * (largest of SAMPLES random-rounding deviations of the oracle
                       + one unit roundoff of the wide format)

The deviations contain the case's own sensitivity: conditioning, cancellation, declared narrower
intermediates. Elementwise arithmetic after the last sum rounds in the wide format too: that is the
last term. What fails by ``SAMPLES`` is judged by ``BEFORE_FAILING``. ``SAFETY`` is one number for
every op, backend and dtype; the experiment behind it is ``docs/safety-factor.md``, which
``dsv4_conformance.museum.pages`` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from dsv4_conformance.verdict.calls import Call, copied, result_dtype
from dsv4_core.contract.dtypes import Host, numpy_dtype

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.registry import Oracle

SAFETY = 4.0
ORACLES_OWN = 1.0  # unit: in float64 the oracle's own arithmetic is no wider than the backend's
SAMPLES = 16  # the largest of 16 normal deviations is under a third of its scale in one element of 12 million
BEFORE_FAILING = 64  # samples that a failure is judged by: inside a fused op a rare step of a grid may decide


@dataclass(frozen=True)
class Expected:
    """The exact result of one output, and per element what a backend may be off. ``spread`` is the
    oracle's largest deviation.
    """

    value: Host
    dtype: str
    budget: Host | None = None
    spread: Host | None = None
    noise: Host | None = None
    """What the safety factor multiplies."""
    flushed: Host | None = None
    """Of an exact result: what comes of flushed operands, which a backend that declares so may
    return.
    """
    least: float = 0.0
    """How far an exact number may be off where subnormals are flushed."""


def unit(magnitude: Host, dtype: str) -> Host:
    """The spacing of ``dtype`` at each magnitude (float64)."""
    info = ml_dtypes.finfo(numpy_dtype(dtype))  # type: ignore[no-untyped-call]
    _, exponent = np.frexp(magnitude)
    return np.ldexp(1.0, np.maximum(exponent, int(info.minexp) + 1) - 1 - int(info.nmant))


def roundoff(dtype: str) -> float:
    """Unit roundoff: half the spacing at one."""
    return float(2.0 ** -(int(ml_dtypes.finfo(numpy_dtype(dtype)).nmant) + 1))  # type: ignore[no-untyped-call]


def smallest(dtype: str) -> float:
    """The least normal number: results below it may be flushed to zero, as accelerators do."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_normal)  # type: ignore[no-untyped-call]


def allowance(value: Host, spread: Host, dtype: str, wide: str) -> tuple[Host, Host]:
    """The budget formula of the module docstring, and the part of it that the safety factor
    multiplies.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        own = ORACLES_OWN if wide == "float64" else 0.0
        noise = spread + (1 + own) * roundoff(wide) * np.abs(value)
        outer = unit(np.where(np.isfinite(value), np.abs(value) + SAFETY * noise, 0), dtype) / 2
        return np.asarray(SAFETY * noise + outer + smallest(dtype)), np.asarray(noise)


def deviations(exact: Host, perturbed: list[Host]) -> Host:
    """The largest deviation of perturbed results per element."""
    spread = np.zeros(np.shape(exact))
    with np.errstate(invalid="ignore"):
        for sample in perturbed:
            np.fmax(spread, np.abs(sample - exact), out=spread)
    return spread


def expect(call: Call, oracle: Oracle, backend: Backend, samples: int = SAMPLES) -> list[Expected]:
    """Evaluate a call by the oracle: one ``Expected`` per result."""
    spec = call.spec
    rounded = "rounded" in spec.judged
    operands = [copied(o) if n in spec.mutates else o for n, o in call.named().items()]
    with np.errstate(all="ignore"):
        exact, perturbed = oracle.evaluate(
            call.op, operands, call.scalars, samples=samples if rounded else 0, seed=call.seed % 2**32
        )
    values = exact if isinstance(exact, tuple) else (exact,)
    found = []
    for i, value in enumerate(values):
        dtype = result_dtype(call, i, backend)
        if spec.judged[i] != "rounded":
            found.append(Expected(np.asarray(value).astype(numpy_dtype(dtype)), dtype))
            continue
        spread = deviations(value, [p[i] if isinstance(p, tuple) else p for p in perturbed])
        budget, noise = allowance(value, spread, dtype, backend.wide_dtype)
        found.append(Expected(value, dtype, budget, spread, noise))
    return found
