"""docs/checkpoints.md: which checkpoints are read, and which are named and refused; made from the
tables that decide it.

``python -m dsv4_core.checkpoint.spelling_page > docs/checkpoints.md``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.checkpoint import foreign, layout, readings, spellings
from dsv4_core.checkpoint.config import ONLY, PRESETS
from dsv4_core.checkpoint.create import stored_bytes
from dsv4_core.checkpoint.layout import tensor_specs
from dsv4_core.files.markdown import in_lines

if TYPE_CHECKING:
    from collections.abc import Iterable

_INTRO = """# Checkpoints

Made by `python -m dsv4_core.checkpoint.spelling_page`; a test keeps it fresh.

dsv4 reads the published safetensors, and other spellings of them: other names, dtypes and keys that say the same. Every one is read without
loss or refused, none is guessed, and `dsv4 inspect` notes what was read. What cannot be read is named in one sentence, before anything else is said.
"""
_RULES = (
    ("no `mtp.*`, or unwanted by `num_nextn_predict_layers: 0`", "the main model runs; a note"),
    ("`mtp.*` of an unknown kind, or DSpark without its keys", "the main model runs; a note"),
    ("`compress_ratios` with too few or too many entries for `mtp.*`", "read as 0, or ignored; a note"),
    ("ratio 1", "read as 0: rows that are not compressed; a note"),
    ("`eos_token_id` as a list", "all of them end a text"),
    ("`generation_config.json`", "its temperature and top-p where a request gives none; its ends, too"),
    ("tied head (`tie_word_embeddings`, no `head.weight` or no `embed.weight`)", "the other is used"),
    ("keys of config.json that are not there and have one published value", "read as that; a note"),
    ("tables of rotary frequencies (`*.inv_freq`, `*.freqs_cis`)", "ignored: config.json gives them; a note"),
    ("small tensors with dimensions of 1 more or fewer", "read; a note"),
    ("one file of any name, without an index", "read"),
    ("copies of embedding and head under `mtp.0`", "ignored; a note"),
    ("Vision-Exp", "its text part is read: images are not; a note"),
    ("ModelSlim's W8A8, unrotated, offsets zero", "read as `dsv4 convert --to w8a8-int8` writes it; a note"),
    ("F32 block scales that are no powers of two", "the weights are read as float32; a note"),
    ("experts cut away (REAP)", "read; a hash table that still names them is an error when opened"),
    ("blocks with another number of experts than config.json's, by their gates", "read, by one process; a note"),
    ("ratios of DSpark's stages other than 0", "read as 0: they have windows only; a note"),
    ("keys of config.json that dsv4 does not use", "kept by `dsv4 convert`"),
)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _releases() -> str:
    rows = []
    for name, config in PRESETS.items():
        specs = tensor_specs(config)
        size = sum(map(stored_bytes, specs.values()))
        draft = {"": "none", "mtp": "MTP", "dspark": f"DSpark, {config.stages} stages"}[config.draft]
        rows.append((f"`{name}`", f"{len(specs)}", f"{size}", draft))
    return _table(("preset", "tensors", "bytes", "drafts by"), rows)


def page() -> str:
    """Give the document."""
    names = [(f"`{other}`", f"`{published}`") for other, published in (*layout.NAMES, *layout.WHOLE.items())]
    names += [(f"prefix `{wrapper}`, also several", "none") for wrapper in layout.WRAPPERS] + [
        ("suffix `.weight_scale`", "`.scale`")
    ]
    dtypes = [(f"`{stored}`", f"`{published}`", r.what) for (published, stored), r in readings.READINGS.items()]
    keys = [(" ".join((reader.__doc__ or "").split()),) for reader in spellings.READERS]
    refused = [(f"`model_type` {kind}", name) for kind, name in foreign.OTHERS.items()]
    refused += [(f"`quant_method` {kind}", f"{name} quantisation") for kind, name in foreign.QUANTISERS.items()]
    refused += [(f"tensors `{last}`", what) for last, what in (foreign.MARKS | foreign.PARTS).items()]
    refused += [
        ("a GGUF file, or a directory of them", "GGUF"),
        ("`*.bin`, `*.pt`, `*.pth` alone", "PyTorch pickles"),
        ("files that begin as Git LFS pointers, web pages, GGUF or ZIP archives do", "another file"),
        ("`adapter_config.json` alone", "a LoRA adapter"),
        ("`model0-mp8.safetensors`", "the release's own split, one file a rank"),
        ("FP4 with scales in F8_E4M3", "NVIDIA's NVFP4"),
        ("most names unknown, and most needed ones missing", "another model's, or another tool's"),
        *((f"`{key}` other than {harmless[0]}", "another model's key") for key, harmless in ONLY.items()),
        *((f"`rope_scaling.{key}` other than {none}", "other positions") for key, none in spellings.NO_EFFECT.items()),
        ("`rope_scaling` of a type other than yarn", "other positions"),
        ("keys `engram_*`, `kv_source_layer_ids`, `candidate_*`", "DeepSeek-V4.1 by another name"),
        ("`quant_model_description.json` that names QuaRot, W4A8, static W8A8", "ModelSlim's other schemes"),
    ]
    parts = (
        _INTRO,
        "## Releases\n",
        _releases(),
        "## Read: other names\n",
        _table(("part of a name", "read as"), names),
        "## Read: other dtypes\n",
        _table(("stored", "published", "how"), dtypes),
        "## Read: other keys of config.json\n",
        _table(("key",), keys),
        "## Read: the rest\n",
        _table(("what", "how"), _RULES),
        "## Named and refused\n",
        _table(("mark", "what it is"), refused),
    )
    return in_lines("\n".join(parts))


if __name__ == "__main__":
    print(page(), end="")
