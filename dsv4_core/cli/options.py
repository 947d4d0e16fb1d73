"""Options that several commands share: which backend, in which numerics, with which of its own
options.
"""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import click

from dsv4_core.cli.commands import option
from dsv4_core.contract import registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics

NUMERICS = click.Choice(["native", "float32", "float64"])
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A number of bytes: ``0``, ``512MiB``, ``2GiB``, ``1e9`` is not one."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or fail naming the accepted units."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(
                f"{value!r} is not a size; write bytes or a number with KiB, MiB, GiB (2^10, 2^20, 2^30) or KB, MB, GB",
                param,
                ctx,
            )
        return int(float(match[1]) * _UNITS[(match[2] or "B").lower()])


class Finite(click.FloatRange):
    """A number in a range; NaN, which lies in every range, is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it, or fail naming the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


@dataclass(frozen=True)
class BackendFlags:
    """What the user said about the backend."""

    backend: str | None
    numerics: str
    options: dict[str, Any]

    def choose(self) -> registry.Choice:
        """Choose by flag, environment, dsv4.toml or auto; a choice that the user did not make is
        printed with its reason.
        """
        choice = registry.choose(self.backend)
        if choice.why.startswith("auto"):
            click.echo(f"backend: {choice.name} ({choice.why})", err=True)
        return choice

    def settled(self) -> BackendFlags:
        """The same with the backend chosen, so that the reason for the choice is printed once."""
        return replace(self, backend=self.choose().name)

    def arguments(self) -> list[str]:
        """Say numerics and options again, for another command."""
        words = ["--numerics", self.numerics] if self.numerics != "native" else []
        for name, value in self.options.items():
            words += ["--option", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        return words

    def create(self, local_rank: int | None = None) -> Backend:
        """Construct the chosen backend; as the ``local_rank``-th of several ranks on the device of
        that number.
        """
        from dsv4_core.session import create_backend

        return create_backend(self.choose().name, cast("Numerics", self.numerics), self.options, local_rank)


@dataclass(frozen=True)
class RankFlags:
    """What the user said about ranks."""

    tp: int
    ep: int
    stats: bool


def rank_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--tp``, ``--ep`` and ``--stats`` to a command, which receives them as one argument
    ``asked``.
    """

    def gathered(tp: int, ep: int, stats: bool, store_key_file: str | None, **rest: Any) -> Any:
        if store_key_file:
            os.environ["DSV4_STORE_KEY_FILE"] = store_key_file
        return command(asked=RankFlags(tp, ep, stats), **rest)

    return _decorated(
        gathered,
        command,
        ranks("--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks that share each token."),
        ranks("--ep", type=click.IntRange(1), default=1, show_default=True, help="Groups that share the experts."),
        ranks("--stats", is_flag=True, help="Of each rank: bytes of weights read, bytes sent, time so."),
        ranks("--store-key-file", help="A secret that all ranks share (else DSV4_STORE_KEY); needed between hosts."),
    )


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the backend's options to a command, which receives them as one argument ``flags``."""

    def gathered(
        backend: str | None,
        numerics: str,
        batch_invariant: bool,
        interpret: bool,
        option: tuple[tuple[str, Any], ...],
        **rest: Any,
    ) -> Any:
        if clash := {"numerics"} & {name for name, _ in option}:
            raise click.UsageError(f"-O {clash.pop()}: this has an option of its own; use --numerics")
        named = {name: rest.pop(name) for name in ("device", "weight_cache", "simulate", "soc", "cann")}
        named |= {"batch_invariant": batch_invariant or None, "interpret": interpret or None} | dict(option)
        flags = BackendFlags(backend, numerics, {k: v for k, v in named.items() if v is not None})
        return command(flags=flags, **rest)

    return _decorated(
        gathered,
        command,
        backend_group(
            "--backend",
            "-b",
            help="Which backend (else DSV4_BACKEND, dsv4.toml, or auto); `dsv4 backends` lists them.",
            shell_complete=lambda _ctx, _param, given: [n for n in sorted(registry.installed()) if n.startswith(given)],
        ),
        backend_group(
            "--numerics",
            type=NUMERICS,
            default="native",
            show_default=True,
            help="native: as published. float32, float64: exact.",
        ),
        backend_group("--device", help="Device of the torch family, e.g. cpu, cuda:0, npu:0."),
        backend_group(
            "--weight-cache", type=ByteSize(), help="Dequantised weights to keep in memory, e.g. 2GiB; 0 keeps none."
        ),
        backend_group(
            "--batch-invariant",
            is_flag=True,
            help="A token's bits do not depend on what else is in the batch; slower.",
        ),
        vendor(
            "--interpret",
            is_flag=True,
            help="Run the cuda backend's kernels in Triton's (repaired) interpreter, on the CPU.",
        ),
        vendor("--simulate", metavar="CHIP", help="Run the ascend backend on simulated CANN: 910B, 910C or 950."),
        vendor("--soc", metavar="CHIP", help="Plan the ascend backend for this chip: 910B, 910C or 950."),
        vendor("--cann", metavar="VERSION", help="Plan the ascend backend for this CANN version."),
        vendor(
            "--option",
            "-O",
            multiple=True,
            type=_Pair(),
            metavar="NAME=VALUE",
            help="Any other option of the chosen backend.",
        ),
    )


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` to a command, which receives it as ``as_json``; what it prints then is in
    docs/json.md.
    """
    return option("--json", "as_json", is_flag=True, help="Print one JSON document (docs/json.md) instead of text.")(
        command
    )


backend_group = functools.partial(option, heading="Backend")
vendor = functools.partial(option, heading="One vendor's")
ranks = functools.partial(option, heading="Several ranks (each started by torchrun)")


def _decorated(gathered: Callable[..., Any], command: Callable[..., Any], *options: Callable[..., Any]) -> Any:
    """Give ``gathered`` the name, text and options of the command that it calls, and ``options``
    before them.
    """
    gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
    gathered.__dict__.update(command.__dict__)
    for decorate in reversed(options):
        gathered = decorate(gathered)
    return gathered


class _Pair(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, found, text = value.partition("=")
        if not found or not name:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name.replace("-", "_"), text
