"""Backend: what a vendor subclasses.

The contracts come from ``ops``; this adds arrays, options and the answer to ``supports``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dsv4_core.contract.diagnosis import Diagnosis
from dsv4_core.contract.dtypes import Experts, Format, Host, ScaledArray, format_of
from dsv4_core.contract.ops import OPS, EveryOp
from dsv4_core.contract.spec import Array, BackendError, Numerics, Operand, Support, Tier
from dsv4_core.files.words import one_line, printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dsv4_core.contract.collectives import ProcessGroup
    from dsv4_core.contract.rendezvous import Rendezvous

__all__ = ["Backend", "BackendError", "DeviceCheck", "Diagnosis", "Option", "missing_ops"]

MOST_DIGITS = 18  # of an option's number


@dataclass(frozen=True)
class Option:
    """A keyword of a backend's constructor that the command line offers: ``--name`` with dashes.

    ``kind``: bool, int (``least`` to ``most``) or str; left out it is the default's, or str.
    """

    name: str
    help: str
    default: Any = None
    kind: type[bool | int | str] | None = None
    least: int = 0
    most: int = 10**MOST_DIGITS - 1

    def read(self, value: Any) -> Any:
        """Give a value, or its text from a command line, as the option's kind; raise ``ValueError``
        saying what it must be.
        """
        kind = self.kind or (str if self.default is None else type(self.default))
        text = str(value)
        if kind is bool and text.lower() in {"true", "false"}:
            return text.lower() == "true"
        if (
            kind is int
            and not isinstance(value, bool)
            and text.isascii()
            and text.isdecimal()
            and len(text) <= MOST_DIGITS
            and self.least <= int(text) <= self.most
        ):
            return int(text)
        if kind is str and not isinstance(value, bool) and (text or text == self.default) and printable(text) == text:
            return text
        must = {bool: "true or false", str: "a word"}
        must[int] = f"a whole number from {self.least} to {self.most}"
        raise ValueError(f"{self.name} = {one_line(repr(value), 80)} must be {must[kind]} ({self.help})")


@dataclass(frozen=True)
class DeviceCheck:
    """A check that a backend brings for its own device, run by the suite beside its own; ``case``
    names it among those of ``op``. ``run`` says in words what is wrong: nothing where all is well.
    """

    op: str
    case: str
    tier: Tier
    run: Callable[[], str]


class Backend(EveryOp):
    """A way to run every op. Subclass it, implement the required ops, override fused ones where
    that pays.

    ``name``: as registered. ``options``: what the constructor takes beside ``numerics``.
    ``claims_level`` and ``claims``: what the backend's own file says it fulfils (the conformance
    suite holds it to that): op names, and a bitwise law of one op as ``batch_invariance/act_qdq``.
    ``batch_invariant``, ``deterministic``: bitwise claims. ``narrower``: op -> the narrower
    intermediates it declares, from the contract's own list. ``departures``: op -> what an option of
    the user's makes it compute instead of its contract; nothing is claimed of it, and reports say
    so. ``ties``: which of equal scores is picked, the lower index or any; with ``any`` a text may
    differ from the published model's where scores tie. ``flushes_subnormals``: numbers below the
    least normal one of float32 may count as zero, as operands and as results. ``weight_formats``:
    of quantised weights that it multiplies; the published two are required. ``packs_rows``: whether
    cache rows are stored in FP8 and FP4 in native mode; else in the activation dtype, which holds
    the same values in twice the bytes.
    """

    name = "?"
    options: ClassVar[tuple[Option, ...]] = ()
    numerics_modes: ClassVar[tuple[Numerics, ...]] = ("native", "float32", "float64")
    claims_level: ClassVar[int | None] = None
    claims: ClassVar[tuple[str, ...]] = ()
    weight_formats: ClassVar[tuple[Format, ...]] = ("e4m3", "e2m1")
    narrower: ClassVar[dict[str, tuple[str, ...]]] = {}
    departures: Mapping[str, str] = {}
    batch_invariant: bool = False
    deterministic: bool = False
    ties: ClassVar[Literal["lower", "any"]] = "lower"
    flushes_subnormals: bool = False
    packs_rows: bool = True

    def __init__(self, *, numerics: Numerics = "native", **options: Any) -> None:
        """Raise ``BackendError`` for a numerics mode or an option that this backend does not
        have.
        """
        if numerics not in self.numerics_modes:
            raise BackendError(
                f"backend {self.name!r}: numerics {numerics!r} is not one of {', '.join(self.numerics_modes)}"
            )
        given = self.read_options(options)
        self.numerics = numerics
        for option in self.options:
            setattr(self, option.name, given.get(option.name, option.default))

    @classmethod
    def read_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Give options as their kinds; those that are None are left out, for their defaults.

        Raises ``BackendError`` for one that this backend does not have, and for a value that it
        cannot be.
        """
        known = {option.name: option for option in cls.options}
        if unknown := sorted(options.keys() - known.keys()):
            takes = ", ".join(sorted(known)) or "none"
            raise BackendError(f"backend {cls.name!r} has no option {unknown[0]!r}; its options: {takes}")
        try:
            return {name: known[name].read(value) for name, value in options.items() if value is not None}
        except ValueError as error:
            raise BackendError(f"backend {cls.name!r}: option {error}") from None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hold every op that the class defines to its contract's signature; raise ``TypeError``
        with both signatures.
        """
        super().__init_subclass__(**kwargs)
        for name, spec in OPS.items():
            if not cls.implements(name):
                continue
            method = getattr(cls, name)
            theirs = inspect.signature(method)
            if [(p.name, p.kind) for p in theirs.parameters.values()] != [
                (p.name, p.kind) for p in spec.signature.parameters.values()
            ]:
                raise TypeError(f"{cls.__name__}.{name}{theirs} does not match the contract {name}{spec.signature}")
        for name, declared in cls.__dict__.get("narrower", {}).items():
            for what in declared:
                if what not in OPS[name].narrower:
                    allowed = OPS[name].narrower or "nothing narrower"
                    raise TypeError(
                        f"{cls.__name__}.narrower[{name!r}] declares {what!r}; the contract allows {allowed}"
                    )

    @classmethod
    def implements(cls, op: str) -> bool:
        """Say whether the class brings its own implementation of ``op``, rather than the contract's
        default or none.
        """
        return getattr(cls, op) is not getattr(EveryOp, op)

    @classmethod
    def diagnose(cls) -> tuple[Diagnosis, ...]:
        """Look at libraries, drivers and devices that this backend uses. Raises nothing: what is
        wrong is a line of its own.
        """
        return ()

    def describe(self) -> str:
        """Name the backend and what it computes on, for `dsv4 explain`; a second line may say what
        ``Support.proof`` means.
        """
        return f"backend {self.name}"

    def device_checks(self) -> Sequence[DeviceCheck]:
        """Checks of this backend's own device that the conformance suite runs too."""
        return ()

    def kernels_ran(self) -> Sequence[str]:
        """Name the vendor's kernels that ran since this was last asked; nothing for a backend that
        keeps no account.
        """
        return ()

    def environment(self) -> Mapping[str, str]:
        """Name the libraries, driver and device that a run rests on, for reports: what -> version
        or name.
        """
        return {}

    def proof(self, ran: Mapping[str, bool]) -> Mapping[str, str]:
        """Say of every op how far its implementation is proven, for a report of the suite. ``ran``:
        of each kernel of ``kernels_ran`` whether all passed that used it; empty where a run was
        partial or fell short.
        """
        del ran
        return {}

    def supports(self, op: str, **operands: Operand | Any) -> Support:
        """Say who would run ``op`` on operands of these dtypes and shapes (scalars by value), or
        why nobody can.

        Override to refuse by dtype or shape; a refusal becomes an error before any weight is read,
        never an exception in a forward.
        """
        for name, value in operands.items():
            fmt = format_of(str(getattr(value, "dtype", "")))
            if fmt and fmt not in self.weight_formats:
                return Support(
                    reason=f"{name}: backend {self.name!r} multiplies no {fmt} weights; use the published checkpoint"
                )
        if self.implements(op):
            return Support(by=self.name)
        if OPS[op].fused:
            return Support(by="composed of required ops")
        return Support(reason=f"backend {self.name!r} does not implement it")

    def from_numpy(self, array: Host) -> Array:
        """Take over a host array (ml_dtypes included), without a copy where memory is shared."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> Host:
        """Give an array back to the host: bfloat16 as ml_dtypes'."""
        raise NotImplementedError

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate zeros of a dtype name."""
        raise NotImplementedError

    def computing(self) -> AbstractContextManager[Any]:
        """What a forward runs in: a library that records gradients is told here that none are
        wanted.
        """
        return nullcontext()

    def round_up(self, n: int) -> int:
        """How large an extent of a step is made that has to hold ``n``: window rows, compressed
        rows, windows that close.

        At least ``n``, and never less for a larger ``n``; what is too much is masked. Few values
        mean few shapes, for a backend that compiles or records a step for each; more than 0 for 0
        means that a part is never absent. The default is the next power of two, at least 128: a
        context's shapes change each time that its length doubles.
        """
        return max(128, 1 << (n - 1).bit_length()) if n else 128

    def record(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Give what does as ``function`` does, on host arrays of the same shapes and dtypes as
        ever.

        ``function`` takes arrays of this backend, calls its ops, and gives an array or a tuple of
        them. It reads nothing that changes but its arguments and what it has read in place before
        (the cache), reads no value on the host, and may be run again with the same arguments. What
        is given may run it when it is first called, capture what it does, and from then on repeat
        that on buffers of its own: results hold until the next call. Where that cannot be had, it
        runs ``function`` each time, which is the default; it never repeats anything that has become
        wrong.
        """

        def run(*hosts: Host) -> Any:
            return function(*map(self.from_numpy, hosts))

        return run

    def process_group(self, where: Rendezvous) -> ProcessGroup:
        """Reach the store that the ranks of a run share, through the backend's own library;
        importing it is done here.

        Raises ``BackendError`` where this backend cannot run as one of several ranks.
        """
        del where
        raise BackendError(
            f"backend {self.name!r} has no collectives and runs as one rank only; leave out --tp and --ep"
        )

    def load(self, weight: Host | ScaledArray) -> Any:
        """Take over a weight of the checkpoint; memory-mapped, so reading it here or later is the
        backend's choice.
        """
        if isinstance(weight, ScaledArray):
            return ScaledArray(self.from_numpy(weight.data), self.from_numpy(weight.scale), weight.format)
        return self.from_numpy(weight)

    def load_experts(self, experts: Experts) -> Experts:
        """Take over one projection of all routed experts. The default loads each expert when it is
        first used.
        """
        return Experts(_LoadOnUse(self, experts))


class _LoadOnUse(Sequence[Any]):
    """Experts that are loaded one by one; shape and dtype come from the first, whose bytes stay
    untouched until it is used.
    """

    def __init__(self, backend: Backend, experts: Experts) -> None:
        self.backend, self.experts = backend, experts
        self.loaded: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.experts.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if index not in self.loaded:
            self.loaded[index] = self.backend.load(self.experts[index])
        return self.loaded[index]


def missing_ops(backend: Backend, calls: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Give (op, reason) for every call that ``backend`` does not support, each pair once."""
    refusals = {(op, answer.reason): None for op, operands in calls if not (answer := backend.supports(op, **operands))}
    return list(refusals)
