"""The oracle: the reference's own code in float64, results unrounded, and the same with random
rounding where the contract rounds.

The spread of the perturbed results is a case's sensitivity to rounding, element by element. The
noise, each kind from the contract:

- every sum (``dot``, ``total``): adding n terms one after another in a format of unit roundoff u
  errs with standard deviation ``u * sqrt(n) / 3 * sum|terms|`` when the partial sums grow evenly
  (each rounding contributes u / sqrt(3)), and no order is worse; 2u more for the products,
  divisions and exponentials around the sum;
- every operand on its way in: a relative 2u, which stands for the elementwise roundings that follow
  it (a dozen of them: sqrt(12) u / sqrt(3));
- every rounding between the required ops of a fused one: stochastic, to the format that the
  contract rounds to there (and in one more sample, to nearest and without any other noise, as the
  default composition does). Where such a result is quantised, its block's largest value may lie so
  near a power of two that its roundings decide the scale of the whole block: samples lean to either
  side in turn;
- cosines and sines: an absolute u (range reduction leaves no relative accuracy near their zeros).

What a backend declares narrower replaces u, or adds a rounding, where it declares it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_backend_reference.backend import ReferenceBackend
from dsv4_backend_reference.quant import scale_bytes
from dsv4_core.contract.dtypes import (
    E8M0_VALUES,
    FP8_BLOCK,
    Experts,
    Format,
    Host,
    ScaledArray,
    numpy_dtype,
    round_to_grid,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dsv4_core.contract.spec import Numerics

FP8_PARTIAL_UNIT = 2.0**-14  # tensor cores that align FP8 products keep about 14 bits until they are promoted
ELEMENTWISE = 2.0  # units: see above
LEAST_NORMAL = 2.0**-126  # of float32
LARGEST_EXPONENT = 88.0  # exp of more leaves float32's range, give or take its rounding
LEAN = 3 * 2.0**-8  # how far three roundings to bfloat16 (gate, up and their product) can move a block's largest value
PRECISION = {"bfloat16": 8, "float32": 24, "float64": 53}  # significant bits


def stochastic(x: Host, dtype: str, rng: np.random.Generator) -> Host:
    """Round float64 values to one of the two neighbours in ``dtype``, up with the probability that
    makes the mean right.
    """
    _, exponent = np.frexp(x)
    unit = np.ldexp(
        1.0, np.maximum(exponent, -125) - PRECISION[dtype]
    )  # -125: the least normal numbers of bfloat16 and float32
    return np.floor(x / unit + rng.random(x.shape, np.float32)) * unit


def lowest_bit(x: Host) -> float:
    """The largest power of two that divides every element of ``x`` (infinity for zeros)."""
    x = x[x != 0]
    mantissa, exponent = np.frexp(x)
    digits = (mantissa * 2.0**53).astype(np.int64)
    return float(np.min(np.ldexp((digits & -digits).astype(np.float64), exponent - 53), initial=np.inf))


def summed_exactly(a: Host, b: Host, magnitude: Host, unit: float) -> bool:
    """Say whether every order of summation gives ``a @ b`` exactly: all partial sums are multiples
    of one bit and fit the format.
    """
    few = a.reshape(-1)[:256], b.reshape(-1)[:256]  # enough to dismiss all but data made for it
    return all(magnitude.max(initial=0) <= lowest_bit(left) * lowest_bit(right) / unit for left, right in (few, (a, b)))


def scale_of_sum(unit: float, n: int) -> float:
    """Of the error of a sum of n terms, relative to the sum of their magnitudes."""
    return float(unit * (ELEMENTWISE + np.sqrt(n) / 3))


def swallowed(x: Host, axis: int, unit: float) -> Host:
    """What a running total never takes up, in units of the noise's scale: terms below its roundoff,
    which are lost one and all where they come after a large one.
    """
    magnitude = np.abs(x)
    lost = np.where(magnitude < unit * magnitude.sum(axis, keepdims=True), magnitude, 0).sum(axis, keepdims=True)
    return np.asarray(lost / scale_of_sum(unit, x.shape[axis]))


class Oracle(ReferenceBackend):
    """Evaluates an op in float64, alone and perturbed. ``narrower``: as a backend declares it."""

    def __init__(self, *, numerics: Numerics = "native", narrower: Mapping[str, tuple[str, ...]] | None = None) -> None:
        super().__init__(numerics=numerics, weight_cache=1 << 29)
        self.declared = dict(narrower or {})
        self.unit = 2.0**-53 if numerics == "float64" else 2.0**-24
        self.rng: np.random.Generator | None = None
        self.partial: float | None = None  # unit of partial sums within 128 channels, where declared
        self.op = ""  # under evaluation
        self.elementwise = True
        self.nearest = False
        self.lean = 1.0
        self.between: list[Host] = []  # what was rounded between the parts of the fused op under way
        self.magnitudes: list[Host | None] = []
        self.sums = self.roundings = self.final = 0

    @property
    def wide_dtype(self) -> str:
        """Everything inside ops is float64."""
        return "float64"

    @property
    def activation_dtype(self) -> str:
        """The format that fused ops round to between their parts."""
        return "bfloat16" if self.numerics == "native" else self.numerics

    def evaluate(
        self, op: str, operands: Sequence[Any], scalars: Mapping[str, Any], *, samples: int, seed: int
    ) -> tuple[Any, list[Any]]:
        """Give the op's exact result and ``samples`` perturbed ones."""
        self.op, call = op, getattr(self, op)
        self.rng, self.roundings, self.magnitudes = None, 0, []
        exact = call(*operands, **scalars)
        self.final = self.roundings  # the last rounding of a call is the result's own; the judge allows for it
        perturbed = []
        if samples and self.final > 1:
            self.nearest, self.roundings = True, 0
            perturbed.append(call(*operands, **scalars))
            self.nearest = False
        for i in range(samples):
            self.rng, self.sums, self.roundings = np.random.default_rng((seed, i)), 0, 0
            self.lean, self.between = 1 + (LEAN if i % 2 else -LEAN), []
            perturbed.append(call(*operands, **scalars))
        self.rng = None
        return exact, perturbed

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Suspend the noise: what happens inside is exact by contract."""
        rng, self.rng = self.rng, None
        yield
        self.rng = rng

    def widen(self, x: Host) -> Host:
        """Float64, with a relative error of two units where perturbed."""
        wide = x.astype(np.float64)
        if self.rng is not None and self.elementwise:
            wide *= 1 + ELEMENTWISE * self.unit * self.rng.standard_normal(x.shape, np.float32)
        return wide

    def round_to(self, x: Host, dtype: str) -> Host:
        """Leave results unrounded; where perturbed, round intermediate ones at random."""
        self.roundings += 1
        if self.nearest and self.roundings != self.final:
            return x.astype(numpy_dtype(dtype)).astype(np.float64)
        if self.rng is None or self.roundings == self.final:
            return x.astype(np.float64, copy=False)
        self.between.append(stochastic(x, dtype, self.rng))
        return self.between[-1]

    def dot(self, a: Host, b: Host) -> Host:
        """``a @ b`` with the error of a sum of products."""
        y = a @ b
        if self.rng is not None:
            partial = self.partial is not None and self.numerics == "native"
            unit, n = (
                (self.partial, min(FP8_BLOCK, a.shape[-1])) if partial and self.partial else (self.unit, a.shape[-1])
            )
            y += self._noise(y, lambda: self._products(a, b, unit), unit, n)
        return y

    def _products(self, a: Host, b: Host, unit: float) -> Host | None:
        magnitude = np.abs(a) @ np.abs(b)
        with self.quiet():
            return None if summed_exactly(a, b, magnitude, unit) else magnitude

    def total(self, x: Host, axis: int) -> Host:
        """Sum with its error."""
        y = x.sum(axis, keepdims=True)
        if self.rng is not None:
            unit, n = self.unit, x.shape[axis]
            y = y + self._noise(y, lambda: np.abs(x).sum(axis, keepdims=True) + swallowed(x, axis, unit), unit, n)
        return y

    def square_mean(self, x: Host) -> Host:
        """Mean of squares with its error."""
        return self.total(x * x, -1) / x.shape[1]

    def _noise(self, y: Host, magnitude: Any, unit: float, n: int) -> Any:
        """The error of summing n terms. Magnitudes are computed for the first sample and kept for
        the others.
        """
        assert self.rng is not None
        if self.sums == len(self.magnitudes):
            self.magnitudes.append(magnitude())
        kept = self.magnitudes[self.sums]
        if kept is not None and kept.shape != y.shape:  # another branch than the first sample took
            kept = magnitude()
        self.sums += 1
        return 0.0 if kept is None else scale_of_sum(unit, n) * kept * self.rng.standard_normal(y.shape, np.float32)

    def on_grid(self, x: Host, fmt: Format, block: int) -> Host:
        """Quantisation is exact given its input; the scale of a rounded intermediate may fall on
        either side of a power of two.
        """
        rounded = self.rng is not None and any(x is y for y in self.between)
        with self.quiet():
            if not rounded:
                return super().on_grid(x, fmt, block)
            blocks = x.reshape(x.shape[0], x.shape[1] // block, block)
            scale = E8M0_VALUES[scale_bytes(blocks * self.lean, fmt)][..., None].astype(np.float64)
            return (round_to_grid(blocks / scale, fmt) * scale).reshape(x.shape)

    def on_int8(self, x: Host) -> Host:
        """Quantisation is exact given its input."""
        with self.quiet():
            return super().on_int8(x)

    def widened_rows(self, weight: Host | ScaledArray, rows: slice) -> Host:
        """Weights are kept between calls, so they carry no noise."""
        with self.quiet():
            return super().widened_rows(weight, rows)

    def linear(self, x: Host, weight: Host | ScaledArray, *, out_dtype: str) -> Host:
        with self._declaring("linear", scaled=isinstance(weight, ScaledArray)), self.sums_alone():
            return super().linear(x, weight, out_dtype=out_dtype)

    def grouped_linear(self, x: Host, weight: Host | ScaledArray) -> Host:
        with self.sums_alone():
            return super().grouped_linear(x, weight)

    def expert_linear(self, x: Host, weight: Experts, offsets: Host) -> Host:
        with self._declaring("expert_linear", scaled="@" in weight.dtype), self.sums_alone():
            return super().expert_linear(x, weight, offsets)

    def index_scores(self, q: Host, weights: Host, keys: Host, *, scale: float) -> Host:
        with self.sums_alone():
            return super().index_scores(q, weights, keys, scale=scale)

    @contextmanager
    def sums_alone(self) -> Iterator[None]:
        """Suspend the noise of operands: the op has no elementwise part, and a sum that is exact in
        every order has no error at all.
        """
        self.elementwise = False
        yield
        self.elementwise = True

    @contextmanager
    def _declaring(self, op: str, *, scaled: bool) -> Iterator[None]:
        self.partial = FP8_PARTIAL_UNIT if scaled and self.declared.get(op) else None
        yield
        self.partial = None

    def cos_sin(self, angle: Host) -> tuple[Host, Host]:
        """Cosine and sine with an absolute error of a unit."""
        both = super().cos_sin(angle)
        if self.rng is None:
            return both
        return both[0] + self.unit * self.rng.standard_normal(angle.shape), both[
            1
        ] + self.unit * self.rng.standard_normal(angle.shape)

    def router_scores(self, x: Host, weight: Host) -> Host:
        """Scores whose exponential is no normal number of float32 may be 0."""
        scores = super().router_scores(x, weight)
        flushed = self.rng is not None and self.numerics != "float64"
        return np.where(scores * scores < LEAST_NORMAL, 0, scores) if flushed else scores

    def swiglu(self, gate: Host, up: Host, weights: Host | None, *, limit: float) -> Host:
        """Where ``exp(-gate)`` leaves float32's range the result may be 0."""
        y = super().swiglu(gate, up, weights, limit=limit)
        flushed = self.rng is not None and self.numerics != "float64"
        return np.where(gate.astype(np.float64) < -LARGEST_EXPONENT, 0, y) if flushed else y

    def softmax_with_sink(self, scores: Host, count: Host, sink: Host) -> Host:
        """Probabilities, rounded to bfloat16 where a backend declares that: for the op itself, or
        for the part that it calls.

        A backend may round them before they are divided by their sum, so that the grid lies
        anywhere beside them: a factor from 1 to 2 for each list moves it. Without that a
        probability that is on the grid itself would be allowed no error at all.
        """
        weight = super().softmax_with_sink(scores, count, sink)
        if self.rng is None or not any(self.declared.get(op) for op in ("sparse_attn", self.op)):
            return weight
        moved = 1 + self.rng.random((*weight.shape[:-1], 1))
        return stochastic(weight * moved, "bfloat16", self.rng) / moved
