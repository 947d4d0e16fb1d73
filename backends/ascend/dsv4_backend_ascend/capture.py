"""A dry capture: whether a decode step can be recorded as a graph of an NPU's, as far as can be
seen without one.

A graph replays launches on the addresses that they had. So a step must read nothing on the host,
launch nothing on AICPU, and read buffers that outlive it: its own input, weights, cache, and what
the backend keeps for good. The step runs twice on tensors without data; what it reads and did not
make must be the very same storages both times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_backend_ascend.cann.call import dry_run, watched
from dsv4_backend_ascend.launches import ShapesBackend
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Addresses, Step
from dsv4_core.planning.shapes import ShapeSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_backend_ascend.capability import Generation
    from dsv4_core.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class Captured:
    """What a dry capture showed. ``buffers``: storages that the step reads and did not make.
    ``moved``: operators that read others in the second run than in the first, each once; ``host``:
    what was read on the host, or nothing.
    """

    buffers: int
    moved: tuple[str, ...]
    host: str = ""

    @property
    def sound(self) -> bool:
        """Whether a graph may hold it."""
        return not self.moved and not self.host


class _Reads(TorchDispatchMode):
    """Notes storages that operators read and that no operator of the run made. Holds all, so that
    no address comes twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Any] = {}
        self.outside: dict[int, tuple[Any, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operator and run it."""
        result = func(*args, **(kwargs or {}))
        self.note(func.name(), "", (args, kwargs), result)
        return result

    def note(self, op: str, _dtype: str, operands: Any, results: Any) -> None:
        """Note an operator's operands and results."""
        for key, storage in _storages(operands):
            if key not in self.made:
                self.outside.setdefault(key, (storage, op))
        self.made |= {key: storage for key, storage in _storages(results) if key not in self.outside}


def _storages(values: Any) -> list[tuple[int, Any]]:
    tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
    return [(t.untyped_storage()._cdata, t.untyped_storage()) for t in tensors]  # noqa: SLF001


def reads(run: Callable[[], Any]) -> _Reads:
    """Run something and note what it reads."""
    seen = _Reads()
    with seen, watched(seen.note):
        run()
    return seen


def compare(run: Callable[[], Any]) -> Captured:
    """Run a step twice, after once to warm it up."""
    try:
        run()
        first, second = reads(run), reads(run)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        return Captured(0, (), str(error).strip().splitlines()[0])
    other = {key: found for key, found in second.outside.items() if key not in first.outside}
    return Captured(len(first.outside), tuple(sorted({name for _, name in other.values()})))


def dry_capture(
    config: ModelConfig, generation: Generation, *, tier: str, start: int, batch: int = 1, **options: Any
) -> Captured:
    """Capture one decode step of a model's own sizes, ``start`` tokens before it."""
    backend = ShapesBackend(soc=generation, tier=tier, **options)
    with torch.no_grad(), dry_run(generation):
        model = Model(ShapeSource(config), backend)  # type: ignore[arg-type]
        cache = Cache(backend, config, batch, start + 1)
        cache.lengths[:] = cache.furthest[:] = start
        step = Step(cache, np.zeros((batch, 1), np.int32))
        buffer = backend.from_numpy(step.host)

        def logits() -> Any:
            return model.logits(model.forward(Addresses(cache, step.shape, buffer)))

        return compare(backend.alone(logits))
