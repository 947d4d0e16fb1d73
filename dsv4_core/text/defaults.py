"""What a checkpoint asks for where a request says nothing: ``generation_config.json`` beside
``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4_core.files.reading import json_file
from dsv4_core.files.tokenizers import GenerationConfig

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4_core.checkpoint.config import ModelConfig

FILE = "generation_config.json"


@dataclass(frozen=True)
class Defaults:
    """``temperature`` 0 is greedy. ``ends``: ids that end a text, of both files. ``said``: whether
    the file is there and says how to sample.
    """

    temperature: float
    top_p: float
    ends: frozenset[int]
    said: bool


def defaults(directory: Path, config: ModelConfig) -> Defaults:
    """Read what the checkpoint asks for; greedy where it asks for nothing, or for no sampling
    (``do_sample`` false).

    Raises ``FileError`` for a file that is none, with the key, its value and the rule.
    """
    end = config.eos_token_id
    ends = {*end} if isinstance(end, tuple) else {end}
    try:
        form = json_file(directory / FILE, GenerationConfig, f"repair {FILE}, or delete it: its values are defaults")
    except FileNotFoundError:
        return Defaults(0.0, 1.0, frozenset(ends), said=False)
    more = form.eos_token_id
    ends |= set() if more is None else {*more} if isinstance(more, list) else {more}
    samples = form.do_sample is not False and (form.do_sample or form.temperature is not None)
    temperature = (1.0 if form.temperature is None else form.temperature) if samples else 0.0
    top_p = form.top_p if samples and form.top_p is not None else 1.0
    return Defaults(
        temperature, top_p, frozenset(ends), said=form.do_sample is not None or form.temperature is not None
    )
