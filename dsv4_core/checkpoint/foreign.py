"""What looks like a DeepSeek-V4 checkpoint and cannot be read: recognised first, and named in one
sentence.

Every sentence says what it is, that dsv4 does not read it, and what to use instead. None of these
files is broken, so none of the sentences asks for a change to one. Sources: the marks that the
writing tools themselves put into config.json, file names and tensor names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dsv4_core.checkpoint.spellings import TEXT_TYPES

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

PUBLISHED = "deepseek-ai/DeepSeek-V4-Flash-0731 or -Pro-0813"
_GET = f"use the published checkpoint ({PUBLISHED})"
_TYPE = "deepseek_v4"
_ARCHITECTURE = "DeepseekV4ForCausalLM"
OTHERS = {
    "deepseek_v41": "DeepSeek-V4.1",
    "deepseek_v41_text": "DeepSeek-V4.1",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v2": "DeepSeek-V2",
    "kimi_k2": "Kimi K2",
}
_V41_KEYS = ("engram_", "kv_source_layer_ids", "index_source_layer_ids", "candidate_")
_OWN = ("fp8", "w8a8-int8", "ascend")  # ascend: which of ModelSlim's schemes it is, the tensors say
QUANTISERS = {
    "modelopt": "NVIDIA ModelOpt's",
    "modelopt_fp4": "NVIDIA ModelOpt's NVFP4",
    "nvfp4": "NVIDIA's NVFP4",
    "compressed-tensors": "the compressed-tensors",
    "compressed_tensors": "the compressed-tensors",
    "awq": "the AWQ",
    "gptq": "the GPTQ",
    "bitsandbytes": "the bitsandbytes",
    "auto-round": "the AutoRound",
    "quark": "AMD Quark's",
    "mxfp4": "a generic MXFP4",
}


MARKS = {
    "weight_scale_2": "NVIDIA ModelOpt's NVFP4",
    "deq_scale": "ModelSlim's static W8A8",
    "quant_bias": "ModelSlim's static W8A8",
    "input_offset": "ModelSlim's static W8A8",
    "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "qweight": "AWQ or GPTQ",
    "qzeros": "AWQ or GPTQ",
    "weight_global_scale": "compressed-tensors",
    "scales": "MLX",
    "gate_up_proj": "transformers in memory, without save_original_format,",
    "absmax": "bitsandbytes",
    "quant_state": "bitsandbytes",
}
"""Last parts of names that only one kind of file has."""
PARTS = {
    ".attn_hc.": "MLX",
    ".ffn_hc.": "MLX",
    ".switch_mlp.": "MLX",
    ".experts.w1.": "a tool that joins a layer's experts in one tensor (such as MLX)",
    ".lora_A.": "a LoRA adapter",
    ".lora_B.": "a LoRA adapter",
}
"""Parts of names that only one kind of file has."""


def path_problem(path: Path) -> str | None:
    """Say why a path that is no model directory, or one with other files, cannot be read; None
    where it may be.
    """
    if path.is_file():
        if path.suffix.lower() == ".gguf" or _starts_with(path, b"GGUF"):
            return f"{path}: a GGUF file, which dsv4 does not read; {_GET}, or run this file with llama.cpp"
        if path.suffix == ".safetensors":
            return f"{path}: a single file; give its directory {path.parent}, which must hold config.json, too"
        return f"{path}: a file; give a model directory (config.json and *.safetensors)"
    if path.is_dir() and not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        return (
            f"{path}: a LoRA adapter (adapter_config.json), which dsv4 does not apply; {_GET}, or one it is merged into"
        )
    if path.is_dir() and (parts := sorted(path.glob("model*-mp*.safetensors"))):
        what = f"{parts[0].name}, as the release's inference/convert.py splits a model for its own code"
        return f"{path}: holds {what}, which dsv4 does not read; {_GET}"
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return None
    if gguf := sorted(path.glob("*.gguf")):
        what = f"GGUF files ({gguf[0].name})"
        return f"{path}: holds {what}, which dsv4 does not read; {_GET}, or run them with llama.cpp"
    if other := sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        return f"{path}: holds PyTorch pickles ({other[0].name}), which dsv4 does not read; {_GET}, in safetensors"
    return None


def config_problem(values: dict[str, Any]) -> str | None:
    """Say which other model, or which other quantisation, a config.json describes; None where it
    may be DeepSeek-V4.
    """
    return _other_model(values) or _other_quantisation(values)


def _other_model(values: dict[str, Any]) -> str | None:
    kind, architectures = values.get("model_type"), values.get("architectures")
    text = values.get("text_config")
    if kind == "deepseek_v41" or (isinstance(text, dict) and text.get("model_type") == "deepseek_v41_text"):
        kind = "deepseek_v41"
    elif kind == _TYPE and (keys := sorted(key for key in values if key.startswith(_V41_KEYS))):
        return (
            f"config.json: {keys[0]} is a key of DeepSeek-V4.1, another architecture, whatever model_type says; "
            f"dsv4 runs DeepSeek-V4: {_GET}"
        )
    if kind == _TYPE or (isinstance(text, dict) and text.get("model_type") in TEXT_TYPES):
        return None
    if isinstance(kind, str) and re.sub(r"[\W_]+", "_", kind.lower()) == _TYPE:
        return (
            f"config.json: model_type {kind!r} must be spelt '{_TYPE}': copy config.json from the published checkpoint"
        )
    if kind is None:
        if isinstance(architectures, list | tuple) and _ARCHITECTURE in architectures:
            return None
        named = f"and architectures = {architectures!r}" if architectures else "and no architectures"
        return (
            f"config.json: no model_type {named}, so that nothing says which model this is; dsv4 runs model_type "
            f"'{_TYPE}': copy config.json from the published checkpoint"
        )
    name = OTHERS.get(kind) if isinstance(kind, str) else None
    what = f"is {name}, another architecture" if name else "is another architecture"
    return f"config.json: model_type {kind!r} {what}, which dsv4 does not run; it runs '{_TYPE}': {_GET}"


def _other_quantisation(values: dict[str, Any]) -> str | None:
    quant = values.get("quantization_config")
    if isinstance(mlx := values.get("quantization"), dict) and "bits" in mlx:
        return _quantised("MLX's", f"quantization = {_short(mlx)}")
    if not isinstance(quant, dict) or not quant:
        return None
    algorithms = {str(quant.get(key, "")).upper() for key in ("moe_quant_algo", "quant_algo")}
    for algorithm in algorithms:
        if "NVFP4" in algorithm or "MIXED_PRECISION" in algorithm:
            return _quantised("NVIDIA ModelOpt's NVFP4", f"quant_algo {algorithm}")
    method = quant.get("quant_method")
    if method is None:
        if "bits" in quant and "group_size" in quant:
            return _quantised("MLX's", f"quantization_config = {_short(quant)}")
        return None
    if method not in _OWN:
        return _quantised(QUANTISERS.get(str(method).lower(), "another"), f"quant_method {method!r}")
    if method == "fp8":
        if (fmt := quant.get("fmt", "e4m3")) != "e4m3":
            return _quantised("another FP8", f"fmt {fmt!r}")
        if quant.get("weight_block_size", [128, 128]) not in ([128, 128], None):
            block = quant["weight_block_size"]
            return f"config.json: weight_block_size {block}: scales of other blocks than 128 x 128, which dsv4 does not read; {_GET}"
    return None


def _quantised(what: str, mark: str) -> str:
    return f"config.json: weights in {what} quantisation ({mark}), which dsv4 does not read; {_GET}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def names_problem(names: Collection[str]) -> str | None:
    """Say whose tensor names these are, where they are known and not read; None for any others."""
    for name in names:
        stem, _, last = name.rpartition(".")
        if what := MARKS.get(last):
            return _tensors(what, name)
        if last == "input_scale" and f"{stem}.scale" in names:
            return _tensors(MARKS["weight_scale_2"], name)
        if what := next((what for part, what in PARTS.items() if part in name), None):
            return _tensors(what, name)
    return None


def strange_names(path: Path, names: Collection[str], layout: Collection[str]) -> str | None:
    """Say that the names are of no kind that is known here, where that is so of most of them; None
    else.
    """
    strange = [name for name in names if name not in layout]
    missing = [name for name in layout if name not in names]
    if not names or 2 * len(strange) < len(names) or 2 * len(missing) < len(layout):
        return None
    return (
        f"{path}: {len(strange)} of {len(names)} tensors have names that dsv4 does not know (such as {strange[0]}), and "
        f"{len(missing)} of the {len(layout)} that config.json needs are not there (such as {missing[0]}): these are another "
        f"model's weights, or another tool's; {_GET}"
    )


def nvfp4_scales(name: str) -> str:
    """Say that FP4 weights have NVIDIA's scales: FP8 numbers, one per 16 channels."""
    return _tensors("NVIDIA's NVFP4 (scales in F8_E4M3)", name)


def modelslim_problem(path: Path) -> str | None:
    """Say which of ModelSlim's schemes a directory holds, by its description; None without one, and
    for plain W8A8.
    """
    for file in sorted(path.glob("quant_model_description*.json")):
        text = file.read_text(errors="replace").lower()
        if "quarot" in text or "rotat" in text:
            return f"{path}: ModelSlim weights rotated by QuaRot ({file.name}), which dsv4 does not read; {_GET}"
        found = set(re.findall(r'"(w\d+a\d+\w*)"', text))
        if other := sorted(found - {"w8a8_dynamic"}):
            return f"{path}: ModelSlim weights in {', '.join(other).upper()} ({file.name}), which dsv4 does not read; {_GET}"
    return None


def asymmetric(name: str) -> str:
    """Say that int8 weights have offsets."""
    return f"int8 weights with offsets that are not zero ({name}), which dsv4 does not read; {_GET}"


def _tensors(what: str, name: str) -> str:
    return f"weights as {what} has them (tensor {name}), which dsv4 does not read; {_GET}"


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
