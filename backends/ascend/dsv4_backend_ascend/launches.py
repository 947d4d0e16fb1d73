"""Rung L2b: what a step launches on a chip, and which of it runs on AI Core, on AICPU, or nowhere
that is known.

The real graph runs on tensors without data at a model's own sizes, in the tiers that the plan
gives, and every operator that torch dispatches is looked up in ``data/aicore.toml``. Counted are
operators, as torch-npu is handed them: what one of them launches inside is CANN's. No NPU is
needed, and none is asked.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from dsv4_backend_torch.numeric import torch_dtype
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann.call import dry_run, watched
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray, dtype_name
from dsv4_core.contract.ops import OPS
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.planning.shapes import ShapeSource, run_step

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_backend_ascend.capability import Generation
    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.model import Block
    from dsv4_core.graph.step import Step

Place = Literal["AI Core", "AICPU", "unknown", "none"]
"""Where an operator runs; none: it launches nothing."""


class Pair(NamedTuple):
    """An operator and the dtype that decides where it runs."""

    op: str
    dtype: str


@functools.cache
def _table() -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
    raw = tomllib.loads(resources.files("dsv4_backend_ascend").joinpath("data/aicore.toml").read_text(encoding="utf-8"))
    return {name: entry for entry in raw["op"] for name in entry["aten"]}, frozenset(raw["views"] + raw["made"])


def place(pair: Pair, generation: Generation) -> Place:
    """Where an operator runs on a generation, by the table."""
    entries, silent = _table()
    full = pair.op.removeprefix("aten::")
    name = full.partition(".")[0]
    if "::" in full:
        return "AI Core"  # an npu op: the documents of the capability table say on which chips it has a kernel
    if name in silent:
        return "none"
    entry = entries.get(full) or entries.get(name.removesuffix("_") or name) or entries.get(name)
    if entry is None:
        return "unknown"
    return "AI Core" if pair.dtype in entry["a5" if generation == "950" else "a2"] else "AICPU"


@dataclass
class Step2b:
    """What one step launched. ``layers``: by layer; None is what stands outside the layers
    (embedding, head, sampling). ``contracts``: by the contract that the graph called; "" is what
    the graph does itself.
    """

    generation: Generation
    tier: str
    layers: dict[int | None, Counter[Pair]] = field(default_factory=dict)
    contracts: dict[str, Counter[Pair]] = field(default_factory=dict)

    def note(self, layer: int | None, pair: Pair, contract: str = "") -> None:
        """Count one operator."""
        self.layers.setdefault(layer, Counter())[pair] += 1
        self.contracts.setdefault(contract, Counter())[pair] += 1

    @property
    def pairs(self) -> Counter[Pair]:
        """Of the whole step."""
        return sum(self.layers.values(), Counter())

    def at(self, where: Place) -> Counter[Pair]:
        """Those that run in one place."""
        return Counter({pair: n for pair, n in self.pairs.items() if place(pair, self.generation) == where})

    def launched(self, layer: int | Literal["all"] | None = "all") -> int:
        """How many operators launch something."""
        return self._launched(self.pairs if layer == "all" else self.layers.get(layer, Counter()))

    def by_contract(self) -> dict[str, int]:
        """Launches of each contract, most first."""
        counts = {name: self._launched(pairs) for name, pairs in self.contracts.items()}
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def _launched(self, pairs: Counter[Pair]) -> int:
        return sum(n for pair, n in pairs.items() if place(pair, self.generation) != "none")


class _Watch(TorchDispatchMode):
    """Notes every operator that torch hands to a device, composite ones as what they are composed
    of.
    """

    def __init__(self, step: Step2b, backend: ShapesBackend) -> None:
        super().__init__()
        self.step, self.backend = step, backend
        self.layer: int | None = None

    def note(self, op: str, dtype: str, *_: Any) -> None:
        """Count one operator of the layer and the contract that run."""
        self.step.note(self.layer, Pair(op, dtype), self.backend.running)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operator and run it."""
        kwargs = kwargs or {}
        name = func.name()
        composite = torch._C.DispatchKey.CompositeImplicitAutograd  # noqa: SLF001
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, composite) and name not in KEPT:  # noqa: SLF001
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        by = _table()[0].get(name.removeprefix("aten::").partition(".")[0].removesuffix("_"), {}).get("by", 0)
        deciding = given[min(by, len(given) - 1)] if given else made[0] if made else None
        if deciding is not None:
            self.note(name, str(deciding.dtype).removeprefix("torch."))
        return result


KEPT = frozenset({"aten::linear", "aten::matmul"})
"""Composite operators for which torch-npu has a kernel of its own."""


class ShapesBackend(AscendBackend):
    """The backend on a chip that is planned for, with arrays of shapes alone. ``running``: the
    contract that the graph called.
    """

    running = ""

    def from_numpy(self, array: Any) -> torch.Tensor:
        """An array of that shape."""
        if isinstance(array, torch.Tensor):
            return array
        return torch.empty(tuple(array.shape), dtype=torch_dtype(dtype_name(array)), device="meta")

    def load(self, weight: Any) -> Any:
        """A weight of that shape; its scales are far from BF16's end, as those of the published
        models are.
        """
        if not isinstance(weight, ScaledArray):
            return self.from_numpy(weight)
        loaded = ScaledArray(self.from_numpy(weight.data), self.from_numpy(weight.scale), weight.format)
        if weight.format != "int8":
            self.note_scales(loaded, 127)
            return self._as_mx(loaded) if self.generation == "950" else loaded
        return loaded

    def stacked_experts(self, experts: Experts) -> Any:
        """A stack of that shape."""
        from dsv4_backend_torch.weights import StackedExperts

        one = experts[0]
        parts = (one.data, one.scale) if isinstance(one, ScaledArray) else (one,)
        count = experts.shape[0]
        stacks = [
            torch.empty((count, *part.shape), dtype=torch_dtype(dtype_name(part)), device="meta") for part in parts
        ]
        if not isinstance(one, ScaledArray):
            return StackedExperts(stacks[0])
        stack = ScaledArray(*stacks, one.format)
        if one.format != "int8":
            self.note_scales(stack, 127)
        return StackedExperts(stack)

    def to_numpy(self, array: torch.Tensor) -> Host:
        """There is no data: reading it on the host is what a step must not do."""
        raise AssertionError(f"a step read an array of shape {tuple(array.shape)} on the host")


def _named(name: str) -> Callable[..., Any]:
    run = getattr(AscendBackend, name)

    @functools.wraps(run)
    def named(self: ShapesBackend, *args: Any, **kwargs: Any) -> Any:
        outer = self.running
        self.running = outer or name
        try:
            return run(self, *args, **kwargs)
        finally:
            self.running = outer

    return named


for _op in OPS:
    setattr(ShapesBackend, _op, _named(_op))


class _Layered(Model):
    """The graph, which tells the watch which layer runs."""

    watch: _Watch | None = None

    def block(self, block: Block, h: Array, step: Step) -> Array:
        """Run one layer."""
        if self.watch is None:
            return super().block(block, h, step)
        self.watch.layer = block.index
        try:
            return super().block(block, h, step)
        finally:
            self.watch.layer = None


def prepared(
    config: ModelConfig, generation: Generation, *, tier: str, start: int, batch: int = 1, seq: int = 1, **options: Any
) -> tuple[_Layered, Callable[[], Any]]:
    """A model of its own sizes on tensors without data, and one step of it with ``start`` tokens
    before it, which ran once: what is made once is made, the cache too. Call it, and run the step,
    in a dry run.
    """
    model = _Layered(ShapeSource(config), ShapesBackend(soc=generation, tier=tier, **options))
    cache = Cache(model.backend, config, batch, start + seq)
    run = functools.partial(run_step, model, batch=batch, seq=seq, start=start, cache=cache)
    run()
    return model, run


def count(config: ModelConfig, generation: Generation, *, tier: str, start: int, **options: Any) -> Step2b:
    """Run one step as ``prepared`` says, and count what it launches."""
    step = Step2b(generation, tier)
    with torch.no_grad(), dry_run(generation):
        model, run = prepared(config, generation, tier=tier, start=start, **options)
        model.watch = _Watch(step, model.backend)  # type: ignore[arg-type]
        with model.watch, watched(model.watch.note):
            run()
    return step


def lines(step: Step2b) -> Iterator[str]:
    """A step in words: launches of the whole and of each kind of layer, then what runs on AICPU or
    is not known.
    """
    outside = step.launched(None)
    kinds = Counter(step.launched(layer) for layer in step.layers if layer is not None)
    each = ", ".join(f"{n} x {launches}" for launches, n in sorted(kinds.items(), key=lambda kind: -kind[0]))
    yield f"{step.generation}, tier {step.tier}: {step.launched()} launches a step: layers {each}; outside them {outside}"
    for where in ("AICPU", "unknown"):
        found = step.at(where)  # type: ignore[arg-type]
        named = ", ".join(f"{n} x {pair.op} {pair.dtype}" for pair, n in sorted(found.items()))
        yield f"  {where}: {sum(found.values())}{f' ({named})' if named else ''}"
