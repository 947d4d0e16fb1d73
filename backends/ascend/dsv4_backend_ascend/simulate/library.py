"""The registry behind simulated CANN: kernels under the real schemas, arguments bound and checked,
one chip at a time.

torch's dispatcher is one per process, and so is the simulated chip: ``install`` puts it in place,
and a second call changes its generation.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from dsv4_backend_ascend.capability import GENERATIONS, Generation
from dsv4_backend_ascend.constraints import violation
from dsv4_backend_ascend.schema import bind, namespace, schemas

Kernel = Callable[[SimpleNamespace], Any]
"""Takes the bound arguments of a call, every one of the schema's by name, and gives its results."""

KERNELS: dict[str, Kernel] = {}
SHAPES: dict[str, Kernel] = {}


class CannError(RuntimeError):
    """A call that the documents do not allow."""


def simulated(op: str, *, shapes: Kernel) -> Callable[[Kernel], Kernel]:
    """Register the function below as the CPU kernel of an npu op, with its shape function."""

    def register(kernel: Kernel) -> Kernel:
        KERNELS[op], SHAPES[op] = kernel, shapes
        return kernel

    return register


@dataclass
class Chip:
    """The simulated chip: its generation, how often each op ran, and the faulty kernels planted in
    it.
    """

    generation: Generation
    libraries: dict[str, torch.library.Library]
    calls: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Callable[[Kernel], Kernel]] = field(default_factory=dict)

    def run(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Check a call against the documents, then compute it."""
        arguments = bind(op, args, kwargs)
        if broken := violation(op, self.generation, arguments):
            raise CannError(broken)
        self.calls[op] += 1
        kernel = self.faults[op](KERNELS[op]) if op in self.faults else KERNELS[op]
        return kernel(arguments)

    @contextmanager
    def planted(self, op: str, fault: Callable[[Kernel], Kernel]) -> Iterator[None]:
        """Run ``fault(kernel)`` in place of an op's kernel, to see whether the self-test
        notices.
        """
        self.faults[op] = fault
        try:
            yield
        finally:
            del self.faults[op]


_chip: Chip | None = None


def install(generation: Generation) -> Chip:
    """Register simulated CANN for a generation.

    Raises ``RuntimeError`` where torch-npu is installed: its own ops come first.
    """
    global _chip  # noqa: PLW0603
    if generation not in GENERATIONS:
        raise ValueError(f"generation {generation!r} is not one of {', '.join(GENERATIONS)}")
    if importlib.util.find_spec("torch_npu") is not None:
        raise RuntimeError(
            "torch-npu is installed: simulated CANN does not load beside it; use an environment without it, or run on the NPU"
        )
    if _chip is None:
        libraries = {name: torch.library.Library(name, "DEF") for name in dict.fromkeys(map(namespace, schemas()))}
        _chip = Chip(generation, libraries)
        for op, schema in schemas().items():
            name, _, declared = schema.partition("::")
            libraries[name].define(declared)
            libraries[name].impl(op, functools.partial(_chip.run, op), "CPU")
            torch.library.register_fake(f"{name}::{op}", functools.partial(_shape, op), lib=libraries[name])
    _chip.generation = generation
    return _chip


def _shape(op: str, *args: Any, **kwargs: Any) -> Any:
    return SHAPES[op](bind(op, args, kwargs))


def undefined(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Fill results that the documents leave undefined with NaN or the lowest integer: who relies on
    them notices.
    """
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, poison, dtype=dtype, device=like.device)
