"""A vendor's backend in one file: the ops that its hardware does well; the others not yet."""

import numpy as np

from dsv4_core import dtypes as d
from dsv4_core.backend import Backend
from dsv4_core.registry import hookimpl


def quantise(x, fmt, block):
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // block, block)
    scale = d.power_of_two_scale(np.abs(blocks).max(-1), fmt)
    return d.encode(blocks / d.E8M0_VALUES[scale][..., None], fmt).reshape(x.shape), scale


class ExampleBackend(Backend):
    """Level 0: codecs and data movement. Of level 1: RMS norm and RoPE."""

    name = "example"
    numerics_modes = ("native",)
    claims_level = 0
    deterministic = True

    def from_numpy(self, array):
        return array

    def to_numpy(self, array):
        return array

    def zeros(self, shape, dtype):
        return np.zeros(shape, d.numpy_dtype(dtype))

    def embedding(self, ids, weight):
        inside = (ids >= 0) & (ids < len(weight))
        return np.where(inside[:, None], weight[np.where(inside, ids, 0)], 0).astype(d.BFLOAT16)

    def act_quant(self, x, *, block):
        return quantise(x, "e4m3", block)

    def act_qdq(self, x, *, format, block, channels):
        codes, scale = quantise(x[:, :channels], format, block)
        values = d.decode(codes, format) * np.repeat(d.E8M0_VALUES[scale], block, axis=1)
        values = np.where(np.isnan(x[:, :channels]), np.nan, values)  # E2M1 has no code for NaN
        return np.concatenate([values.astype(x.dtype), x[:, channels:]], axis=1)

    def cache_write(self, cache, rows, index, *, layout):
        kept, n = rows[index >= 0], layout.dim - layout.rope_dim
        if layout.kind == "key":
            codes, scale = quantise(kept, "e2m1", 32)
            kept = np.concatenate([d.pack_fp4(codes), scale], axis=1)
        elif layout.kind == "kv":
            codes, scale = quantise(kept[:, :n], "e4m3", 64)
            gap = np.zeros((len(kept), layout.width - n - scale.shape[1] - 2 * layout.rope_dim), np.uint8)
            kept = np.concatenate([codes, scale, gap, np.ascontiguousarray(kept[:, n:]).view(np.uint8)], axis=1)
        cache[index[index >= 0]] = kept
        return cache

    def cache_read(self, cache, index, *, layout):
        rows, n = np.where(index[:, None] < 0, cache.dtype.type(0), cache[index]), layout.dim - layout.rope_dim
        if layout.kind == "plain":
            return rows
        if layout.kind == "key":
            values = d.E2M1_PAIRS[rows[:, : n // 2]].reshape(len(rows), n)
            return (values * np.repeat(d.E8M0_VALUES[rows[:, n // 2 :]], 32, axis=1)).astype(d.BFLOAT16)
        values = d.decode(rows[:, :n], "e4m3") * np.repeat(d.E8M0_VALUES[rows[:, n : n + n // 64]], 64, axis=1)
        rope = np.ascontiguousarray(rows[:, layout.width - 2 * layout.rope_dim :]).view(d.BFLOAT16)
        return np.concatenate([values.astype(d.BFLOAT16), rope], axis=1)

    def hc_expand(self, x, *, hc):
        return np.repeat(x[:, None], hc, axis=1)

    def dispatch(self, x, weights, indices, *, first_expert, n_experts):
        local = indices.reshape(-1) - first_expert
        local = np.where((local >= 0) & (local < n_experts), local, n_experts)
        order = np.argsort(local, kind="stable").astype(np.int32)
        offsets = np.searchsorted(local[order], np.arange(n_experts + 1)).astype(np.int32)
        return x[order // indices.shape[1]], weights.reshape(-1)[order], order, offsets

    def concat(self, parts, *, axis):
        return np.concatenate(parts, axis=axis)

    def rms_norm(self, x, weight, *, eps):
        wide = x.astype(np.float32)
        y = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))
        return (y if weight is None else y * weight.astype(np.float32)).astype(x.dtype)

    def apply_rope(self, x, positions, freqs, *, inverse):
        angle = positions.astype(np.float32)[:, None] * freqs
        turn = np.cos(angle)[:, None] + 1j * np.sin(-angle if inverse else angle)[:, None]
        pairs = x[..., -2 * len(freqs) :].astype(np.float32)
        y = x.copy()
        turned = (pairs[..., 0::2] + 1j * pairs[..., 1::2]) * turn
        y[..., -2 * len(freqs) :: 2], y[..., 1 - 2 * len(freqs) :: 2] = turned.real, turned.imag
        return y


@hookimpl
def dsv4_backend():
    return ExampleBackend
