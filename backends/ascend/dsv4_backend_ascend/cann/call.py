"""The one place from which npu ops are called, and the dry run in which calls are checked
instead.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from dsv4_backend_ascend.constraints import violation
from dsv4_backend_ascend.schema import bind, namespace, overload
from dsv4_backend_ascend.simulate import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_backend_ascend.capability import Generation


Watch: TypeAlias = "Callable[[str, str, Any, Any], None]"


class RefusedError(Exception):
    """A call that the documents do not allow on the planned generation: the reason."""


_planned: ContextVar[Generation | None] = ContextVar("planned", default=None)
_watching: ContextVar[Watch | None] = ContextVar("watching", default=None)


def call(op: str, **arguments: Any) -> Any:
    """Call an npu op; in a dry run, check the call and give results without data."""
    generation = _planned.get()
    if generation is None:
        return overload(op)(**arguments)
    bound = bind(op, (), arguments)
    if broken := violation(op, generation, bound):
        raise RefusedError(broken)
    if not _watching.get():
        return SHAPES[op](bound)
    with _disable_current_modes():  # what makes its results' shapes is not launched
        results = SHAPES[op](bound)
    tell(f"{namespace(op)}::{op}", arguments, results)
    return results


def planning() -> bool:
    """Whether this is a dry run."""
    return _planned.get() is not None


def tell(name: str, operands: Any, results: Any) -> None:
    """Tell whoever watches a dry run of a launch that torch does not dispatch."""
    if watch := _watching.get():
        first = next(t for t in tree_leaves(operands) if isinstance(t, torch.Tensor))
        watch(name, str(first.dtype).removeprefix("torch."), operands, results)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Tell ``watch`` of the calls of a dry run: the op, the dtype of its first operand, all
    arguments, and results.
    """
    token = _watching.set(watch)
    try:
        yield
    finally:
        _watching.reset(token)


@contextmanager
def dry_run(generation: Generation) -> Iterator[None]:
    """Check the calls made inside against the documents; pass tensors of the meta device. Raises
    ``RefusedError``.
    """
    token = _planned.set(generation)
    try:
        yield
    finally:
        _planned.reset(token)
