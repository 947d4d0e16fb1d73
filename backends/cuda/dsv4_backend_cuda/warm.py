"""Compile what a model's steps launch before the first of them waits for it: dry runs in several
processes, which fill Triton's cache on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from dsv4_core.checkpoint.config import ModelConfig

BATCHES = (1, 4, 64)  # few enough tokens for the narrow tile; few experts' rows; many
PROMPT = 2048  # tokens of a prefill step, as `generate` cuts prompts


@dataclass(frozen=True)
class Warmed:
    """What one process compiled: by kernel how many specialisations, and what failed."""

    what: str
    specialisations: dict[str, int]
    failures: dict[str, str]


def parts(name: str, config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Cut a model into what meets different kernels: two layers of each ratio, the first routed by
    hash where any is.
    """
    for ratio in dict.fromkeys(config.compress_ratios):
        yield (
            f"{name}, ratio {ratio}",
            dataclasses.replace(
                config,
                num_hidden_layers=2,
                compress_ratios=(ratio,) * 2,
                num_nextn_predict_layers=0,
                num_hash_layers=min(1, config.num_hash_layers),
            ),
        )


def warm(models: dict[str, ModelConfig], capability: int, depth: str, *, jobs: int) -> Iterator[Warmed]:
    """Compile each part of the models in a process of its own, ``jobs`` at a time."""
    tasks = [(what, part, capability, depth) for name, config in models.items() for what, part in parts(name, config)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from pool.map(_part, tasks)


def _part(task: tuple[str, ModelConfig, int, Any]) -> Warmed:
    what, config, capability, depth = task
    from dsv4_backend_cuda import dry
    from dsv4_core.graph.model import Model
    from dsv4_core.planning.shapes import run_step

    record = dry.activate(capability, depth)
    model = Model(dry.VirtualSource(config), dry.DryBackend())
    room = config.max_position_embeddings
    for batch in BATCHES:
        run_step(model, batch=batch, seq=1, start=min(8191, room - 1))
    run_step(model, batch=1, seq=min(PROMPT, room), start=0)
    return Warmed(what, {k: len(v) for k, v in record.specialisations.items()}, dict(record.failures))
