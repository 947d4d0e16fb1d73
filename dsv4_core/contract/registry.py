"""Finding backends: entry points ``dsv4.backends``, one pluggy hook, and the choice among them.

The only module that imports pluggy.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import pluggy
from packaging.requirements import Requirement

from dsv4_core.contract.spec import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics

GROUP = "dsv4.backends"
ORACLES = "dsv4.oracles"
hookspec = pluggy.HookspecMarker("dsv4")
hookimpl = pluggy.HookimplMarker("dsv4")


class BackendHooks:
    """What a plug-in module implements."""

    @hookspec(firstresult=True)
    def dsv4_backend(self) -> type[Backend]:  # type: ignore[empty-body]
        """Give the Backend class."""


@dataclass(frozen=True)
class Installed:
    """A backend as its distribution's metadata describes it; nothing of it has been imported."""

    name: str
    module: str
    distribution: str
    version: str
    requires: tuple[str, ...]
    missing: tuple[str, ...]
    extra: str

    @property
    def install_command(self) -> str:
        """The command that installs what is missing."""
        return (
            f"pip install '{self.distribution}[{self.extra}]'"
            if self.extra
            else f"pip install {' '.join(self.missing)}"
        )


_MODULES = {
    "dsv4": "dsv4_core",
    "torch-npu": "torch_npu",
    "ml-dtypes": "ml_dtypes",
}  # requirement names that are not their module's


def _found(requirement: Requirement) -> bool:
    """Look for a requirement's module without importing it, and its version in metadata."""
    if find_spec(_MODULES.get(requirement.name, requirement.name.replace("-", "_"))) is None:
        return False
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return True  # importable without metadata: a source checkout


@functools.cache
def installed() -> dict[str, Installed]:
    """Every backend that an installed distribution registers, by name. Reads metadata only."""
    backends: dict[str, Installed] = {}
    for entry in metadata.entry_points(group=GROUP):
        extra = next(iter(entry.extras), "")
        distribution = entry.dist
        declared = [Requirement(r) for r in (distribution.requires or [])] if distribution else []
        needed = [
            r for r in declared if (r.marker is None and not extra) or (r.marker and extra and _only_with(r, extra))
        ]
        backends[entry.name] = Installed(
            name=entry.name,
            module=entry.module,
            distribution=distribution.name if distribution else "?",
            version=distribution.version if distribution else "?",
            requires=tuple(f"{r.name}{r.specifier}" for r in needed),
            missing=tuple(f"{r.name}{r.specifier}" for r in needed if not _found(r)),
            extra=extra,
        )
    return backends


def _only_with(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def backend_class(name: str) -> type[Backend]:
    """Import the chosen backend, and no other; raise ``BackendError`` where it is unknown, lacks a library or fails to
    import.
    """
    known = installed()
    if name not in known:
        raise BackendError(
            f"unknown backend {name!r}; installed: {', '.join(sorted(known)) or 'none'}. `dsv4 backends` lists them with what they need"
        )
    manager = pluggy.PluginManager("dsv4")
    manager.add_hookspecs(BackendHooks)
    try:
        manager.load_setuptools_entrypoints(GROUP, name=name)
    except Exception as error:  # whatever a vendor's library raises: a shared object that is gone is an OSError
        if known[name].missing:
            raise BackendError(
                f"backend {name!r} needs {', '.join(known[name].missing)}, not found here; {known[name].install_command}"
            ) from error
        raise BackendError(
            f"backend {name!r} ({known[name].module}) failed to import: {type(error).__name__}: {error}; "
            f"`dsv4 doctor -b {name}` looks at what it needs"
        ) from error
    found = cast("type[Backend] | None", manager.hook.dsv4_backend())
    if found is None:
        raise BackendError(
            f"module {known[name].module!r} has no hook dsv4_backend; decorate a function of that name with dsv4_core.contract.registry.hookimpl"
        )
    return found


def create(name: str, **options: Any) -> Backend:
    """Construct a backend; options that are None are left to its defaults. Raise ``BackendError`` where its constructor
    fails over anything but an option (``ValueError``, ``TypeError``).
    """
    cls = backend_class(name)
    try:
        return cls(**{k: v for k, v in options.items() if v is not None})
    except (BackendError, ValueError, TypeError):
        raise
    except Exception as error:  # whatever a driver raises
        raise BackendError(
            f"backend {name!r} cannot start: {type(error).__name__}: {error}; `dsv4 doctor -b {name}` looks at what it needs"
        ) from error


class Oracle(Protocol):
    """What results are judged by: every op in a wider format than any backend's, unrounded, and its sensitivity to
    rounding.
    """

    def evaluate(
        self, op: str, operands: Sequence[Any], scalars: Mapping[str, Any], *, samples: int, seed: int
    ) -> tuple[Any, list[Any]]:
        """Give the op's exact result on host operands, and ``samples`` results perturbed as the contract allows."""


def oracle(numerics: Numerics, narrower: Mapping[str, tuple[str, ...]]) -> Oracle:
    """Construct the oracle that is installed (entry points ``dsv4.oracles``) for a mode and a backend's declared
    narrower intermediates.
    """
    for entry in metadata.entry_points(group=ORACLES):
        return cast("Oracle", entry.load()(numerics=numerics, narrower=narrower))
    raise BackendError(
        "no oracle is installed (entry points dsv4.oracles); dsv4 itself brings one: pip install --force-reinstall dsv4"
    )


def reference() -> type[Backend]:
    """Import the backend that the installed oracle is made of: it is registered under the oracle's own name."""
    for entry in metadata.entry_points(group=ORACLES):
        return backend_class(entry.name)
    raise BackendError(
        "no oracle is installed (entry points dsv4.oracles); dsv4 itself brings one: pip install --force-reinstall dsv4"
    )


@dataclass(frozen=True)
class Choice:
    """Which backend was chosen, by what, and (for auto) why."""

    name: str
    why: str


def choose(flag: str | None, *, directory: Path | None = None) -> Choice:
    """Choose by ``--backend``, then ``DSV4_BACKEND``, then ``[run] backend`` in dsv4.toml, then auto.

    Nothing is imported.
    """
    config = (directory or Path.cwd()) / "dsv4.toml"
    sources = [
        ("--backend", flag),
        ("DSV4_BACKEND", os.environ.get("DSV4_BACKEND")),
        (str(config), _configured(config)),
    ]
    for source, name in sources:
        if name and name != "auto":
            return Choice(name, f"chosen by {source}")
        if name == "auto":
            break
    return _auto()


def _configured(path: Path) -> str | None:
    if not path.exists():
        return None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        name = tomllib.loads(path.read_text()).get("run", {}).get("backend")
    except tomllib.TOMLDecodeError as error:
        raise BackendError(f"{path}: not TOML: {error}") from None
    if name is not None and not isinstance(name, str):
        raise BackendError(f"{path}: [run] backend = {name!r} must be a backend's name in quotes")
    return name


def _auto() -> Choice:
    """Take a device's backend where its libraries and its device node are there, else the reference."""
    known = installed()
    for name, device in (("ascend", "/dev/davinci0"), ("cuda", "/dev/nvidia0")):
        if name in known and not known[name].missing and Path(device).exists():
            return Choice(name, f"auto: {device} is there and so is all that {name} needs")
    if "torch" in known and not known["torch"].missing:
        return Choice("torch", "auto: no accelerator found; torch is installed")
    return Choice("reference", "auto: no accelerator and no torch found")
