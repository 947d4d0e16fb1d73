"""Hypothesis strategies shaped like this model: lengths at the edges of its windows, chunkings,
ragged batches; and examples written as ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Mapping

Example = dict[str, Any]
WINDOW = 16  # of the laws' models
EDGES = (
    1,
    3,
    4,
    5,
    7,
    8,
    WINDOW - 1,
    WINDOW,
    WINDOW + 1,
    2 * WINDOW,
    127,
    128,
    129,
)  # windows of 4, 16 and 128, just short of them, one past

seeds = st.integers(0, 999)
lengths = st.sampled_from(EDGES) | st.integers(1, 140)
lengths_or_none = st.just(0) | lengths
ratios = st.sampled_from(((0,), (4,), (128,), (0, 4), (0, 4, 128)))
chunks = st.lists(lengths, min_size=1, max_size=5)
steps = st.lists(st.integers(1, 3), min_size=1, max_size=8)


def written(example: Mapping[str, Any]) -> str:
    """An example as part of an id: ``chunks=1+70,seed=3``; no character that a shell reads."""
    return ",".join(f"{k}={'+'.join(map(str, v)) if isinstance(v, (list, tuple)) else v}" for k, v in example.items())


def read(text: str, like: Mapping[str, Any]) -> Example:
    """The example that ``written`` wrote, with the keys and kinds of ``like``; raise ``ValueError``
    for another.
    """
    example: Example = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in like:
            raise ValueError(f"{part!r}: an example has {', '.join(like)}, e.g. {written(like)}")
        several = isinstance(like[key], (list, tuple))
        try:
            numbers = [int(n) for n in value.split("+") if n or not several]
        except ValueError:
            raise ValueError(f"{part!r}: {key} takes numbers; an example is {written(like)}") from None
        example[key] = type(like[key])(numbers) if several else numbers[0]
    if missing := like.keys() - example.keys():
        raise ValueError(f"{text!r} lacks {', '.join(sorted(missing))}, e.g. {written(like)}")
    return example
