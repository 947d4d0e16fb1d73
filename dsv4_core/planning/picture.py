"""The picture: FLOPs of a decoded token and cache of a sequence against context, V3.2, Pro and
Flash; needs the ``plots`` extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.files.writing import replaceable, whole
from dsv4_core.planning.claims import Predecessor
from dsv4_core.planning.plan import Graph

if TYPE_CHECKING:
    from pathlib import Path

CONTEXTS = (
    4096,
    1 << 16,
    1 << 18,
    1 << 20,
)  # the lines are straight from where the indexer has index_topk rows to choose from


def curves() -> dict[str, tuple[list[float], list[float]]]:
    """Give TFLOP (in FP8's equivalent) a token and GB a sequence at each context, by model."""
    before = Predecessor()
    drawn = {"V3.2": ([before.equivalent(n) / 1e12 for n in CONTEXTS], [before.cache_bytes(n) / 1e9 for n in CONTEXTS])}
    for name in ("pro", "flash"):
        graph = Graph(PRESETS[name])
        drawn[f"V4 {name.capitalize()}"] = (
            [graph.decode(1, n).equivalent / 1e12 for n in CONTEXTS],
            [graph.cache_bytes(n) / 1e9 for n in CONTEXTS],
        )
    return drawn


def draw(path: Path) -> None:
    """Write the picture, SVG or PNG by its suffix; raise ``ValueError`` where matplotlib is not
    installed.
    """
    if path.suffix not in {".svg", ".png"}:
        raise ValueError(f"--picture {path}: its name must end in .svg or .png")
    replaceable(path, b"<?xml" if path.suffix == ".svg" else b"\x89PNG")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install 'dsv4[plots]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (flops, cache)), colour in zip(curves().items(), ("#888888", "#1f6feb", "#2da44e"), strict=True):
        for axes, values, unit in ((left, flops, "TFLOP"), (right, cache, "GB")):
            axes.plot(
                [n / 1024 for n in CONTEXTS], values, color=colour, label=f"{name}: {values[-1]:.2f} {unit} at 1M"
            )
    left.set(title="Operations of a decoded token (FP8 equivalent)", ylabel="TFLOP")
    right.set(title="KV cache of a sequence", ylabel="GB")
    for axes in (left, right):
        axes.set(xlabel="context, K tokens", xlim=(0, 1024), ylim=(0, None))
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    with whole(path) as file:
        figure.savefig(file, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
