"""The model's configuration: config.json's own keys, checked where they enter."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, KV_BLOCK
from dsv4_core.files import forms
from dsv4_core.files.reading import FileError, checked, json_file

if TYPE_CHECKING:
    from pathlib import Path

ADVICE = "copy it again from the published checkpoint"


class ConfigError(ValueError):
    """A configuration that this model definition cannot run: the message names the key, its value and the rule."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, reduced to its frequency blend (no magnitude scaling)."""

    factor: float = 16
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32
    beta_slow: float = 1
    type: str = "yarn"


def _quantization() -> dict[str, Any]:
    block = [FP8_BLOCK, FP8_BLOCK]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": block,
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
    }


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters under config.json's names; ``compress_ratios`` has one entry per layer and then one per MTP
    block.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    compress_ratios: tuple[int, ...]
    routed_scaling_factor: float
    n_shared_experts: int = 1
    num_nextn_predict_layers: int = 1
    sliding_window: int = 128
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int = 1048576
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str = "fp4"
    quantization_config: dict[str, Any] = field(default_factory=_quantization)
    model_type: str = "deepseek_v4"
    architectures: tuple[str, ...] = ("DeepseekV4ForCausalLM",)

    def __post_init__(self) -> None:
        """Refuse what the graph has no meaning for; raise ``ConfigError``."""
        rules: list[tuple[str, bool, str]] = [
            (key, getattr(self, key) == only, f"is not implemented; the published models have {only!r}")
            for key, only in (
                ("scoring_func", "sqrtsoftplus"),
                ("topk_method", "noaux_tc"),
                ("norm_topk_prob", True),
                ("hidden_act", "silu"),
                ("n_shared_experts", 1),
            )
        ]
        ratios = self.num_hidden_layers + self.num_nextn_predict_layers
        nope = self.head_dim - self.qk_rope_head_dim
        rules += [
            (
                "compress_ratios",
                len(self.compress_ratios) == ratios,
                f"must have {ratios} entries: one per layer, then one per MTP block",
            ),
            (
                "compress_ratios",
                set(self.compress_ratios) <= {0, 4, 128},
                "may hold 0 (window only), 4 (CSA) and 128 (HCA)",
            ),
            ("compress_ratios", not any(self.compress_ratios[self.num_hidden_layers :]), "must be 0 for the MTP block"),
            ("num_nextn_predict_layers", self.num_nextn_predict_layers in {0, 1}, "may be 0 or 1"),
            ("head_dim", nope > 0 and nope % KV_BLOCK == 0, f"less qk_rope_head_dim must be a multiple of {KV_BLOCK}"),
            (
                "index_head_dim",
                self.index_head_dim & (self.index_head_dim - 1) == 0,
                "must be a power of two (Hadamard rotation)",
            ),
            (
                "index_head_dim",
                self.index_head_dim >= max(FP4_GROUP, self.qk_rope_head_dim),
                "must hold the RoPE channels and one FP4 group",
            ),
            ("o_groups", self.num_attention_heads % self.o_groups == 0, "must divide num_attention_heads"),
            (
                "num_experts_per_tok",
                self.num_experts_per_tok <= self.n_routed_experts,
                "must not exceed n_routed_experts",
            ),
            ("num_hash_layers", self.num_hash_layers <= self.num_hidden_layers, "must not exceed num_hidden_layers"),
        ]
        rules += [
            (
                key,
                getattr(self, key) % FP8_BLOCK == 0,
                f"must be a multiple of {FP8_BLOCK}: activations are quantised in blocks of that many channels",
            )
            for key in ("hidden_size", "q_lora_rank", "moe_intermediate_size")
        ]
        wo_b_in = self.o_groups * self.o_lora_rank
        rules.append(("o_lora_rank", wo_b_in % FP8_BLOCK == 0, f"times o_groups must be a multiple of {FP8_BLOCK}"))
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"config.json: {key} = {getattr(self, key)!r} {rule}")

    @property
    def layers(self) -> int:
        """Blocks with a cache: the main stack's and the MTP block, which comes last."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read config.json's dictionary; keys that do not change the computation are ignored; raise ``ConfigError``."""
        try:
            checked(values, forms.Config, "config.json", ADVICE)
        except FileError as error:
            raise ConfigError(str(error)) from None
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in values.items() if k in known}
        required = {f.name for f in fields(cls) if f.name in _REQUIRED}
        if missing := sorted(required - kept.keys()):
            raise ConfigError(
                f"config.json: missing {', '.join(missing)}; is this a DeepSeek-V4 checkpoint (model_type {values.get('model_type')!r})?"
            )
        scaling = kept.get("rope_scaling")
        if isinstance(scaling, dict):
            names = {f.name for f in fields(RopeScaling)}
            scaling = {"type": scaling.get("rope_type", "yarn"), **scaling}
            kept["rope_scaling"] = RopeScaling(**{k: v for k, v in scaling.items() if k in names})
        kept["compress_ratios"] = tuple(kept["compress_ratios"])
        kept["architectures"] = tuple(kept.get("architectures") or ())
        return cls(**kept)

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Read ``model_dir/config.json``; raise ``ConfigError`` where it is missing, not JSON, or not runnable."""
        path = model_dir / "config.json"
        try:
            values = json_file(path, dict[str, Any], ADVICE, most=1 << 20)
            return cls.from_dict(values)
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; a model directory holds config.json, model.safetensors.index.json and its shards"
            ) from None
        except ConfigError as error:
            raise ConfigError(f"{model_dir}/{error}") from None
        except FileError as error:
            raise ConfigError(str(error)) from None

    def to_json(self) -> str:
        """Write config.json's text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def cut(self, *, layers: int | None = None, experts: int | None = None) -> ModelConfig:
        """Keep the first ``layers`` layers (their compress ratios, and the MTP block) and ``experts`` routed experts."""
        kept = self.num_hidden_layers if layers is None else layers
        if not 1 <= kept <= self.num_hidden_layers:
            raise ConfigError(f"layers = {layers}: the preset has 1 to {self.num_hidden_layers}")
        mtp = self.compress_ratios[self.num_hidden_layers :]
        return replace(
            self,
            num_hidden_layers=kept,
            num_hash_layers=min(self.num_hash_layers, kept),
            compress_ratios=self.compress_ratios[:kept] + mtp,
            n_routed_experts=self.n_routed_experts if experts is None else experts,
        )

    def rope_frequencies(self, compress_ratio: int) -> npt.NDArray[np.float32]:
        """Frequencies [r / 2] of a layer: plain where the ratio is 0, else ``compress_rope_theta`` blended by YaRN.

        Computed in float64 and rounded once, here and nowhere else: libraries' float32 powers differ by a unit or two.
        """
        r = self.qk_rope_head_dim
        index = np.arange(r // 2)
        if compress_ratio == 0:
            return (self.rope_theta ** (-2.0 * index / r)).astype(np.float32)
        theta, yarn = self.compress_rope_theta, self.rope_scaling
        freq = theta ** (-2.0 * index / r)

        def dim(rotations: float) -> float:
            return (
                r * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))
            )

        low, high = max(math.floor(dim(yarn.beta_fast)), 0), min(math.ceil(dim(yarn.beta_slow)), r - 1)
        ramp = np.clip((index - low) / (high - low if high != low else 0.001), 0, 1)
        return (freq / yarn.factor * ramp + freq * (1 - ramp)).astype(np.float32)


_REQUIRED = frozenset(
    (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "qk_rope_head_dim",
        "q_lora_rank",
        "o_groups",
        "o_lora_rank",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "num_hash_layers",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "compress_ratios",
        "routed_scaling_factor",
    )
)  # the fields above that have no default


def _csa_hca(layers: int) -> tuple[int, ...]:
    return tuple(4 if i % 2 == 0 else 128 for i in range(layers))


PRESETS: dict[str, ModelConfig] = {
    "flash": ModelConfig(
        vocab_size=129280,
        hidden_size=4096,
        num_hidden_layers=43,
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        n_routed_experts=256,
        num_experts_per_tok=6,
        moe_intermediate_size=2048,
        num_hash_layers=3,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        compress_ratios=(0, 0, *_csa_hca(41), 0),
        routed_scaling_factor=1.5,
    ),
    "pro": ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1536,
        o_groups=16,
        o_lora_rank=1024,
        n_routed_experts=384,
        num_experts_per_tok=6,
        moe_intermediate_size=3072,
        num_hash_layers=3,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=1024,
        compress_ratios=(128, 128, *_csa_hca(59), 0),
        routed_scaling_factor=2.5,
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_hash_layers=1,
        index_n_heads=4,
        index_head_dim=64,
        index_topk=32,
        compress_ratios=(0, 0, 4, 128, 4, 128, 0),
        routed_scaling_factor=1.5,
        sliding_window=64,
        max_position_embeddings=4096,
        rope_scaling=RopeScaling(original_max_position_embeddings=1024),
    ),
}
"""flash and pro: the published models; tiny: every kind of layer at the size of a test."""
