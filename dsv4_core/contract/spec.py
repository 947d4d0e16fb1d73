"""What a contract is made of: the Array protocol, the ``@op`` declaration and the record it
leaves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host

Numerics = Literal["native", "float32", "float64"]
Judgement = Literal["exact", "rounded", "discrete"]
"""How a result is judged: bit for bit; within a derived budget; by the scores behind the choice."""


class Array(Protocol):
    """All that the graph may do with an array; ``numpy.ndarray`` and ``torch.Tensor`` satisfy it as
    they are.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """The library's dtype object; ``dtypes.dtype_name`` names it."""

    def reshape(self, shape: tuple[int, ...], /) -> Array:
        """View or copy with another shape."""

    def __getitem__(self, key: Any, /) -> Array:
        """Read by integers and slices; never by another array."""


class Operand(NamedTuple):
    """An operand's dtype name and shape, where no array exists yet."""

    dtype: str
    shape: tuple[int, ...]


class Support(NamedTuple):
    """A backend's answer about one op: ``by`` says which implementation would run it, ``reason``
    why none does, ``proof`` how far that implementation was proven and what it rests on, where the
    backend keeps account of it.
    """

    by: str = ""
    reason: str = ""
    proof: str = ""

    def __bool__(self) -> bool:
        return not self.reason


class BackendError(RuntimeError):
    """A backend that cannot be had or cannot run what was asked: the message says which, why, and
    what to do.
    """


class UnsupportedOpError(NotImplementedError):
    """An op that this backend has no implementation of."""


Tier = Literal["smoke", "standard", "full"]


@dataclass(frozen=True)
class OpSpec:
    """One contract, as declared: everything that documents, the planner and the conformance suite
    know about an op.
    """

    name: str
    family: str
    axes: Mapping[str, str]
    returns: tuple[str, ...]
    dtypes: Mapping[str, str]
    judged: tuple[Judgement, ...]
    accumulate: str
    narrower: tuple[str, ...]
    mutates: tuple[str, ...]
    fused: bool
    work: Mapping[str, str]
    reads: Mapping[str, str]
    writes: Mapping[str, str]
    signature: inspect.Signature
    doc: str

    @functools.cached_property
    def arrays(self) -> tuple[str, ...]:
        """Names of the positional operands."""
        return tuple(
            p.name for p in self.signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
        )

    @functools.cached_property
    def scalars(self) -> tuple[str, ...]:
        """Names of the keyword-only operands."""
        return tuple(p.name for p in self.signature.parameters.values() if p.kind is p.KEYWORD_ONLY)


OPS: dict[str, OpSpec] = {}
"""Every declared op by name, in the order of declaration."""

F = TypeVar("F", bound=Callable[..., Any])


def op(
    *,
    axes: Mapping[str, str],
    returns: str | tuple[str, ...],
    dtypes: Mapping[str, str],
    judged: Judgement | tuple[Judgement, ...] = "rounded",
    accumulate: str = "wide",
    narrower: tuple[str, ...] = (),
    mutates: tuple[str, ...] = (),
    fused: bool = False,
    work: Mapping[str, str] | None = None,
    reads: Mapping[str, str] | None = None,
    writes: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Declare the method below as a contract.

    ``axes``: the named axes of each array operand, e.g. ``"tokens dim"``; an axis may be an integer
    or an expression in names of other axes and scalars (``"tokens*topk"``, ``"experts+1"``). A
    trailing ``?`` on the whole marks an operand that may be None. ``returns``: the axes of the
    result or results ("" for none). ``dtypes``: per operand and for ``return`` (one entry for all
    results, or ``return.0`` ...): ``act`` (bfloat16; float32 or float64 in the exact modes),
    ``wide`` (float32; float64 in float64 mode), a dtype name, ``weight`` (an array or
    ``ScaledArray``), ``cache`` (uint8 packed, or the dtype that a plain layout stores) or
    ``out_dtype`` (the scalar of that name). ``mutates``: operands that a backend may write in place
    and give back, instead of another array; the results are these, in order. ``accumulate``: the
    least precise format that sums may be kept in. ``narrower``: what a backend may declare narrower
    than that. ``fused``: the body is the default, written in required ops; otherwise the body is
    never run and a backend that leaves the op out raises ``UnsupportedOpError``.

    The counting rule, in the same names: ``work`` gives operations by what they are done in: an
    array operand's name (as precise as it and the numerics make the product), ``act``, ``fp4``
    (both sides on the FP4 grid in native mode) or ``vector`` (elementwise, wide). A product and its
    sum are two. ``reads`` and ``writes`` give the part of an operand that is touched, where it is
    not all of it, respectively none; ``distinct(rows, n)`` is how many of n experts get any of
    ``rows`` token copies. A fused op is counted through its default.
    """
    results = (returns,) if isinstance(returns, str) else returns

    def declare(method: F) -> F:
        name = method.__name__
        OPS[name] = OpSpec(
            name=name,
            family=method.__module__.rpartition(".")[2],
            axes=axes,
            returns=results,
            dtypes=dtypes,
            judged=(judged,) * len(results) if isinstance(judged, str) else judged,
            accumulate=accumulate,
            narrower=narrower,
            mutates=mutates,
            fused=fused,
            work=work or {},
            reads=reads or {},
            writes=writes or {},
            signature=inspect.signature(method),
            doc=inspect.getdoc(method) or "",
        )
        if fused:
            return method

        @functools.wraps(method)
        def missing(self: Any, *_args: Any, **_kwargs: Any) -> Any:
            raise UnsupportedOpError(
                f"backend {self.name!r} does not implement the required op {name!r}; implement {name}{OPS[name].signature}"
            )

        return cast("F", missing)

    return declare


class Ops:
    """What every family of contracts may rely on."""

    name: str = "?"
    numerics: Numerics = "native"

    @property
    def activation_dtype(self) -> str:
        """Dtype between ops: ``bfloat16`` in native mode, the mode's own in the exact ones."""
        return "bfloat16" if self.numerics == "native" else self.numerics

    @property
    def wide_dtype(self) -> str:
        """Dtype inside ops and of scores, states and logits: ``float32``, or ``float64`` in float64
        mode.
        """
        return "float64" if self.numerics == "float64" else "float32"

    def from_numpy(self, array: Host) -> Array:
        """Take over a host array."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> Host:
        """Give an array back to the host."""
        raise NotImplementedError
