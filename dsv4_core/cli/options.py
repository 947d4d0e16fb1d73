"""Options that several commands share: which backend, in which numerics, with which of its own options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.contract import registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.backend import Backend

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


@dataclass(frozen=True)
class BackendFlags:
    """What the user said about the backend."""

    backend: str | None
    numerics: str
    options: dict[str, Any]

    def choose(self) -> registry.Choice:
        """Choose by flag, environment, dsv4.toml or auto; a choice that the user did not make is printed with its
        reason.
        """
        choice = registry.choose(self.backend)
        if choice.why.startswith("auto"):
            click.echo(f"backend: {choice.name} ({choice.why})", err=True)
        return choice

    def arguments(self) -> list[str]:
        """Say the options again, for another process."""
        return [part for name, value in self.options.items() for part in ("-O", f"{name}={value}")]

    def create(self, *, local_rank: int | None = None) -> Backend:
        """Construct the chosen backend; as one of several ranks of a machine on the device of that number, where the backend
        has devices and none is named in full.
        """
        name, options = self.choose().name, dict(self.options)
        if local_rank is not None:
            defaults = {option.name: option.default for option in registry.backend_class(name).options}
            device = options.get("device", defaults.get("device"))
            if device in {"cuda", "npu", "xpu"}:
                options["device"] = f"{device}:{local_rank}"
        return registry.create(name, numerics=self.numerics, **options)


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
        named = {name: rest.pop(name) for name in ("device", "weight_cache", "simulate", "soc", "cann")}
        named |= {"batch_invariant": batch_invariant or None, "interpret": interpret or None} | dict(option)
        flags = BackendFlags(backend, numerics, {k: v for k, v in named.items() if v is not None})
        return command(flags=flags, **rest)

    gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
    gathered.__dict__.update(command.__dict__)
    for decorate in reversed(
        (
            click.option(
                "--backend",
                "-b",
                help="Which backend (else DSV4_BACKEND, dsv4.toml, or auto); `dsv4 backends` lists them.",
            ),
            click.option(
                "--numerics",
                type=NUMERICS,
                default="native",
                show_default=True,
                help="native: as published. float32, float64: exact.",
            ),
            click.option("--device", help="Device of the torch family, e.g. cpu, cuda:0, npu:0."),
            click.option(
                "--weight-cache",
                type=ByteSize(),
                help="Dequantised weights to keep in memory, e.g. 2GiB; 0 keeps none.",
            ),
            click.option(
                "--batch-invariant",
                is_flag=True,
                help="A token's bits do not depend on what else is in the batch; slower.",
            ),
            click.option(
                "--interpret",
                is_flag=True,
                help="Run the cuda backend's kernels in Triton's (repaired) interpreter, on the CPU.",
            ),
            click.option(
                "--simulate", metavar="CHIP", help="Run the ascend backend on simulated CANN: 910B, 910C or 950."
            ),
            click.option("--soc", metavar="CHIP", help="Plan the ascend backend for this chip: 910B, 910C or 950."),
            click.option("--cann", metavar="VERSION", help="Plan the ascend backend for this CANN version."),
            click.option(
                "--option",
                "-O",
                multiple=True,
                type=_Pair(),
                metavar="NAME=VALUE",
                help="Any other option of the chosen backend.",
            ),
        )
    ):
        gathered = decorate(gathered)
    return gathered


class _Pair(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, found, text = value.partition("=")
        if not found or not name:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name.replace("-", "_"), {"true": True, "false": False}.get(
            text.lower(), int(text) if text.isdigit() else text
        )


def model_directory(model: str | None) -> Path:
    """Give the model's directory: the one named, or the embedded checkpoint; raise ``ValueError`` where it does not
    exist.
    """
    from dsv4_core.checkpoint.foreign import path_problem
    from dsv4_core.checkpoint.weights import embedded

    if model is None:
        return embedded()
    path = Path(model)
    if problem := path_problem(path):
        raise ValueError(problem)
    if not path.is_dir():
        raise ValueError(
            f"{model}: no such directory; name one that holds config.json and *.safetensors, or leave it out for the embedded model"
        )
    return path
