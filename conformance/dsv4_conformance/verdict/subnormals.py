"""Operands as a device has them that takes numbers below the least normal one of float32 for
zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dsv4_conformance.verdict.calls import Call
from dsv4_core.contract.dtypes import (
    E8M0_VALUES,
    FP4_GROUP,
    KV_BLOCK,
    Experts,
    Host,
    RowLayout,
    ScaledArray,
    decode,
    pack_fp4,
)

LEAST = 2.0**-126


def flushed(call: Call) -> Call:
    """The call with subnormal numbers replaced by zero: plain ones, and codes whose product with
    their scale is one.
    """
    layout = call.scalars.get("layout")

    def flush(name: str, operand: Any) -> Any:
        if isinstance(operand, Experts):
            return Experts([flush(name, operand[e]) for e in range(operand.shape[0])])
        if isinstance(operand, ScaledArray):
            return _weight(operand)
        if isinstance(operand, (list, tuple)):
            return [flush(name, part) for part in operand]
        if not isinstance(operand, np.ndarray):
            return operand
        if operand.dtype == np.uint8 and isinstance(layout, RowLayout) and layout.kind != "plain":
            return _rows(operand, layout)
        if operand.dtype.kind not in "fV":
            return operand
        return np.where(np.abs(operand.astype(np.float64)) < LEAST, operand.dtype.type(0), operand)

    return replace(call, operands=[flush(name, operand) for name, operand in call.named().items()])


def _weight(weight: ScaledArray) -> ScaledArray:
    if weight.format == "int8":
        return weight
    small = np.abs(weight.dequantise("float64")) < LEAST
    if weight.format == "e4m3":
        return ScaledArray(np.where(small, 0, weight.data).astype(np.uint8), weight.scale, "e4m3")
    return ScaledArray(_nibbles(weight.data, small), weight.scale, "e2m1")


def _nibbles(data: Host, small: Host) -> Host:
    codes = np.stack([data & 0xF, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    return pack_fp4(np.where(small, 0, codes))


def _rows(stored: Host, layout: RowLayout) -> Host:
    quantised, result = layout.dim - layout.rope_dim, stored.copy()
    if layout.kind == "key":
        half = quantised // 2
        codes = np.stack([stored[:, :half] & 0xF, stored[:, :half] >> 4], axis=-1).reshape(len(stored), -1)
        scale = np.repeat(E8M0_VALUES[stored[:, half:]].astype(np.float64), FP4_GROUP, axis=1)
        result[:, :half] = pack_fp4(np.where(np.abs(decode(codes, "e2m1") * scale) < LEAST, 0, codes))
        return result
    codes = stored[:, :quantised]
    scales = stored[:, quantised : quantised + -(-quantised // KV_BLOCK)]
    scale = np.repeat(E8M0_VALUES[scales].astype(np.float64), KV_BLOCK, axis=1)[:, :quantised]
    result[:, :quantised] = np.where(np.abs(decode(codes, "e4m3") * scale) < LEAST, 0, codes)
    return result
