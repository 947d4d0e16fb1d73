"""The model's configuration: config.json's own keys, checked where they enter."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dsv4_core.checkpoint import foreign, spellings
from dsv4_core.checkpoint.spellings import ConfigError
from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, KV_BLOCK
from dsv4_core.files import forms
from dsv4_core.files.reading import FileError, checked, json_file

if TYPE_CHECKING:
    from pathlib import Path

ADVICE = "copy it again from the published checkpoint"


Draft = Literal["", "mtp", "dspark"]
"""What predicts tokens ahead: nothing, the block that sees one token further, or DSpark, which
drafts a block of them.
"""


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
    """Hyperparameters under config.json's names.

    ``compress_ratios`` has one entry per layer, then one per block under ``mtp.``: one of MTP, or
    the stages of DSpark. ``dspark_target_layer_ids`` say that it is DSpark, whatever
    ``num_nextn_predict_layers`` says: official releases keep that key from the preview.
    ``experts_by_block``: of blocks (``layers.7``, ``mtp.0``) that have another number of routed
    experts than ``n_routed_experts``; no key of the file, but what the tensors say. ``other``: keys
    of the file that change nothing here. ``notes``: spellings that were read.
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
    eos_token_id: int | tuple[int, ...] = 1
    dspark_block_size: int = 0
    dspark_noise_token_id: int = 0
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int = 0
    expert_dtype: str = "fp4"
    quantization_config: dict[str, Any] = field(default_factory=_quantization)
    model_type: str = "deepseek_v4"
    architectures: tuple[str, ...] = ("DeepseekV4ForCausalLM",)
    experts_by_block: dict[str, int] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Refuse what the graph has no meaning for; raise ``ConfigError``."""
        for key, harmless in ONLY.items():
            if (said := self.other.get(key, harmless[0])) not in harmless:
                raise ConfigError(
                    f"config.json: {key} = {said!r} is a key of other models, which DeepSeek-V4 has no meaning for; "
                    "copy config.json from the published checkpoint"
                )
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
        layers = self.num_hidden_layers
        nope = self.head_dim - self.qk_rope_head_dim
        rules += [
            ("compress_ratios", len(self.compress_ratios) >= layers, f"must have {layers} entries: one per layer"),
            (
                "compress_ratios",
                set(self.compress_ratios) <= {0, 4, 128},
                "may hold 0 (window only), 4 (CSA) and 128 (HCA)",
            ),
            (
                "compress_ratios",
                self.draft != "mtp" or self.stages == 1,
                f"must have {layers + 1} entries: one per layer, then one for the MTP block",
            ),
            (
                "compress_ratios",
                self.draft != "" or self.stages == 0,
                f"must have {layers} entries: one per layer, there is no MTP block",
            ),
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
            (
                "eos_token_id",
                max(self.eos_token_id, default=0) < self.vocab_size
                if isinstance(self.eos_token_id, tuple)
                else self.eos_token_id < self.vocab_size,
                f"must be in the vocabulary 0 .. {self.vocab_size - 1}, or no text would end",
            ),
        ]
        rules += [
            (
                key,
                getattr(self, key) % FP8_BLOCK == 0,
                f"must be a multiple of {FP8_BLOCK}: activations are quantised in blocks of that many channels",
            )
            for key in ("hidden_size", "q_lora_rank", "moe_intermediate_size")
        ]
        if self.draft == "dspark":
            rules += [
                ("dspark_block_size", self.dspark_block_size > 0, "must be 1 or more"),
                ("dspark_markov_rank", self.dspark_markov_rank > 0, "must be 1 or more"),
                (
                    "dspark_noise_token_id",
                    0 <= self.dspark_noise_token_id < self.vocab_size,
                    f"must be in the vocabulary 0 .. {self.vocab_size - 1}",
                ),
                (
                    "dspark_target_layer_ids",
                    all(0 <= i < layers for i in self.dspark_target_layer_ids),
                    f"must be layers 0 .. {layers - 1}",
                ),
            ]
        wo_b_in = self.o_groups * self.o_lora_rank
        rules.append(("o_lora_rank", wo_b_in % FP8_BLOCK == 0, f"times o_groups must be a multiple of {FP8_BLOCK}"))
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"config.json: {key} = {getattr(self, key)!r} {rule}")

    @property
    def stages(self) -> int:
        """Blocks under ``mtp.``."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def draft(self) -> Draft:
        """What these blocks are."""
        if self.dspark_target_layer_ids and self.stages:
            return "dspark"
        return "mtp" if self.num_nextn_predict_layers and not self.dspark_target_layer_ids else ""

    @property
    def layers(self) -> int:
        """Blocks with a cache: the main stack's, then those under ``mtp.``."""
        return self.num_hidden_layers + self.stages

    def experts_of(self, block: str) -> int:
        """Routed experts of a block, by its name."""
        return self.experts_by_block.get(block, self.n_routed_experts)

    def drafting(self, draft: Draft, stages: int = 0) -> ModelConfig:
        """Give the configuration of the same model with another draft module, of ``stages`` blocks:
        DSpark's are window only.
        """
        main, have = self.compress_ratios[: self.num_hidden_layers], self.compress_ratios[self.num_hidden_layers :]
        ratios = (*main, *(have[:stages] + (0,) * max(0, stages - len(have))))
        if draft == "dspark":
            return replace(self, compress_ratios=ratios)
        return replace(
            self,
            compress_ratios=ratios,
            num_nextn_predict_layers=int(draft == "mtp"),
            dspark_block_size=0,
            dspark_noise_token_id=0,
            dspark_target_layer_ids=(),
            dspark_markov_rank=0,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read config.json's dictionary in any spelling; raise ``ConfigError``."""
        if problem := foreign.config_problem(values):
            raise ConfigError(problem)
        values, notes = spellings.published(values)
        try:
            checked(values, forms.Config, "config.json", ADVICE)
        except FileError as error:
            raise ConfigError(str(error)) from None
        known = {f.name for f in fields(cls)} - {"experts_by_block", "other", "notes"}
        kept = {k: v for k, v in values.items() if k in known}
        if missing := sorted(_REQUIRED - kept.keys()):
            raise ConfigError(
                f"config.json: missing {', '.join(missing)}, which DeepSeek-V4 needs; copy it again from the published checkpoint"
            )
        if isinstance(scaling := kept.get("rope_scaling"), dict):
            kept["rope_scaling"] = RopeScaling(**scaling)
        for key in ("compress_ratios", "architectures", "dspark_target_layer_ids"):
            kept[key] = tuple(kept.get(key) or ())
        if isinstance(kept.get("eos_token_id"), list):
            kept["eos_token_id"] = tuple(kept["eos_token_id"])
        if missing := [f"{key} = {default!r}" for key, default in _DEFAULTS.items() if key not in kept]:
            notes.append(f"config.json: keys that are not there are read as published: {', '.join(missing)}")
        if kept.get("quantization_config") is None:
            kept["quantization_config"] = {}
        kept["compress_ratios"] = _stages(kept, notes)
        return cls(**kept, other={k: v for k, v in values.items() if k not in known}, notes=tuple(notes))

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Read ``model_dir/config.json``; raise ``ConfigError`` where it is missing, not JSON, or
        not runnable.
        """
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

    def to_dict(self) -> dict[str, Any]:
        """Give config.json's values: the published keys, without DSpark's where there is none, then
        the others.
        """
        values = asdict(self)
        del values["notes"], values["experts_by_block"]
        other = values.pop("other")
        if not self.dspark_target_layer_ids:
            values = {key: value for key, value in values.items() if not key.startswith("dspark_")}
        if not self.quantization_config:
            del values["quantization_config"]
        return values | other

    def to_json(self) -> str:
        """Write config.json's text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def cut(self, *, layers: int | None = None, experts: int | None = None) -> ModelConfig:
        """Keep the first ``layers`` layers (their compress ratios, and the MTP block) and
        ``experts`` routed experts.
        """
        kept = self.num_hidden_layers if layers is None else layers
        if not 1 <= kept <= self.num_hidden_layers:
            raise ConfigError(f"layers = {layers}: the preset has 1 to {self.num_hidden_layers}")
        mtp = self.compress_ratios[self.num_hidden_layers :]
        removed = self.num_hidden_layers - kept  # DSpark taps the last layers: of a cut model, too
        return replace(
            self,
            dspark_target_layer_ids=tuple(max(0, i - removed) for i in self.dspark_target_layer_ids),
            num_hidden_layers=kept,
            num_hash_layers=min(self.num_hash_layers, kept),
            compress_ratios=self.compress_ratios[:kept] + mtp,
            n_routed_experts=self.n_routed_experts if experts is None else experts,
        )

    def rope_frequencies(self, compress_ratio: int) -> npt.NDArray[np.float32]:
        """Frequencies [r / 2] of a layer: plain where the ratio is 0, else ``compress_rope_theta``
        blended by YaRN.

        Computed in float64 and rounded once, here and nowhere else: libraries' float32 powers
        differ by a unit or two.
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


_DEFAULTS = {
    f.name: f.default
    for f in fields(ModelConfig)
    if isinstance(f.default, int | float) and not f.name.startswith(("dspark_", "num_nextn"))
} | {"rope_scaling": "YaRN from 65536 by 16"}
"""What a text changes with, and what is taken where config.json is silent: the published values."""
ONLY = {
    "n_group": (1, None),
    "topk_group": (1, None),
    "rope_interleave": (True,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}
"""Keys of other models that DeepSeek-V4 has no meaning for, and the values that mean nothing."""


def _stages(kept: dict[str, Any], notes: list[str]) -> tuple[int, ...]:
    """Give ``compress_ratios`` as dsv4 keeps them: as many past the layers as there are draft
    blocks, by the configuration.

    Ratio 1 is what some exports write for 0, a layer whose rows are not compressed. Entries past
    the layers may be missing.
    """
    ratios, layers = kept["compress_ratios"], kept["num_hidden_layers"]
    if 1 in ratios:
        ratios = tuple(0 if ratio == 1 else ratio for ratio in ratios)
        notes.append("config.json: ratio 1 in compress_ratios is read as 0: rows are not compressed")
    if kept["dspark_target_layer_ids"] or len(ratios) < layers:
        return ratios
    stages = int(kept.get("num_nextn_predict_layers", 1) > 0)
    if len(ratios) > layers + stages:
        dropped = list(ratios[layers + stages :])
        notes.append(f"config.json: {dropped} at the end of compress_ratios belong to no layer and are ignored")
    elif len(ratios) < layers + stages:
        notes.append("config.json: compress_ratios has no entry for the MTP block, which is read as 0")
        return (*ratios, 0)
    return ratios[: layers + stages]


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
_DSPARK: dict[str, Any] = {"dspark_block_size": 5, "dspark_noise_token_id": 128799}
for _name, _of, _dspark in (
    ("flash-0731", "flash", _DSPARK | {"dspark_target_layer_ids": (40, 41, 42), "dspark_markov_rank": 256}),
    ("pro-0813", "pro", _DSPARK | {"dspark_target_layer_ids": (58, 59, 60), "dspark_markov_rank": 512}),
    (
        "tiny-dspark",
        "tiny",
        {
            "dspark_block_size": 5,
            "dspark_noise_token_id": 511,
            "dspark_target_layer_ids": (3, 4, 5),
            "dspark_markov_rank": 32,
        },
    ),
):
    PRESETS[_name] = replace(PRESETS[_of], compress_ratios=(*PRESETS[_of].compress_ratios, 0, 0), **_dspark)
_UNUSED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}  # published keys that change nothing here, and that other engines read
PRESETS = {name: replace(config, other=dict(_UNUSED)) for name, config in PRESETS.items()}
"""flash and pro: the preview of April; flash-0731 and pro-0813: the official releases, which differ
by DSpark.

tiny: every kind of layer at the size of a test, with MTP or DSpark.
"""
