"""How an op's operands are made from a case: floats by flavour, weights in the checkpoint's
formats, indices that mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_conformance.cases.case import Case
from dsv4_conformance.cases.flavours import fill, midpoints, scale_edges
from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.dtypes import (
    E8M0_VALUES,
    Experts,
    Format,
    Host,
    RowLayout,
    ScaledArray,
    encode,
    numpy_dtype,
    pack_fp4,
    power_of_two_scale,
    quantise_int8,
    quantise_weight,
    round_to_grid,
)
from dsv4_core.contract.spec import OPS, Numerics

FAR = 1 << 20  # the published models' max_position_embeddings
SMALL = 1 << 16  # rows of a cache beyond which the last ones are addressed, not any
FEW = 5  # picks of a token of which the rest are none
BUCKETS = (0, 1, 2, 3, 4, 8, 12, 0, 16, 32, 33, 64, 128, 0)  # rows of an expert, none of the first and the last
RUN = 16  # neighbouring keys of a cache that says so
SCALES = (1, 232)  # bytes of a weight's scales: 2^-126 and 2^105, so that products stay inside bfloat16


@dataclass
class Maker:
    """Makes one case's operands."""

    case: Case
    numerics: Numerics
    rng: np.random.Generator

    def __getitem__(self, axis: str) -> int:
        return self.case.sizes[axis]

    @property
    def data(self) -> str:
        """Name of the flavour."""
        return self.case.data

    @property
    def act(self) -> str:
        """Name of the activation dtype."""
        return "bfloat16" if self.numerics == "native" else self.numerics

    @property
    def wide(self) -> str:
        """Name of the wide dtype."""
        return "float64" if self.numerics == "float64" else "float32"

    def scalars(self) -> dict[str, Any]:
        """The case's scalars, dtype names and layouts spelled out."""
        named = {"act": self.act, "wide": self.wide}
        scalars = {k: named.get(v, v) if isinstance(v, str) else v for k, v in self.case.scalars.items()}
        if "layout" in scalars:
            kind: Any = scalars["layout"]
            run = RUN if self.data == "runs" else 1
            if kind == "plain" or self.numerics != "native":
                scalars["layout"] = RowLayout("plain", self["dim"], run=run)
            else:
                scalars["layout"] = RowLayout(kind, self["dim"], self["rope_dim"], run)
        return scalars

    def floats(self, *shape: int, dtype: str = "", data: str = "", scale: float = 1.0) -> Host:
        """Floats of the case's flavour in the activation dtype (or ``dtype``)."""
        x = fill(data or self.data, self.rng, shape) * scale
        info = numpy_dtype(dtype or self.act)
        return x.astype(info)

    def plain(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Host:
        """Normal noise whatever the case's flavour."""
        return self.floats(*shape, dtype=dtype, data="normal", scale=scale)

    def weight(self, name: str, out: int, cols: int, default: str = "bfloat16") -> Any:
        """A weight [out, cols] in the format that the case states for ``name``; None for
        ``"none"``.
        """
        fmt = self.case.dtypes.get(name, default)
        if fmt in {"bfloat16", "float32"}:
            flavour = self.data if self.data in {"integers", "positive"} else "normal"
            scale = 1.0 if flavour == "integers" else max(cols, 1) ** -0.5
            return self.floats(out, cols, dtype=fmt, data=flavour, scale=scale)
        if fmt == "int8":
            return quantise_int8(
                self.floats(
                    out,
                    cols,
                    dtype="float32",
                    data="positive" if self.data == "positive" else "normal",
                    scale=cols**-0.5,
                )
            )
        return self.scaled(out, cols, "e4m3" if fmt == "e4m3" else "e2m1")

    def scaled(self, out: int, cols: int, fmt: Format) -> ScaledArray:
        """A quantised weight."""
        if self.data == "one_hot":  # every byte in every place that a token can reach, every scale of a weight
            data = np.resize(np.arange(256, dtype=np.uint8), (out, cols if fmt == "e4m3" else cols // 2))
            data = np.stack([np.roll(row, 37 * i) for i, row in enumerate(data[:64])] * -(-out // 64))[:out]
            if fmt == "e4m3":
                data = np.where((data & 0x7F) == 0x7F, 0, data)  # NaN has no place in a weight
            grid = (-(-out // 128), -(-cols // 128)) if fmt == "e4m3" else (out, cols // 32)
            scale = np.resize(np.roll(np.arange(SCALES[0], SCALES[1] + 1, dtype=np.uint8), -126), grid)  # from 1 on
            return ScaledArray(np.ascontiguousarray(data, np.uint8), scale, fmt)
        values = fill("positive" if self.data == "positive" else "normal", self.rng, (out, cols)) * cols**-0.5
        if self.data == "last_byte":
            values[:, :-2] = 0
        weight = quantise_weight(values, fmt)
        if self.data == "scale_ends":
            ends = np.where(np.arange(weight.scale.shape[0]) % 2, *SCALES)
            weight = ScaledArray(
                weight.data, np.broadcast_to(ends[:, None], weight.scale.shape).astype(np.uint8).copy(), fmt
            )
        return weight

    def experts(self, name: str, count: int, out: int, cols: int) -> Experts:
        """One projection of ``count`` experts."""
        return Experts([self.weight(name, out, cols) for _ in range(count)])

    def ints(self, low: int, high: int, *shape: int) -> Host:
        """Integers in ``low .. high - 1``."""
        return self.rng.integers(low, max(high, low + 1), shape).astype(np.int32)

    def slots(self, rows: int, count: int) -> Host:
        """Distinct rows in any order: of a large array the last ones, whose addresses need the most
        bits, and one of the first.
        """
        if rows <= SMALL:
            return self.rng.permutation(rows)[:count].astype(np.int32)
        index = rows - 1 - self.rng.permutation(count)
        index[count // 2 :][:1] = 0 if count < rows else index[count // 2]
        return index.astype(np.int32)

    def some_missing(self, index: Host, share: float = 0.3) -> Host:
        """The indices with ``share`` of them -1, at least one of several; all of them for the
        flavours that say so.
        """
        if self.data in {"all_masked", "nothing"}:
            return np.full_like(index, -1)
        if self.data in {"few_first", "few_last"}:  # whole tiles in which nothing is
            few = slice(FEW, None) if self.data == "few_first" else slice(None, -FEW)
            index = index.copy()
            index[..., few] = -1
            return index
        if self.data == "padding":
            missing = self.rng.random(index.shape) < share
            if index.size > 1 and not missing.any():
                missing.reshape(-1)[int(self.rng.integers(index.size))] = True
            return np.where(missing, -1, index).astype(np.int32)
        return index

    def routes(self, tokens: int, topk: int, experts: int) -> Host:
        """Distinct experts per token."""
        if self.data == "nothing_here":
            experts_from = experts + np.arange(topk)
            return np.broadcast_to(experts_from, (tokens, topk)).astype(np.int32).copy()
        if self.data == "buckets":
            assert (tokens, topk, experts) == (sum(BUCKETS), 2, len(BUCKETS)), "buckets: rows of an expert add up"
            first = self.rng.permutation(np.repeat(np.arange(experts), BUCKETS))
            return np.stack([first, np.full(tokens, experts - 1)], axis=1).astype(np.int32)
        span = experts + 2 if self.data == "other_ranks" else max(experts, topk)
        picks = np.argsort(self.rng.random((tokens, span)), axis=1)[:, :topk].astype(np.int32)
        if self.data == "one_expert":
            picks = np.sort(picks, axis=1)
            picks[:, 0] = 1
            picks[:, 1:] = np.where(picks[:, 1:] == 1, 0, picks[:, 1:])
        return picks

    def far_cache(self, slots: int, filled: int, layout: RowLayout) -> Host:
        """A cache of ``slots`` rows, but of no more than just over 2^31 bytes; its last ``filled``
        rows filled, the others holes.
        """
        rows = self.packed(filled, layout)
        cache = np.zeros((min(slots, (1 << 31) // rows[0].nbytes + 2 * filled), rows.shape[1]), rows.dtype)
        cache[-filled:] = rows
        return cache

    def packed(self, slots: int, layout: RowLayout) -> Host:
        """Cache rows as ``layout`` stores them, the ``slots`` of them filled."""
        if layout.kind == "plain":
            return self.floats(slots, layout.dim, dtype=self.wide if self.case.dtypes.get("cache") == "wide" else "")
        quantised = layout.dim - layout.rope_dim
        if self.data == "every_code":
            codes = np.resize(np.arange(256, dtype=np.uint8), (slots, quantised)).copy()
            codes += np.arange(slots, dtype=np.uint8)[:, None]  # every code meets every channel
            if layout.kind == "kv":
                codes = np.where((codes & 0x7F) == 0x7F, 0x7E, codes)
            top = 247 if layout.kind == "kv" else 253  # what bfloat16's largest number needs
            scale = np.resize(
                np.arange(1, top + 1, dtype=np.uint8), (slots, quantised // (64 if layout.kind == "kv" else 32))
            )
            finite = 0xF7 if layout.kind == "kv" else 0xDD  # leaves codes that are finite times it: to 240, to 3
            per_scale = codes[:, : quantised if layout.kind == "kv" else quantised // 2].reshape(*scale.shape, -1)
            per_scale[scale == top] &= finite
        else:
            values, fmt, block = (
                self.floats(slots, quantised, dtype="float32"),
                "e4m3" if layout.kind == "kv" else "e2m1",
                0,
            )
            block = 64 if fmt == "e4m3" else 32
            blocks = values.reshape(slots, quantised // block, block)
            scale = power_of_two_scale(np.abs(blocks).max(-1), fmt)  # type: ignore[arg-type]
            codes = encode(blocks / E8M0_VALUES[scale][..., None], fmt).reshape(slots, quantised)  # type: ignore[arg-type]
        if layout.kind == "key":
            body = codes[:, : quantised // 2] if self.data == "every_code" else pack_fp4(codes)
            return np.concatenate([body, scale], axis=1)
        rope = np.ascontiguousarray(self.plain(slots, layout.rope_dim, dtype="bfloat16")).view(np.uint8)
        padding = np.zeros((slots, layout.width - quantised - scale.shape[1] - rope.shape[1]), np.uint8)
        return np.concatenate([codes, scale, padding, rope], axis=1)

    def on_grid(self, x: Host, fmt: Format, block: int, channels: int) -> Host:
        """Rows as ``act_qdq`` leaves them, what the cache and the indexer are given."""
        if self.numerics != "native" or not x.size:
            return x
        blocks = x[:, :channels].astype(np.float32).reshape(len(x), channels // block, block)
        scale = E8M0_VALUES[power_of_two_scale(np.abs(blocks).max(-1), fmt)][..., None]
        y = x.copy()
        y[:, :channels] = (round_to_grid(blocks / scale, fmt) * scale).reshape(len(x), channels).astype(x.dtype)
        return y

    def freqs(self, half: int) -> Host:
        """RoPE frequencies: the published tables at 64 channels, plain powers otherwise."""
        if half == PRESETS["flash"].qk_rope_head_dim // 2:
            return PRESETS["flash"].rope_frequencies(4 if self.data in {"yarn", "far"} else 0)
        return (10000.0 ** (-np.arange(half) / half)).astype(np.float32)


Build = Callable[[Maker], list[Any]]
BUILD: dict[str, Build] = {}


def builds(op: str) -> Callable[[Build], Build]:
    """Register the function that makes ``op``'s operands, in the order of its signature."""

    def register(build: Build) -> Build:
        BUILD[op] = build
        return build

    return register


def make(op: str, case: Case, numerics: Numerics, seed: int) -> tuple[list[Any], dict[str, Any]]:
    """Give a case's operands and scalars; the same seed gives the same."""
    maker = Maker(case, numerics, np.random.default_rng(seed))
    if op not in BUILD:
        raise LookupError(f"op {op!r} has no operands; add a function to dsv4_conformance.cases.rules")
    operands = BUILD[op](maker)
    assert len(operands) == len(OPS[op].arrays), op
    return operands, maker.scalars()


def quantiser_input(m: Maker, fmt: str, block: int, channels: int) -> Host:
    """Input of the activation casts: flavours that aim at the rounding, else floats."""
    shape = (m["tokens"], channels)
    if m.data == "midpoints":
        x = midpoints(fmt, m.act, shape, block)
    elif m.data == "scale_edges":
        x = scale_edges(fmt, m.act, shape, block, m.rng)
    elif m.data == "all_codes":
        grid = np.arange(256, dtype=np.uint8)
        grid = grid[(grid & 0x7F) != 0x7F]
        from dsv4_core.contract.dtypes import E4M3_VALUES

        x = np.resize(E4M3_VALUES[grid], shape).astype(np.float64)
        x[:, ::block] = 448
    else:
        return m.floats(m["tokens"], m["dim"])
    rest = m.plain(m["tokens"], m["dim"] - channels).astype(np.float64)
    return np.concatenate([x, rest], axis=1).astype(numpy_dtype(m.act))
