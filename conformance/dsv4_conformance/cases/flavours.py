"""Data that bites: how float operands are filled, by name."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from dsv4_core.contract.dtypes import BFLOAT16, E2M1_VALUES, E4M3_VALUES, Host, numpy_dtype

Fill = Callable[[np.random.Generator, tuple[int, ...]], Host]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Unit normal noise: what the other flavours start from, and what an unknown name falls back
    to.
    """
    return rng.standard_normal(shape)


def outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """A thousandfold in one channel of 32 (at least one), as activations of large models have
    them.
    """
    x = normal(rng, shape)
    channels = rng.choice(max(shape[-1], 1), max(1, shape[-1] // 32), replace=False) if shape[-1] else np.arange(0)
    x[..., channels] *= 1000
    return x


def zero_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Every other row zero, the first included."""
    x = normal(rng, shape)
    x.reshape(-1, shape[-1])[::2] = 0
    return x


def subnormal(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Magnitudes across the end of bfloat16's and float32's range, 2^-133 to 2^-120."""
    return normal(rng, shape) * np.exp2(rng.integers(-133, -120, shape))


def limits(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Rows at bfloat16's largest value, rows one format maximum wide, rows of mixed magnitude."""
    x = normal(rng, shape)
    rows = x.reshape(-1, shape[-1]) if x.size else x.reshape(0, shape[-1])
    rows[0::4] = np.sign(rows[0::4]) * float(ml_dtypes.finfo(BFLOAT16).max)  # type: ignore[no-untyped-call]
    rows[1::4] *= 448
    rows[2::4] *= np.exp2(rng.integers(-100, 100, rows[2::4].shape))
    return x


def tiny(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Mean squares of the size of eps = 1e-6."""
    return normal(rng, shape) * 1e-3


def floor(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Block maxima on either side of the FP8 quantisation's floor of 1e-4."""
    return rng.uniform(-1, 1, shape) * 1e-4 * np.exp2(rng.integers(-3, 3, (*shape[:-1], 1)))


def below_floor(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """So far below the floor of 1e-4 that its scale leaves few codes; a scale of their own would
    leave them all.
    """
    return normal(rng, shape) * 4e-9


def large(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Values whose squares still fit float32."""
    return normal(rng, shape) * 1e15


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Small integers, so that every order of summation is exact and ties are ties."""
    return rng.integers(-2, 3, shape).astype(np.float64)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """One sign: partial sums only grow, and errors of a narrow accumulator with them."""
    return np.abs(normal(rng, shape)) + 0.5


def far_below(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Keys of one sign, where scores shall be far below zero: queries have the other."""
    return positive(rng, shape)


def cancel(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Neighbouring channels that nearly cancel when summed."""
    x = normal(rng, shape) * 64
    if shape[-1] > 1:
        x[..., 1::2] = -x[..., 0 : shape[-1] // 2 * 2 : 2] + rng.standard_normal(x[..., 1::2].shape) / 64
    return x


def peaked(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Scores so far apart that an exponential without its maximum subtracted overflows."""
    return normal(rng, shape) * 20


def late(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Rows that grow towards their end, so that a running maximum moves again and again, and last
    of all in the last column.
    """
    x = normal(rng, shape)
    return np.asarray(x * np.linspace(0.1, 3, max(shape[-1], 1))[: shape[-1]] + np.linspace(0, 4, shape[-1]))


def early(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """The same the other way round: the first column holds the largest."""
    return late(rng, shape)[..., ::-1]


def very_negative(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Numbers whose exponential is far below one, almost to where it leaves float32: -3 to -80."""
    return np.asarray(-np.exp(rng.uniform(np.log(3), np.log(80), shape)))


def clamp(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Values at, just inside, just outside and far outside +-10 and +-2."""
    edge = rng.choice([2.0, 10.0], shape) * rng.choice([-1.0, 1.0], shape)
    return edge * rng.choice([1.0, 1 - 2.0**-7, 1 + 2.0**-7, 0.5, 3.0, 1000.0], shape)


def fp4(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """E2M1 values times one power of two a row."""
    return rng.choice(E2M1_VALUES, shape).astype(np.float64) * np.exp2(rng.integers(-2, 3, (*shape[:-1], 1)))


def nan(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """One NaN in every other row: it must come out again, in its row and in no other."""
    x = normal(rng, shape)
    x.reshape(-1, shape[-1])[::2, shape[-1] // 2] = np.nan
    return x


FLAVOURS: dict[str, Fill] = {
    f.__name__: f
    for f in (
        normal,
        outliers,
        zero_rows,
        subnormal,
        limits,
        tiny,
        floor,
        below_floor,
        large,
        integers,
        positive,
        far_below,
        cancel,
        peaked,
        late,
        early,
        very_negative,
        clamp,
        fp4,
        nan,
    )
}


def fill(flavour: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Fill by a flavour's name; names that mean something to an op alone give normal noise."""
    return FLAVOURS.get(flavour, normal)(rng, shape)


def _grid(fmt: str) -> tuple[Host, float]:
    values = E4M3_VALUES if fmt == "e4m3" else E2M1_VALUES
    finite = np.unique(values[np.isfinite(values)]).astype(np.float64)
    return finite, float(finite[-1])


def midpoints(fmt: str, dtype: str, shape: tuple[int, ...], block: int) -> Host:
    """Every midpoint of neighbouring codes and its neighbours in ``dtype`` on either side; each
    block's first channel fixes the scale at 1.
    """
    grid, top = _grid(fmt)
    middle = ((grid[1:] + grid[:-1]) / 2).astype(numpy_dtype(dtype))
    points = np.concatenate([middle, _step(middle, -1), _step(middle, 1), grid.astype(middle.dtype)]).astype(np.float64)
    x = np.zeros(shape)
    x[..., ::block] = top
    if shape[0] * (shape[1] - shape[1] // block) < len(points):
        raise ValueError(f"midpoints: {len(points)} values do not fit {shape}")
    flat = x.reshape(-1)
    places = np.flatnonzero(np.arange(flat.size) % block != 0)
    flat[places] = np.resize(points, places.size)
    return x


def scale_edges(fmt: str, dtype: str, shape: tuple[int, ...], block: int, rng: np.random.Generator) -> Host:
    """Block maxima at format maximum times every power of two of bfloat16, and its neighbours in
    ``dtype`` on either side.
    """
    _, top = _grid(fmt)
    exponents = np.arange(-126, 128 - (9 if fmt == "e4m3" else 3))
    edge = (top * np.exp2(exponents)).astype(numpy_dtype(dtype))
    maxima = np.stack([edge, _step(edge, -1), _step(edge, 1)], axis=1).astype(np.float64).reshape(-1)
    if shape[0] * (shape[1] // block) < len(maxima):
        raise ValueError(f"scale_edges: {len(maxima)} blocks do not fit {shape}")
    blocks = np.resize(maxima, (shape[0], shape[1] // block, 1))
    x = rng.uniform(-1, 1, (shape[0], shape[1] // block, block)) * blocks
    x[..., :1] = blocks
    return x.reshape(shape)


def _step(x: Host, by: int) -> Host:
    """The neighbours of finite values in their own dtype, towards +-infinity."""
    return np.nextafter(x, np.asarray(np.inf * by, x.dtype))
