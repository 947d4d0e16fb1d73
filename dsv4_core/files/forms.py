"""The forms of the files that are read: which keys a file must have, their types and their ranges.
What they mean is said where they are used.

Names and other strings that reach messages may hold no control characters, so that no file writes
to a terminal.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]*\Z"
Word = Annotated[str, Meta(max_length=256, pattern=PLAIN)]
Text = Annotated[str, Meta(max_length=4096, pattern=PLAIN)]
Count = Annotated[int, Meta(ge=0, le=1 << 24)]  # of layers, experts, channels, tokens of a vocabulary
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Length = Annotated[int, Meta(ge=1, le=1 << 40)]  # positions; rotary frequencies are made for each that is used alone
Id = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
Figure = Annotated[float, Meta(ge=1e-6, le=1e9)]  # of a machine: from a toy's to beyond any that is built
Real = Annotated[float, Meta(ge=-1e30, le=1e30)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{8,128}\Z")]
FileName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f/\\]+\Z")]
"""Of a file in the same directory: no separator, and so no way out of it; ``.`` and ``..`` are
directories, which reading refuses.
"""


class Form(msgspec.Struct):
    """Keys that are known; others are left alone."""


class Tensor(Form):
    """One entry of a safetensors header."""

    dtype: Annotated[str, Meta(max_length=32, pattern=PLAIN)]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 60)]], Meta(max_length=64)]
    data_offsets: tuple[Bytes, Bytes]


class Index(Form):
    """``model.safetensors.index.json``."""

    weight_map: dict[Text, Text]
    metadata: Any = None


class Rope(Form):
    """``rope_scaling``, whichever of its published spellings."""

    factor: Positive | UnsetType = UNSET
    original_max_position_embeddings: Length | UnsetType = UNSET
    beta_fast: Positive | UnsetType = UNSET
    beta_slow: Positive | UnsetType = UNSET
    type: Word | UnsetType = UNSET
    rope_type: Word | UnsetType = UNSET


class Config(Form):
    """``config.json``: every key that is read, where it is there. Which of them must be is the
    configuration's business.
    """

    vocab_size: Size | UnsetType = UNSET
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 20)] | UnsetType = UNSET
    num_hidden_layers: Annotated[int, Meta(ge=1, le=4096)] | UnsetType = UNSET
    num_attention_heads: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    head_dim: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    qk_rope_head_dim: Annotated[int, Meta(ge=2, le=1 << 16, multiple_of=2)] | UnsetType = UNSET
    q_lora_rank: Annotated[int, Meta(ge=1, le=1 << 20)] | UnsetType = UNSET
    o_groups: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    o_lora_rank: Annotated[int, Meta(ge=1, le=1 << 20)] | UnsetType = UNSET
    n_routed_experts: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    num_experts_per_tok: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    moe_intermediate_size: Annotated[int, Meta(ge=1, le=1 << 20)] | UnsetType = UNSET
    num_hash_layers: Annotated[int, Meta(ge=0, le=4096)] | UnsetType = UNSET
    index_n_heads: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    index_head_dim: Annotated[int, Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    index_topk: Annotated[int, Meta(ge=1, le=1 << 24)] | UnsetType = UNSET
    compress_ratios: Annotated[list[Count], Meta(max_length=8192)] | UnsetType = UNSET
    routed_scaling_factor: Real | UnsetType = UNSET
    n_shared_experts: Count | UnsetType = UNSET
    num_nextn_predict_layers: Count | UnsetType = UNSET
    sliding_window: Annotated[int, Meta(ge=1, le=1 << 20)] | UnsetType = UNSET
    swiglu_limit: Positive | UnsetType = UNSET
    hc_mult: Annotated[int, Meta(ge=1, le=64)] | UnsetType = UNSET
    hc_sinkhorn_iters: Annotated[int, Meta(ge=0, le=1000)] | UnsetType = UNSET
    hc_eps: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    rope_theta: Annotated[float, Meta(gt=1, le=1e30)] | UnsetType = UNSET
    compress_rope_theta: Annotated[float, Meta(gt=1, le=1e30)] | UnsetType = UNSET
    rope_scaling: Rope | UnsetType | None = UNSET
    max_position_embeddings: Length | UnsetType = UNSET
    scoring_func: Word | UnsetType = UNSET
    topk_method: Word | UnsetType = UNSET
    norm_topk_prob: bool | UnsetType = UNSET
    hidden_act: Word | UnsetType = UNSET
    bos_token_id: Id | UnsetType = UNSET
    eos_token_id: Id | Annotated[list[Id], Meta(max_length=64)] | UnsetType = UNSET
    dspark_block_size: Annotated[int, Meta(ge=0, le=1 << 10)] | UnsetType = UNSET
    dspark_noise_token_id: Id | UnsetType = UNSET
    dspark_target_layer_ids: Annotated[list[Count], Meta(max_length=64)] | UnsetType | None = UNSET
    dspark_markov_rank: Annotated[int, Meta(ge=0, le=1 << 16)] | UnsetType = UNSET
    expert_dtype: Word | UnsetType = UNSET
    quantization_config: dict[Word, Any] | UnsetType | None = UNSET
    model_type: Word | UnsetType = UNSET
    architectures: Annotated[list[Word], Meta(max_length=16)] | UnsetType | None = UNSET


class RunTable(msgspec.Struct, forbid_unknown_fields=True):
    """``[run]`` of dsv4.toml."""

    backend: Word | UnsetType = UNSET


class Toml(msgspec.Struct, forbid_unknown_fields=True):
    """``dsv4.toml``."""

    run: RunTable | UnsetType = UNSET


class Hardware(Form):
    """A machine for ``dsv4 plan``: GB, GB/s and 10^12 operations a second by precision."""

    memory_gb: Figure
    bandwidth_gbs: Figure
    link_gbs: Figure
    tflops: Annotated[dict[Word, Figure], Meta(min_length=1)]
    devices: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    source: Text = "the file"


class Source(Form):
    """What a copy was made of: where it was, and its identity (``checkpoint.identity``)."""

    path: str
    identity: Digest


class ConvertOptions(Form):
    """What ``dsv4 convert`` was asked for."""

    tp: Annotated[int, Meta(ge=1, le=1 << 16)] | None
    ep: Annotated[int, Meta(ge=1, le=1 << 16)] | None
    rank: Annotated[int, Meta(ge=0, le=1 << 32)]
    experts: Literal["", "fp8"]
    bf16: bool
    int8: bool
    allow_lossy: bool


class Written(Form):
    """A shard that ``dsv4 convert`` finished: SHA-256 of all of it, and its sampled identity."""

    sha256: Digest
    identity: Digest
    int8_error: dict[Word, tuple[float, float, float]] = {}


class Converted(Form):
    """``convert.json``: what a copy was made of and how, and the shards that are done."""

    source: Source
    options: ConvertOptions
    shards: dict[FileName, Written] = {}
