"""config.json as tools write it, read as the published one: nothing is guessed, and every reading
is noted.

A spelling is another way to say the same thing. Where a file says what dsv4 has no meaning for,
``ConfigError`` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4_core.files import forms

Values = dict[str, Any]
TEXT_TYPES = ("deepseek_v4", "deepseek_v4_text")
"""``model_type`` of the language model within a configuration of several parts."""
_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
NO_EFFECT = {"mscale": 0, "mscale_all_dim": 0, "attention_factor": 1, "truncate": True}
"""Keys of a scaling that other models have, and what they must say: nothing, as if they were not
there.
"""
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


class ConfigError(ValueError):
    """A configuration that this model definition cannot run: the message names the key, its value
    and the rule.
    """


def published(values: Values) -> tuple[Values, list[str]]:
    """Give config.json's values under the published keys, and a sentence for every other spelling
    that was read.

    Raises ``ConfigError`` for one that contradicts itself or means what dsv4 does not have.
    """
    values = dict(values)
    read = [reader(values) for reader in READERS]
    return values, [f"config.json: {note}" for note in read if note]


def _taken(values: Values, *keys: str) -> list[Any]:
    return [values.pop(key, None) for key in keys]


def _text_config(values: Values) -> str | None:
    """``text_config``: the language model's keys one level down, as in files of models with other
    parts (its ``model_type`` must be deepseek_v4).
    """
    text = values.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in TEXT_TYPES:
        return None
    for key, value in text.items():
        if key in {"model_type", "architectures"}:
            continue
        if values.setdefault(key, value) != value and key in forms.Config.__struct_fields__:
            raise ConfigError(
                f"config.json: text_config says {key} = {value!r}, {key} itself says {values[key]!r}; keep the one that "
                "the weights were made with"
            )
    del values["text_config"]
    values |= {"model_type": TEXT_TYPES[0], "architectures": ["DeepseekV4ForCausalLM"]}
    return "the model's keys are read from text_config"


def _nulls(values: Values) -> str | None:
    """``eos_token_id`` and ``num_nextn_predict_layers`` that are null: none."""
    found = []
    if values.get("eos_token_id", 1) is None:
        values["eos_token_id"] = []
        found.append("eos_token_id is null: no token of this file ends a text")
    if values.get("num_nextn_predict_layers", 1) is None:
        values["num_nextn_predict_layers"] = 0
        found.append("num_nextn_predict_layers is null: no MTP block")
    return "; ".join(found)


def _layer_types(values: Values) -> str | None:
    """``layer_types`` with ``compress_rates`` for ``compress_ratios`` (transformers 5)."""
    if (types := values.get("layer_types")) is None:
        return None
    rates = values.get("compress_rates")
    known = {"sliding_attention": 0, **(rates if isinstance(rates, dict) else {})}
    known = {name: known.get(name, ratio) for name, ratio in _RATIOS.items()}
    if not isinstance(types, list) or any(kind not in known for kind in map(str, types)):
        raise ConfigError(f"config.json: layer_types = {types!r} must be a list of {', '.join(known)}")
    ratios, have = [known[kind] for kind in types], values.get("compress_ratios")
    if have is None:
        values["compress_ratios"] = ratios
    elif not isinstance(have, list) or have[: len(ratios)] != ratios:
        raise ConfigError(
            f"config.json: layer_types and compress_rates say {ratios}, compress_ratios says {have!r}; keep the one "
            "that the weights were made with"
        )
    _taken(values, "layer_types", "compress_rates")
    return "compress_ratios are read from layer_types and compress_rates (written by transformers)"


def _hash_layers(values: Values) -> str | None:
    """``mlp_layer_types`` for ``num_hash_layers`` (transformers 5)."""
    if (types := values.get("mlp_layer_types")) is None:
        return None
    if not isinstance(types, list) or not {"hash_moe", "moe"} >= set(map(str, types)):
        raise ConfigError(f"config.json: mlp_layer_types = {types!r} must be a list of hash_moe and moe")
    count = types.count("hash_moe")
    if "hash_moe" in types[count:]:
        raise ConfigError(
            f"config.json: mlp_layer_types = {types!r}: a hash_moe layer after a moe layer is not implemented; "
            "the published models have them first"
        )
    if values.setdefault("num_hash_layers", count) != count:
        raise ConfigError(
            f"config.json: mlp_layer_types says {count} hash layers, num_hash_layers says {values['num_hash_layers']!r}; "
            "keep the one that the weights were made with"
        )
    del values["mlp_layer_types"]
    return "num_hash_layers is counted from mlp_layer_types (written by transformers)"


def _rope_head(values: Values) -> str | None:
    """``partial_rotary_factor`` for ``qk_rope_head_dim``."""
    factor, whole = values.get("partial_rotary_factor"), values.get("head_dim")
    if factor is None or "qk_rope_head_dim" in values or not isinstance(whole, int):
        return None
    if not isinstance(factor, int | float) or int(whole * factor) != whole * factor:
        raise ConfigError(
            f"config.json: partial_rotary_factor = {factor!r} times head_dim = {whole} must be an integer"
        )
    values["qk_rope_head_dim"] = int(whole * factor)
    return f"qk_rope_head_dim = {values['qk_rope_head_dim']} is read from partial_rotary_factor"


def _rope(values: Values) -> str | None:
    """``rope_parameters`` for ``rope_theta``, ``compress_rope_theta`` and ``rope_scaling``: with
    main and compress, with a part for each kind of layer, or flat beside ``compress_rope_theta``;
    only YaRN, or none, is implemented.
    """
    note, parameters = None, values.get("rope_parameters")
    if parameters is not None:
        main, compress = _rope_parts(parameters, values)
        if (kind := _kind(main)) != "default":
            raise ConfigError(
                f"config.json: rope_parameters.main has rope_type {kind!r}, which is not implemented; layers without "
                "compression have plain RoPE in the published models"
            )
        for key, part in (("rope_theta", main), ("compress_rope_theta", compress)):
            _agree(values, key, part.get("rope_theta"), "rope_parameters")
        scaling = {key: value for key, value in compress.items() if key not in {"rope_theta", "partial_rotary_factor"}}
        _agree(values, "rope_scaling", _scaling(scaling), "rope_parameters", compare=_scaling)
        for part in (main, compress):
            _partial(values, part.get("partial_rotary_factor"))
        del values["rope_parameters"]
        note = "RoPE is read from rope_parameters (written by transformers)"
    if "rope_scaling" in values:
        given = values["rope_scaling"]
        if given is not None and not isinstance(given, dict):
            raise ConfigError(f"config.json: rope_scaling = {given!r} must be an object, or null for none")
        values["rope_scaling"] = _scaling(given or {"type": "default"})
        if note is None and (given is None or _kind(given) == "default"):
            note = "rope_scaling is none: layers with a ratio have plain RoPE, without YaRN"
    return note


def _rope_parts(parameters: Any, values: Values) -> tuple[Values, Values]:
    """Give what ``rope_parameters`` says of layers without and with compression."""
    if not isinstance(parameters, dict):
        raise ConfigError(f"config.json: rope_parameters = {parameters!r} must be an object")
    parts = {key: part for key, part in parameters.items() if isinstance(part, dict)}
    if parts and parts.keys() == parameters.keys():
        if parts.keys() == {"main", "compress"}:
            return parts["main"], parts["compress"]
        plain, *compressed = _RATIOS
        wide = [parts[kind] for kind in compressed if kind in parts]
        if plain in parts and wide and parts.keys() <= _RATIOS.keys() and all(part == wide[0] for part in wide):
            return parts[plain], wide[0]
    elif not parts and "rope_theta" not in parameters:
        return {}, parameters
    elif not parts and "compress_rope_theta" in values:
        theta = parameters["rope_theta"]
        return {"rope_theta": theta}, {key: value for key, value in parameters.items() if key != "rope_theta"}
    raise ConfigError(
        f"config.json: rope_parameters has {', '.join(map(str, parameters)) or 'no key'}, which does not say what RoPE layers "
        f"with and without compression have; dsv4 reads main and compress, {' and '.join(_RATIOS)} (the last two alike), or "
        "only the scaling beside compress_rope_theta: copy config.json from the published checkpoint"
    )


def _kind(scaling: Values) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _scaling(scaling: Values) -> Values:
    """Give scaling in the published keys: YaRN without a magnitude; none is YaRN by a factor of
    1.
    """
    kind = _kind(scaling)
    if {"rope_type", "type"} <= scaling.keys() and scaling["rope_type"] != scaling["type"]:
        raise ConfigError(
            f"config.json: rope_scaling has type {scaling['type']!r} and rope_type {scaling['rope_type']!r}; keep one"
        )
    if "rope_type" not in scaling and "type" not in scaling and scaling.get("factor") is not None:
        kind = "yarn"  # as the published code takes it
    if kind == "default":
        return {"type": "yarn", "factor": 1}
    if kind != "yarn":
        raise ConfigError(
            f"config.json: rope_scaling of type {kind!r} is not implemented, and other positions would be computed without "
            "it; the published models have 'yarn'"
        )
    for key, none in NO_EFFECT.items():
        if (said := scaling.get(key)) not in (None, none):
            raise ConfigError(
                f"config.json: rope_scaling.{key} = {said!r} is not implemented; the published models blend frequencies as "
                f"if it were {none}, and scale no magnitude"
            )
    if missing := [key for key in _YARN[:2] if key not in scaling]:
        raise ConfigError(
            f"config.json: rope_scaling is yarn without {' and '.join(missing)}, which other positions would be computed "
            "without; copy it from the published config.json"
        )
    return {"type": "yarn", **{key: scaling[key] for key in _YARN if key in scaling}}


def _agree(
    values: Values, key: str, found: Any, where: str, compare: Callable[[Any], Any] = lambda value: value
) -> None:
    """Take a value of another spelling; both may be there where they say the same."""
    if found is None:
        return
    have = values.setdefault(key, found)
    if have is None or compare(have) != found:
        raise ConfigError(
            f"config.json: {where} says {key} = {found!r}, {key} itself says {have!r}; keep the one that the weights were "
            "made with"
        )


def _partial(values: Values, factor: Any) -> None:
    whole, rope = values.get("head_dim"), values.get("qk_rope_head_dim")
    if factor is None or not isinstance(whole, int):
        return
    if values.setdefault("qk_rope_head_dim", int(whole * factor)) != int(whole * factor):
        raise ConfigError(
            f"config.json: rope_parameters says partial_rotary_factor = {factor!r} of head_dim = {whole}, qk_rope_head_dim "
            f"says {rope!r}; keep the one that the weights were made with"
        )


def _experts(values: Values) -> str | None:
    """``expert_dtype`` within ``quantization_config`` (transformers 5)."""
    quantised = values.get("quantization_config")
    if isinstance(quantised, dict) and "expert_dtype" in quantised and "expert_dtype" not in values:
        values["expert_dtype"] = quantised["expert_dtype"]
        return "expert_dtype is read from quantization_config"
    return None


def _tied(values: Values) -> str | None:
    """``tie_word_embeddings``: head or embedding may be missing."""
    if values.get("tie_word_embeddings"):
        return "tie_word_embeddings: where head.weight or embed.weight is missing, the other is used"
    return None


READERS = (_text_config, _nulls, _layer_types, _hash_layers, _rope_head, _rope, _experts, _tied)
"""Each reads one other spelling where it is there, and says so."""
