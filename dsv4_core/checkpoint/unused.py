"""Tensors that the text model does not use, and which draft module there is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dsv4_core.checkpoint import foreign
from dsv4_core.checkpoint.config import ModelConfig
from dsv4_core.checkpoint.findings import ForeignError
from dsv4_core.checkpoint.spellings import ConfigError
from dsv4_core.checkpoint.tensors import Tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv4_core.checkpoint.config import Draft

_VISION = ("vision.", "aligner.", "image_start", "image_end", "image_newline", "image_pad", "visual.", "vision_tower.")
_BUFFERS = (".inv_freq", ".freqs_cis", ".cos_cached", ".sin_cached")
_MTP_PARTS = {"e_proj", "h_proj", "enorm", "hnorm"}
_DSPARK_PARTS = {"main_proj", "main_norm", "markov_head", "confidence_head"}
_MODULES: dict[Draft, str] = {"": "", "mtp": "an MTP block", "dspark": "a DSpark drafter"}


def set_aside(t: Tensors) -> None:
    """Take out tensors that the text model does not use, with one note each kind; use a tied
    head.
    """
    vision = [name for name in t.where if name.startswith(_VISION) or name.endswith(".gate.bias_vl")]
    if vision:
        vision += [name for i in range(t.config.num_hash_layers) if (name := f"layers.{i}.ffn.gate.bias") in t.where]
        for name in vision:
            del t.where[name]
        t.notes.append(f"{len(vision)} tensors of the vision part (such as {vision[0]}) are ignored: dsv4 runs text")
    if t.config.other.get("tie_word_embeddings"):
        for name, other in (("head.weight", "embed.weight"), ("embed.weight", "head.weight")):
            if name not in t.where and other in t.where:
                t.where[name] = t.where[other]
    _set_buffers_aside(t)
    _set_offsets_aside(t)


def _set_buffers_aside(t: Tensors) -> None:
    """Tables of rotary frequencies, which some code saves beside the weights: config.json says the
    same.
    """
    if found := [name for name in t.where if name.endswith(_BUFFERS)]:
        for name in found:
            del t.where[name]
        t.notes.append(
            f"{len(found)} tables of rotary frequencies (such as {found[0]}) are ignored: config.json gives them"
        )


def _set_offsets_aside(t: Tensors) -> None:
    """ModelSlim's W8A8 is ours with offsets of zero beside the scales; whatever else it writes is
    named.
    """
    scheme = foreign.modelslim_problem(t.path)
    offsets = [name for name in t.where if name.endswith(".weight_offset")]
    if scheme:
        raise ForeignError(scheme)
    for name in offsets:
        if t.peek(name).any():
            raise ForeignError(f"{t.path}: {foreign.asymmetric(name)}")
        del t.where[name]
    if offsets:
        t.notes.append(f"ModelSlim's W8A8: {len(offsets)} offsets, all zero, are ignored")


_ALIKE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "sliding_window",
    "swiglu_limit",
    "routed_scaling_factor",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
)
"""Keys that a drafter's blocks are run by: of the drafter's configuration and of the model's they
must say the same.
"""


def take_drafter(t: Tensors, directory: Path) -> set[str]:
    """Let the tensors under mtp. be those of another directory; give the names of those that could
    not be read.

    Shards there that hold nothing else are enough. Raises ``ConfigError`` where it drafts for a
    model of other numbers.
    """
    other = Tensors(directory, ModelConfig.load(directory))
    unread = {name for name in other.open_shards(None, only="mtp.") if name.startswith("mtp.")}
    for key in _ALIKE:
        if (theirs := getattr(other.config, key)) != (ours := getattr(t.config, key)):
            raise ConfigError(
                f"{directory}: drafts for another model: config.json there says {key} = {theirs!r}, {t.path} has {ours!r}; "
                "use the drafter of this model's own release"
            )
    taken = {name: where for name, where in other.where.items() if name.startswith("mtp.")}
    if not taken and not unread and not other.findings:
        raise ConfigError(
            f"{directory}: no tensor under mtp. is there, so that nothing drafts; name one that holds a drafter"
        )
    for name in [name for name in t.where if name.startswith("mtp.")]:
        del t.where[name]
    t.where |= taken
    t.findings += other.findings
    c, layers = other.config, other.config.num_hidden_layers
    t.config = replace(
        t.config,
        compress_ratios=(*t.config.compress_ratios[:layers], *c.compress_ratios[layers:]),
        num_nextn_predict_layers=c.num_nextn_predict_layers,
        **{key: getattr(c, key) for key in vars(c) if key.startswith("dspark_")},
    )
    t.notes.append(f"{len(taken)} tensors under mtp. are those of {directory}")
    return unread


def settle_draft(t: Tensors, unread: set[str]) -> None:
    """Decide by tensors what draft module there is; where it cannot run, the main model runs
    without it.
    """
    names = [name for name in (*t.where, *unread) if name.startswith("mtp.")]
    parts = {part for name in names for part in name.split(".")[2:3]}
    stages = 1 + max((int(n) for name in names if (n := name.split(".")[1]).isascii() and n.isdigit()), default=-1)
    found: Draft = "dspark" if parts & _DSPARK_PARTS else "mtp" if parts & _MTP_PARTS else ""
    c, module = t.config, _MODULES[found]
    if not names:
        if c.draft:
            t.notes.append(f"no tensor under mtp. is there: this copy has not {_MODULES[c.draft]}, and runs without")
        t.config = c.drafting("")
    elif found == "dspark" and c.dspark_target_layer_ids:
        if stages < c.stages and not any(name.startswith(f"mtp.{stages - 1}.markov_head.") for name in names):
            stages = c.stages  # its heads, which the last stage has, are missing, too
        if c.stages not in {0, stages}:
            t.notes.append(f"config.json says {c.stages} stages of DSpark, the tensors are of {stages}")
        t.config = _window_only(t, c.drafting("dspark", stages))
    elif found == "mtp" and c.num_nextn_predict_layers:
        t.config = c.drafting("mtp", 1)
        _forget(t, [name for name in names if not name.startswith("mtp.0.")], "of further MTP blocks")
    else:
        why = "the tensors under mtp. are of no kind that dsv4 knows"
        if found == "mtp":
            why = "config.json asks for none (num_nextn_predict_layers = 0)"
        elif found == "dspark":
            why = "config.json has no dspark_target_layer_ids, which say what it reads"
        _forget(t, names, f"of {module or 'an unknown draft module'}: {why}")
        t.config = c.drafting("")


def _window_only(t: Tensors, config: ModelConfig) -> ModelConfig:
    """Give DSpark's stages the ratio 0, which is the only one that they have."""
    main, stages = (
        config.compress_ratios[: config.num_hidden_layers],
        config.compress_ratios[config.num_hidden_layers :],
    )
    if any(stages):
        t.notes.append(f"compress_ratios end with {list(stages)}, read as 0: DSpark's stages have windows only")
    return replace(config, compress_ratios=(*main, *(0 for _ in stages)))


def _forget(t: Tensors, names: Sequence[str], whose: str) -> None:
    for name in names:
        t.where.pop(name, None)
    if names:
        t.notes.append(f"{len(names)} tensors under mtp. are ignored, {whose}")
