"""The published checkpoint layout: every tensor's name, shape and dtype, and the parameter counts
that follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, Format

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4_core.checkpoint.config import ModelConfig

Shape = tuple[int, ...]
Kind = Literal[
    "embedding",
    "attention",
    "compressor",
    "indexer",
    "gate",
    "experts",
    "shared expert",
    "mhc",
    "norm",
    "head",
    "mtp",
    "dspark",
]
PROJECTIONS = ("w1", "w2", "w3")
QUANTISED: dict[str, Format] = {"F8_E4M3": "e4m3", "I8": "e2m1", "F4": "e2m1"}
"""Formats of quantised weights. ``I8`` states the packed shape (two FP4 a byte), ``F4`` the
unpacked one; ``I8`` with scales in F32 is int8.
"""

NAMES = (
    (".self_attn.", ".attn."),
    (".mlp.", ".ffn."),
    (".weight_scale_inv", ".scale"),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".attn.norm.", ".attn.kv_norm."),
    ("hc_head.hc_", "hc_head_"),
)
"""Parts of names in other spellings, and the published ones. So does ``.weight_scale`` after a
name.
"""
WRAPPERS = ("model.", "language_model.", "module.", "_orig_mod.", "transformer.")
"""Parts before a name, in any order and number: of the classes that hold the model where it was
saved.
"""
WHOLE = {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}


class TensorSpec(NamedTuple):
    """A tensor as stored: safetensors' dtype name, and the shape that goes with it (packed for
    ``I8``).
    """

    name: str
    shape: Shape
    dtype: str
    kind: Kind


class Parameters(NamedTuple):
    """Parameter counts, FP4 unpacked, scales and the hash layers' ``tid2eid`` tables not counted.

    ``total``: layers, embedding, head; without MTP or DSpark, as the published figures are.
    ``active``: what one token multiplies with: num_experts_per_tok of the routed experts, and no
    embedding, of which it reads one row. ``draft`` is the MTP block or DSpark alone, with all its
    experts.
    """

    total: int
    active: int
    draft: int


def canonical_name(name: str) -> str:
    """Give the published spelling of a name, of whichever tool that is known here; anything else
    comes back as it is.
    """
    while wrapper := next((part for part in WRAPPERS if name.startswith(part)), ""):
        name = name.removeprefix(wrapper)
    for other, published in NAMES:
        if other in name:
            name = name.replace(other, published)
    if name.endswith(".weight_scale"):
        return f"{name[:-13]}.scale"
    return WHOLE.get(name, name)


def scale_shape(shape: Shape, fmt: Format) -> Shape:
    """Give the shape of the scales of a weight [out, in]: one per 128 x 128 block, per 32 channels
    of a row, or (int8) per row.
    """
    out, cols = shape
    if fmt == "int8":
        return (out,)
    return (out, cols // FP4_GROUP) if fmt == "e2m1" else (-(-out // FP8_BLOCK), -(-cols // FP8_BLOCK))


def tensor_specs(
    config: ModelConfig, expert_format: Format = "e2m1", *, experts: int | None = None
) -> dict[str, TensorSpec]:
    """Give every tensor of a checkpoint of this configuration by name, in the order of the
    computation.

    ``int8``: all that `dsv4 convert --to w8a8-int8` makes of it, experts and other linear layers.
    ``experts``: only the first so many routed experts of each layer, which are all alike; the
    published models have 256 and 384.
    """
    stored: Format = "e4m3" if expert_format == "int8" else expert_format
    specs = {spec.name: spec for spec in _specs(config, stored, experts)}
    if expert_format == "int8":
        for spec in [spec for spec in specs.values() if spec.dtype == "F8_E4M3" and becomes_int8(spec.name)]:
            specs[spec.name] = spec._replace(dtype="I8")
            scale = f"{spec.name.removesuffix('.weight')}.scale"
            specs[scale] = TensorSpec(scale, spec.shape[:1], "F32", spec.kind)
    return specs


def becomes_int8(name: str) -> bool:
    """Say whether W8A8 requantises a quantised weight: all but ``wo_a``, whose activation the model
    does not quantise.
    """
    return not name.endswith("attn.wo_a.weight")


def unpacked(spec: TensorSpec) -> Shape:
    """Give the logical shape: an ``I8`` tensor holds two FP4 a byte."""
    return (*spec.shape[:-1], 2 * spec.shape[-1]) if spec.dtype == "I8" else spec.shape


def parameters(config: ModelConfig) -> Parameters:
    """Count parameters from the configuration: 284.3B total and 13.27B active for flash, 1573B and
    48.85B for pro.
    """
    total = active = draft = 0
    for spec in _specs(config, "e2m1", None):
        if spec.dtype in {"F8_E8M0", "I64"}:
            continue
        count = math.prod(unpacked(spec))
        if spec.kind in {"mtp", "dspark"}:
            draft += count
            continue
        total += count
        if spec.kind == "experts":
            if ".experts.0." in spec.name:  # the others are like it
                active += count * config.num_experts_per_tok
        elif spec.kind != "embedding":
            active += count
    return Parameters(total, active, draft)


def _specs(config: ModelConfig, expert_format: Format, experts: int | None) -> Iterator[TensorSpec]:
    D = config.hidden_size
    yield TensorSpec("embed.weight", (config.vocab_size, D), "BF16", "embedding")
    for i in range(config.num_hidden_layers):
        ratio, hashed = config.compress_ratios[i], i < config.num_hash_layers
        yield from _block(config, f"layers.{i}", ratio, expert_format, experts, hashed=hashed)
    yield from _mhc_head(config, "")
    yield TensorSpec("norm.weight", (D,), "BF16", "norm")
    yield TensorSpec("head.weight", (config.vocab_size, D), "BF16", "head")
    for s in range(config.stages):
        ratio = config.compress_ratios[config.num_hidden_layers + s] if config.draft == "mtp" else 0
        block = _block(config, f"mtp.{s}", ratio, expert_format, experts, hashed=False)
        parts = _dspark_stage(config, s) if config.draft == "dspark" else _mtp(config)
        yield from (spec._replace(kind=config.draft or "mtp") for spec in (*block, *parts))


def _mtp(c: ModelConfig) -> Iterator[TensorSpec]:
    for name in ("e_proj", "h_proj"):
        yield from _fp8(f"mtp.0.{name}", c.hidden_size, c.hidden_size, "mtp")
    for name in ("enorm", "hnorm", "norm"):
        yield TensorSpec(f"mtp.0.{name}.weight", (c.hidden_size,), "BF16", "mtp")
    yield from _mhc_head(c, "mtp.0.")


def _dspark_stage(c: ModelConfig, s: int) -> Iterator[TensorSpec]:
    """What a stage has beside its block: the first reads the taps, the last has the heads."""
    D, at = c.hidden_size, f"mtp.{s}"
    if s == 0:
        yield from _fp8(f"{at}.main_proj", D, len(c.dspark_target_layer_ids) * D, "dspark")
        yield TensorSpec(f"{at}.main_norm.weight", (D,), "BF16", "dspark")
    if s == c.stages - 1:
        yield TensorSpec(f"{at}.norm.weight", (D,), "BF16", "dspark")
        yield from _mhc_head(c, f"{at}.")
        for name in ("markov_w1", "markov_w2"):
            shape = (c.vocab_size, c.dspark_markov_rank)
            yield TensorSpec(f"{at}.markov_head.{name}.weight", shape, "BF16", "dspark")
        yield TensorSpec(f"{at}.confidence_head.proj.weight", (1, D + c.dspark_markov_rank), "BF16", "dspark")


def _block(
    c: ModelConfig, at: str, ratio: int, expert_format: Format, experts: int | None, *, hashed: bool
) -> Iterator[TensorSpec]:
    D, H, d, r = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank
    mixes = (2 + c.hc_mult) * c.hc_mult
    yield TensorSpec(f"{at}.attn_norm.weight", (D,), "BF16", "norm")
    yield TensorSpec(f"{at}.ffn_norm.weight", (D,), "BF16", "norm")
    for half in ("attn", "ffn"):
        yield TensorSpec(f"{at}.hc_{half}_fn", (mixes, c.hc_mult * D), "F32", "mhc")
        yield TensorSpec(f"{at}.hc_{half}_base", (mixes,), "F32", "mhc")
        yield TensorSpec(f"{at}.hc_{half}_scale", (3,), "F32", "mhc")
    low_rank = c.o_groups * c.o_lora_rank
    yield from _fp8(f"{at}.attn.wq_a", r, D, "attention")
    yield TensorSpec(f"{at}.attn.q_norm.weight", (r,), "BF16", "norm")
    yield from _fp8(f"{at}.attn.wq_b", H * d, r, "attention")
    yield from _fp8(f"{at}.attn.wkv", d, D, "attention")
    yield TensorSpec(f"{at}.attn.kv_norm.weight", (d,), "BF16", "norm")
    yield TensorSpec(f"{at}.attn.attn_sink", (H,), "F32", "attention")
    yield from _fp8(f"{at}.attn.wo_a", low_rank, H * d // c.o_groups, "attention")
    yield from _fp8(f"{at}.attn.wo_b", D, low_rank, "attention")
    if ratio:
        yield from _compressor(c, f"{at}.attn.compressor", ratio, d, "compressor")
    if ratio == 4:
        yield from _fp8(f"{at}.attn.indexer.wq_b", c.index_n_heads * c.index_head_dim, r, "indexer")
        yield TensorSpec(f"{at}.attn.indexer.weights_proj.weight", (c.index_n_heads, D), "BF16", "indexer")
        yield from _compressor(c, f"{at}.attn.indexer.compressor", ratio, c.index_head_dim, "indexer")
    count = c.experts_of(at)
    yield TensorSpec(f"{at}.ffn.gate.weight", (count, D), "BF16", "gate")
    if hashed:
        yield TensorSpec(f"{at}.ffn.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), "I64", "gate")
    else:
        yield TensorSpec(f"{at}.ffn.gate.bias", (count,), "F32", "gate")
    inter = c.moe_intermediate_size
    parts: list[tuple[str, Shape, str]] = []
    for name, out, cols in (("w1", inter, D), ("w2", D, inter), ("w3", inter, D)):
        yield from _fp8(f"{at}.ffn.shared_experts.{name}", out, cols, "shared expert")
        stored, dtype = ((out, cols // 2), "I8") if expert_format == "e2m1" else ((out, cols), "F8_E4M3")
        parts.append((f"{name}.weight", stored, dtype))
        parts.append((f"{name}.scale", scale_shape((out, cols), expert_format), "F8_E8M0"))
    for e in range(count if experts is None else experts):
        prefix = f"{at}.ffn.experts.{e}."
        for name, shape, dtype in parts:
            yield TensorSpec(prefix + name, shape, dtype, "experts")


def _compressor(c: ModelConfig, at: str, ratio: int, dim: int, kind: Kind) -> Iterator[TensorSpec]:
    width = 2 * dim if ratio == 4 else dim  # the overlapping compressor has channels for the window before, too
    yield TensorSpec(f"{at}.wkv.weight", (width, c.hidden_size), "BF16", kind)
    yield TensorSpec(f"{at}.wgate.weight", (width, c.hidden_size), "BF16", kind)
    yield TensorSpec(f"{at}.ape", (ratio, width), "F32", kind)
    yield TensorSpec(f"{at}.norm.weight", (dim,), "BF16", kind)


def _mhc_head(c: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size), "F32", "mhc")
    yield TensorSpec(f"{prefix}hc_head_base", (c.hc_mult,), "F32", "mhc")
    yield TensorSpec(f"{prefix}hc_head_scale", (1,), "F32", "mhc")


def _fp8(name: str, out: int, cols: int, kind: Kind) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (out, cols), "F8_E4M3", kind)
    yield TensorSpec(f"{name}.scale", scale_shape((out, cols), "e4m3"), "F8_E8M0", kind)
