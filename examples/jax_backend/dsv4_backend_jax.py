"""A backend on JAX: arrays that cannot be written, shapes that are compiled, numbers that flush.

Every op is a pure function of arrays, traced once for each set of shapes, dtypes and scalars (`op`,
below). Rows of windows and compressed rows come in buckets by ``Backend.round_up``; rows of experts
by tiles of one expert each. A cache is donated to the op that writes it.

Modes: ``native`` (BF16, FP8 and FP4 as published) and ``float32`` (weights dequantised, nothing
quantised), whose logits can be compared with the reference's.
"""

import functools
import inspect
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv4_core import dtypes as d
from dsv4_core.backend import Backend, Diagnosis, Experts, ScaledArray, hookimpl

F32 = jnp.float32
LEAST_TILE = 8  # rows of an expert's tile
GATHERED = 1 << 22  # elements of key rows gathered at a time
PROGRAMS = 200  # of one op; each maps memory, and Linux lets a process have 65530 maps
jax.tree_util.register_pytree_node(
    ScaledArray, lambda w: ((w.data, w.scale), w.format), lambda fmt, parts: ScaledArray(*parts, fmt)
)


@dataclass(frozen=True)
class Mode:
    """What an op's program depends on beside its operands."""

    native: bool

    @property
    def act(self):
        return jnp.bfloat16 if self.native else F32

    def rounded(self, x):
        """To the activation dtype: BF16 of float32, to nearest even."""
        return x.astype(self.act)


def op(function):
    """Compile a pure function of mode, operands, scalars: the method of a contract."""
    scalars = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    compiled = jax.jit(function, static_argnums=0, static_argnames=scalars)

    def call(self, *operands, **scalars):
        if compiled._cache_size() >= PROGRAMS:  # noqa: SLF001  jax has no public count
            jax.clear_caches()
        return compiled(self.mode, *operands, **scalars)

    return functools.wraps(function)(call)


# Formats


def exponent_as_float(byte):
    """2^(byte - 127) of E8M0 bytes, by placing the exponent; 255 is NaN."""
    value = lax.bitcast_convert_type(byte.astype(jnp.uint32) << 23, F32)
    return jnp.where(byte == 255, jnp.nan, value)


def scale_byte(amax, fmt):
    """The least power of two that brings ``amax`` into the format, from float32 bits."""
    amax = jnp.maximum(amax, F32(d.AMAX_FLOOR[fmt]))
    bits = lax.bitcast_convert_type(amax * F32(1 / d.FORMAT_MAX[fmt]), jnp.uint32)
    return jnp.where(jnp.isnan(amax), 255, (bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(jnp.uint8)


def on_grid(x, fmt):
    """Clamp and round to nearest even on the format's grid; NaN stays."""
    top, mantissa, least = (448.0, 3, 2.0**-6) if fmt == "e4m3" else (6.0, 1, 1.0)
    y = jnp.clip(x, -top, top)
    bits = lax.bitcast_convert_type(jnp.maximum(jnp.abs(y), least), jnp.uint32)
    unit = lax.bitcast_convert_type((bits & 0x7F800000) - (mantissa << 23), F32)
    return jnp.where(jnp.isnan(x), x, jnp.copysign(jnp.round(y / unit) * unit, y))


def quantised(x, fmt, block):
    """Values on the grid, still over their scales, [..., n, block], and scale bytes [..., n]."""
    blocks = x.astype(F32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    scale = scale_byte(jnp.abs(blocks).max(-1), fmt)
    return on_grid(blocks / exponent_as_float(scale)[..., None], fmt), scale


def qdq(x, fmt, block):
    """Quantise float32 [..., dim] and multiply back."""
    values, scale = quantised(x, fmt, block)
    return (values * exponent_as_float(scale)[..., None]).reshape(x.shape)


def e4m3_codes(values):
    return lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)


def e4m3_values(codes):
    return jnp.take(jnp.asarray(d.E4M3_VALUES), codes.astype(jnp.int32))


def e2m1_codes(values):
    """Two a byte, the even channel in the low nibble."""
    a = jnp.abs(values)
    code = jnp.where(a < 2, 2 * a, jnp.where(a < 4, a + 2, a / 2 + 4)).astype(jnp.uint8)
    code = code | (jnp.signbit(values).astype(jnp.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def e2m1_values(pairs):
    return lax.collapse(jnp.take(jnp.asarray(d.E2M1_PAIRS), pairs.astype(jnp.int32), axis=0), pairs.ndim - 1)


def unpacked(weight):
    """Codes' values [..., out, in], scales [..., out, groups], and channels of a group."""
    scale = exponent_as_float(weight.scale)
    if weight.format == "e2m1":
        return e2m1_values(weight.data), scale, d.FP4_GROUP
    return e4m3_values(weight.data), jnp.repeat(scale, d.FP8_BLOCK, axis=-2)[..., : weight.shape[-2], :], d.FP8_BLOCK


def operand(mode, x, weight):
    """An activation as a product with this weight takes it, in float32."""
    wide = x.astype(F32)
    return qdq(wide, "e4m3", d.FP8_BLOCK) if mode.native and isinstance(weight, ScaledArray) else wide


def summed(spec, *arrays):
    """A product of arrays, in float32 from its operands to its sums."""
    return jnp.einsum(spec, *(a.astype(F32) for a in arrays), precision="highest")


def product(x, weight):
    """``x[..., i] weight[o, i]``."""
    return summed("...i,oi->...o", x, weight)


def multiplied(x, weight):
    """The same for any weight, a group's sum times its scale: XLA makes subnormal products zero."""
    if not isinstance(weight, ScaledArray):
        return product(x, weight)
    values, scale, size = unpacked(weight)
    short = -x.shape[1] % size
    groups = (x.shape[1] + short) // size
    parts = (jnp.pad(a, ((0, 0), (0, short))).reshape(len(a), groups, size).swapaxes(0, 1) for a in (x, values))

    def group(y, one):
        a, b, s = one
        return y + product(a, b) * s, None

    return lax.scan(group, jnp.zeros((len(x), len(values)), F32), (*parts, scale.T))[0]


class Stack(Experts):
    """One projection of all experts in one array, so that a program can pick among them."""

    def __init__(self, stack):
        self.stack = stack
        super().__init__(stack)

    @property
    def shape(self):
        return self.stack.shape

    @property
    def dtype(self):
        return d.dtype_name(self.stack)


jax.tree_util.register_pytree_node(Stack, lambda e: ((e.stack,), None), lambda _, parts: Stack(*parts))


def normed(x, weight, eps):
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + F32(eps))
    return y if weight is None else y * weight.astype(F32)


def mixes(h, fn, eps):
    """``fn`` times the flattened streams over their root-mean-square."""
    x = h.reshape(len(h), h.shape[1] * h.shape[2]).astype(F32)
    return product(x, fn) / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + F32(eps))


def split(m, scale, base, hc, eps, iters):
    pre = jax.nn.sigmoid(m[:, :hc] * scale[0] + base[:hc]) + F32(eps)
    post = 2 * jax.nn.sigmoid(m[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    comb = jax.nn.softmax((m[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(len(m), hc, hc), axis=-1) + F32(eps)
    comb = comb / (comb.sum(1, keepdims=True) + F32(eps))

    def once(_, c):
        c = c / (c.sum(2, keepdims=True) + F32(eps))
        return c / (c.sum(1, keepdims=True) + F32(eps))

    return pre, post, lax.fori_loop(0, iters - 1, once, comb)


def routed(scores, ids, scale):
    """Weights of the chosen experts: their scores over their sum."""
    chosen = jnp.take_along_axis(scores, ids, axis=1)
    return chosen / chosen.sum(1, keepdims=True) * F32(scale)


def router_scores(x, weight):
    return jnp.sqrt(jax.nn.softplus(product(x, weight)))


def tiles_of_one_expert(offsets, rows, tile):
    """Cut rows that are sorted by expert into tiles of one expert each.

    Gives the expert of each tile [n] and its rows [n, tile], ``rows`` where it has none. At most
    one tile an expert is not full, so that their number is known before the data is.
    """
    counts = jnp.diff(offsets)
    experts = counts.shape[0]
    each = -(-counts // tile)
    ends = jnp.cumsum(each)
    number = jnp.arange(min(rows, rows // tile + experts))
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1)
    first = offsets[expert] + (number - (ends[expert] - each[expert])) * tile
    at = first[:, None] + jnp.arange(tile)
    return expert, jnp.where((number[:, None] < ends[-1]) & (at < offsets[expert + 1][:, None]), at, rows)


class JaxBackend(Backend):
    """Every required op as one compiled program."""

    name = "jax"
    numerics_modes = ("native", "float32")
    claims_level = 3
    flushes_subnormals = True

    def __init__(self, **given):
        super().__init__(**given)
        self.mode = Mode(self.numerics == "native")

    @classmethod
    def diagnose(cls):
        return (Diagnosis("jax", True, f"{jax.__version__} on {jax.devices()[0].device_kind}"),)

    def describe(self):
        return f"backend jax: jax {jax.__version__} on {jax.devices()[0].device_kind}"

    def environment(self):
        return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}

    # Arrays

    def from_numpy(self, array):
        return jax.device_put(np.array(array))  # a copy by NumPy: jnp.array compiles one for each shape

    def to_numpy(self, array):
        return np.array(array)

    def zeros(self, shape, dtype):
        return jnp.zeros(shape, d.numpy_dtype(dtype))

    def load_experts(self, experts):
        every = [experts[e] for e in range(experts.shape[0])]
        if not isinstance(every[0], ScaledArray):
            return Stack(self.from_numpy(np.stack(every)))
        data, scale = (self.from_numpy(np.stack([getattr(w, part) for w in every])) for part in ("data", "scale"))
        return Stack(ScaledArray(data, scale, every[0].format))

    # Codecs and the cache

    @op
    def act_quant(self, x, *, block):
        values, scale = quantised(x, "e4m3", block)
        return e4m3_codes(values).reshape(x.shape), scale

    @op
    def act_qdq(self, x, *, format, block, channels):
        if not self.native:
            return x
        return jnp.concatenate([self.rounded(qdq(x[:, :channels].astype(F32), format, block)), x[:, channels:]], axis=1)

    @op
    def hadamard(self, x):
        y, dim, half = x.astype(F32), x.shape[1], 1
        while half < dim:
            pairs = y.reshape(len(y), dim // half // 2, 2, half)
            y = jnp.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(x.shape)
            half *= 2
        return self.rounded(y * F32(dim**-0.5))

    def cache_write(self, cache, rows, index, *, layout):
        return _write(cache, rows, index, layout)

    @op
    def cache_read(self, cache, index, *, layout):
        stored = jnp.where((index < 0)[:, None], cache.dtype.type(0), cache[jnp.maximum(index, 0)])
        n = layout.dim - layout.rope_dim
        if layout.kind == "plain":
            return stored
        if layout.kind == "key":
            scale = jnp.repeat(exponent_as_float(stored[:, n // 2 :]), d.FP4_GROUP, axis=1)
            return self.rounded(e2m1_values(stored[:, : n // 2]) * scale)
        scale = jnp.repeat(exponent_as_float(stored[:, n : n + n // d.KV_BLOCK]), d.KV_BLOCK, axis=1)
        rope = stored[:, layout.width - 2 * layout.rope_dim :].reshape(len(stored), layout.rope_dim, 2)
        values = self.rounded(e4m3_values(stored[:, :n]) * scale)
        return jnp.concatenate([values, lax.bitcast_convert_type(rope, jnp.bfloat16)], axis=1)

    def concat(self, parts, *, axis):
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)

    # Embedding, norms, streams

    @op
    def embedding(self, ids, weight):
        inside = (ids >= 0) & (ids < len(weight))
        return self.rounded(jnp.where(inside[:, None], weight[jnp.where(inside, ids, 0)], 0))

    @op
    def sample(self, logits, uniform, *, temperature, top_p):
        p = jnp.exp((logits - logits.max(-1, keepdims=True)) / F32(temperature or 1))
        order = jnp.argsort(-p, axis=-1, stable=True)
        running = lax.associative_scan(jnp.add, jnp.take_along_axis(p, order, -1), axis=-1)
        running = running / running[:, -1:]
        last = jnp.minimum((running < F32(top_p)).sum(-1, keepdims=True), p.shape[1] - 1)
        goal = uniform[:, None] * jnp.take_along_axis(running, last, -1)
        chosen = jnp.minimum((running <= goal).sum(-1, keepdims=True), last)
        drawn = jnp.take_along_axis(order, chosen, -1)[:, 0]
        number = (logits < jnp.inf).all(-1) & (logits > -jnp.inf).any(-1)  # XLA's maximum passes over NaN
        return jnp.where(number, drawn if temperature else logits.argmax(-1), -1).astype(jnp.int32)

    @op
    def rms_norm(self, x, weight, *, eps):
        return self.rounded(normed(x.astype(F32), weight, eps))

    @op
    def apply_rope(self, x, positions, freqs, *, inverse):
        angle = positions.astype(F32)[:, None] * freqs
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(-angle if inverse else angle)[:, None]
        kept = x.shape[-1] - 2 * len(freqs)
        pairs = x[..., kept:].astype(F32)
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(pairs.shape)
        return jnp.concatenate([x[..., :kept], self.rounded(turned)], axis=-1)

    @op
    def hc_expand(self, x, *, hc):
        return jnp.repeat(x[:, None], hc, axis=1)

    @op
    def hc_add(self, h, x):
        return self.rounded(h.astype(F32) + x.astype(F32)[:, None])

    @op
    def hc_split_sinkhorn(self, mixes, scale, base, *, hc, eps, iters):
        return split(mixes, scale, base, hc, eps, iters)

    @op
    def hc_pre(self, h, fn, scale, base, *, norm_eps, eps, iters):
        pre, post, comb = split(mixes(h, fn, norm_eps), scale, base, h.shape[1], eps, iters)
        return self.rounded(summed("tj,tjd->td", pre, h)), post, comb

    @op
    def hc_post(self, y, h, post, comb):
        mixed = summed("tjn,tjd->tnd", comb, h)
        return self.rounded(post[:, :, None] * y.astype(F32)[:, None] + mixed)

    @op
    def hc_head(self, h, fn, scale, base, *, norm_eps, eps):
        pre = jax.nn.sigmoid(mixes(h, fn, norm_eps) * scale[0] + base) + F32(eps)
        return self.rounded(summed("tj,tjd->td", pre, h))

    # Products

    @op
    def linear(self, x, weight, *, out_dtype):
        return multiplied(operand(self, x, weight), weight).astype(out_dtype)

    @op
    def grouped_linear(self, x, weight):
        if isinstance(weight, ScaledArray):
            values, scale, size = unpacked(weight)
            weight = values * jnp.repeat(scale, size, axis=1)[:, : x.shape[2]]
        w = weight.reshape(x.shape[1], len(weight) // x.shape[1], x.shape[2])
        return self.rounded(summed("tgi,goi->tgo", x, w).reshape(len(x), len(weight)))

    @op
    def expert_linear(self, x, weight, offsets):
        stack, rows = weight.stack, len(x)
        out = jnp.zeros((rows + 1, stack.shape[1]), self.act)
        if not rows:
            return out[:0]
        tile = max(LEAST_TILE, rows // stack.shape[0] // LEAST_TILE * LEAST_TILE)
        expert, at = tiles_of_one_expert(offsets, rows, tile)
        padded = jnp.concatenate([operand(self, x, stack), jnp.zeros((1, x.shape[1]), F32)])

        def tile_by_tile(y, one):
            chosen, where = one
            w = jax.tree_util.tree_map(lambda part: part[chosen], stack)
            return y.at[where].set(self.rounded(multiplied(padded[where], w))), None

        return lax.scan(tile_by_tile, out, (expert, at))[0][:rows]

    # Experts

    @op
    def gate(self, x, weight, bias, *, topk, route_scale):
        scores = router_scores(x, weight)
        ids = lax.top_k(scores + bias, topk)[1]
        return routed(scores, ids, route_scale), ids

    @op
    def gate_hash(self, x, weight, tid2eid, ids, *, route_scale):
        chosen = tid2eid[ids].astype(jnp.int32)
        return routed(router_scores(x, weight), chosen, route_scale), chosen

    @op
    def dispatch(self, x, weights, indices, *, first_expert, n_experts):
        local = indices.reshape(-1) - first_expert
        local = jnp.where((local >= 0) & (local < n_experts), local, n_experts)
        order = jnp.argsort(local, stable=True).astype(jnp.int32)
        offsets = jnp.searchsorted(local[order], jnp.arange(n_experts + 1)).astype(jnp.int32)
        return x[order // indices.shape[1]], weights.reshape(-1)[order], order, offsets

    @op
    def swiglu(self, gate, up, weights, *, limit):
        g, u = jnp.minimum(gate.astype(F32), F32(limit)), jnp.clip(up.astype(F32), -F32(limit), F32(limit))
        y = g / (1 + jnp.exp(-g)) * u
        return self.rounded(y if weights is None else y * weights[:, None])

    @op
    def combine(self, rows, order, offsets, shared, *, topk, out_dtype):
        here = jnp.where((jnp.arange(len(rows)) < offsets[-1])[:, None], rows.astype(F32), 0)
        y = jnp.zeros_like(here).at[order].set(here).reshape(len(rows) // topk, topk, rows.shape[1]).sum(1)
        return (y if shared is None else y + shared.astype(F32)).astype(out_dtype)

    # Attention

    @op
    def compress(self, kv_score, ape, window_idxs, *, dim):
        ratio, width = ape.shape
        span, present = window_idxs.shape[1], (window_idxs >= 0)[:, :, None]
        tokens = kv_score[jnp.maximum(window_idxs, 0)]  # [rows, span, 2 * width]
        kv, score = tokens[..., :width], tokens[..., width:] + jnp.tile(ape, (span // ratio, 1))
        if span == 2 * ratio:
            first = (jnp.arange(span) < ratio)[:, None]
            kv, score = (jnp.where(first, part[..., :dim], part[..., dim:]) for part in (kv, score))
        score, kv = jnp.where(present, score, -jnp.inf), jnp.where(present, kv, 0)
        top = score.max(1, keepdims=True)
        w = jnp.where(present, jnp.exp(score - jnp.where(jnp.isneginf(top), 0, top)), 0)
        total = w.sum(1)
        return self.rounded(jnp.where(present.any(1), (w * kv).sum(1) / jnp.where(total == 0, 1, total), 0))

    @op
    def index_scores(self, q, weights, keys, *, scale):
        products = summed("bshd,bnd->bshn", q, keys)
        return summed("bsh,bshn->bsn", weights * F32(scale), jnp.maximum(products, 0))

    @op
    def index_select(self, scores, visible, offset, *, topk):
        seen = jnp.arange(scores.shape[-1]) < visible[..., None]
        rows = lax.top_k(jnp.where(seen, scores, -jnp.inf), topk)[1].astype(jnp.int32)
        return jnp.where(jnp.arange(topk) < visible[..., None], rows + offset[..., None], -1)

    @op
    def sparse_attn(self, q, kv, attn_sink, topk_idxs, *, softmax_scale):
        def one_token(operands):
            query, idxs = operands  # [heads, dim], [picks]
            there = idxs >= 0
            rows = jnp.where(there[:, None], kv[jnp.maximum(idxs, 0)].astype(F32), 0)
            s = jnp.where(there, summed("hd,jd->hj", query, rows) * F32(softmax_scale), -jnp.inf)
            top = jnp.maximum(s.max(-1, initial=-jnp.inf), attn_sink)[:, None]
            p = jnp.exp(s - top)
            total = p.sum(-1, keepdims=True) + jnp.exp(attn_sink[:, None] - top)
            o = summed("hj,jd->hd", p, rows) / total
            return self.rounded(jnp.where(there.any(), o, 0))

        many = max(1, GATHERED // max(1, topk_idxs.shape[1] * kv.shape[1]))
        return lax.map(one_token, (q, topk_idxs), batch_size=many)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write(cache, rows, index, layout):
    """Rows packed and placed in a cache that the caller gives away; -1 lies past its end."""
    n = layout.dim - layout.rope_dim
    if layout.kind == "key":
        values, scale = quantised(rows, "e2m1", d.FP4_GROUP)
        rows = jnp.concatenate([e2m1_codes(values.reshape(rows.shape)), scale], axis=1)
    elif layout.kind == "kv":
        values, scale = quantised(rows[:, :n], "e4m3", d.KV_BLOCK)
        rope = lax.bitcast_convert_type(rows[:, n:].astype(jnp.bfloat16), jnp.uint8).reshape(
            len(rows), 2 * layout.rope_dim
        )
        gap = jnp.zeros((len(rows), layout.width - n - scale.shape[1] - rope.shape[1]), jnp.uint8)
        codes = e4m3_codes(values).reshape(len(rows), n)
        rows = jnp.concatenate([codes, scale, gap, rope], axis=1)
    return cache.at[jnp.where(index < 0, len(cache), index)].set(rows, mode="drop")


@hookimpl
def dsv4_backend():
    return JaxBackend
