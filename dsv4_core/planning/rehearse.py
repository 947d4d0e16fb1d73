"""A full-size rehearsal: the whole published layout as sparse files, and a few tokens through all
of its layers.

Names, shapes, dtypes, shards and index are the published ones. Small tensors are filled (embedding,
head, norms, gates, mHC, dense scales, sinks, positional tables, hash tables), expert scales and big
weights are holes and read as zero. So the text means nothing, while opening, mapping, routing,
dequantising, caching and every shape are those of the real model, and memory and time are measured.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_core.checkpoint.create import create
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.sampling import NoNumberError
from dsv4_core.graph.step import Fed, Step
from dsv4_core.planning.counting import total
from dsv4_core.planning.plan import Graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.layout import TensorSpec
    from dsv4_core.checkpoint.tensors import Progress
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.model import Block


def filled(spec: TensorSpec) -> bool:
    """Whether a rehearsal's checkpoint holds values for this tensor, rather than a hole."""
    if ".experts." in spec.name:
        return False
    small = spec.dtype in {"F8_E8M0", "F32", "I64"} or spec.name.endswith(("norm.weight", "gate.weight"))
    return small or spec.kind in {"embedding", "head", "norm"}


def write(path: Path, config: ModelConfig, *, seed: int = 0, progress: Progress | None = None) -> int:
    """Write the sparse checkpoint to a new directory; give the bytes that its files have (on the
    disk they take far fewer).
    """
    return create(path, config, seed=seed, filled=filled, progress=progress)


def on_disk(path: Path) -> int:
    """Bytes that a directory's files take on the disk."""
    return sum(512 * file.stat().st_blocks for file in path.iterdir())


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process in memory: all (``VmRSS``), or pages of files alone (``RssFile``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {kind}: a rehearsal measures its memory on Linux")


def available() -> int:
    """Bytes of memory that this machine has for new pages."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class StepReport:
    """One step: its tokens, seconds, bytes of weights touched and predicted, most resident memory,
    and the sampled id.
    """

    tokens: int
    seconds: float
    touched: int
    predicted: float
    peak: int
    sampled: int


class Rehearsal(Model):
    """The model, which after each layer notes memory and gives weights' pages back when more than
    ``memory`` bytes, or a quarter of what the machine has left, are resident.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        memory: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.checkpoint, self.memory = checkpoint, memory
        super().__init__(checkpoint, backend, progress=progress)
        self.begin()

    def begin(self) -> None:
        """Start counting anew, with no page of a weight in memory."""
        self.checkpoint.release()
        self.touched, self.peak, self.files = 0, 0, resident("RssFile")

    def note(self) -> None:
        """Count what has been touched since the last note."""
        files, everything = resident("RssFile"), resident()
        self.touched += files - self.files
        self.peak = max(self.peak, everything)
        if everything > min(self.memory, available() // 4):  # before the system takes back pages not yet counted
            self.checkpoint.release()
            files = resident("RssFile")
        self.files = files

    def block(self, block: Block, h: Array, step: Fed) -> Array:
        """One layer, then a note."""
        h = super().block(block, h, step)
        self.note()
        return h


def run(model: Rehearsal, prompt: list[int], tokens: int) -> Iterator[StepReport]:
    """Generate ``tokens`` greedy tokens and report every step."""
    be, config = model.backend, model.config
    experts = model.blocks[0].ffn.experts[0].dtype
    graph = Graph(config, like=be, numerics=be.numerics, expert_format="e4m3" if "e4m3" in experts else "e2m1")
    cache = Cache(be, config, 1, len(prompt) + tokens)
    ids = prompt
    for _ in range(tokens):
        start = int(cache.lengths[0])
        model.begin()
        began = time.perf_counter()
        step = Step(cache, np.array([ids]))
        h = model.forward(step)
        cache.advance(step.sequences, step.ends)
        logits = model.logits(h[len(ids) - 1 :])
        picked = be.sample(logits, be.from_numpy(np.zeros(1, np.float32)), temperature=0.0, top_p=1.0)
        sampled = int(be.to_numpy(picked)[0])
        if sampled < 0:
            raise NoNumberError(start + len(ids))
        seconds = time.perf_counter() - began
        model.note()
        predicted = total(graph.step(1, len(ids), start)).weights
        yield StepReport(len(ids), seconds, model.touched, predicted, model.peak, sampled)
        ids = [sampled]


def peak_resident() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(reports: list[StepReport]) -> dict[str, Any]:
    """All steps together."""
    touched, predicted = sum(r.touched for r in reports), sum(r.predicted for r in reports)
    return {
        "touched": touched,
        "predicted": predicted,
        "difference": touched / predicted - 1,
        "seconds": sum(r.seconds for r in reports),
    }
