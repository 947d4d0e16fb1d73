"""Finding backends: entry points ``dsv4.backends``, one pluggy hook, and the choice among them.

The only module that imports pluggy.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import pluggy
from packaging.requirements import Requirement

from dsv4_core.contract.spec import BackendError
from dsv4_core.files.forms import Toml
from dsv4_core.files.reading import FileError, toml_file
from dsv4_core.files.words import one_line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics

GROUP = "dsv4.backends"
ORACLES = "dsv4.oracles"
COMMANDS = "dsv4.commands"
LOOKS = "dsv4.looks"
hookspec = pluggy.HookspecMarker("dsv4")
hookimpl = pluggy.HookimplMarker("dsv4")


class BackendHooks:
    """What a plug-in module implements."""

    @hookspec(firstresult=True)
    def dsv4_backend(self) -> type[Backend]:  # type: ignore[empty-body]
        """Give the Backend class."""


@dataclass(frozen=True)
class Installed:
    """A backend as its distribution's metadata describes it; nothing of it has been imported.

    ``problem``: why it cannot be chosen, whatever is installed beside it; empty where it can.
    """

    name: str
    module: str
    distribution: str
    version: str
    requires: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: str = ""
    problem: str = ""

    @property
    def beyond(self) -> tuple[str, ...]:
        """What it needs beside dsv4 itself."""
        return self.requires if self.extra or self.distribution != OWN else ()

    @property
    def install_command(self) -> str:
        """The command that installs what is missing."""
        return (
            f"pip install '{self.distribution}[{self.extra}]'"
            if self.extra
            else f"pip install {' '.join(self.missing)}"
        )


OWN = "dsv4"  # the distribution whose names no other may take
_GROUPS = (GROUP, ORACLES, COMMANDS, LOOKS)


class Entry(NamedTuple):
    """An entry point and the distribution that it is of."""

    point: metadata.EntryPoint
    distribution: str
    version: str


@functools.cache
def _read() -> tuple[dict[str, list[Entry]], tuple[str, ...]]:
    """Give the entry points of dsv4's groups, and a line for each distribution that cannot be read.
    Imports nothing.
    """
    found: dict[str, list[Entry]] = {group: [] for group in _GROUPS}
    faults: list[str] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        name = "?"
        try:
            if "dsv4." not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name = printable(str(distribution.metadata["Name"]))
            if name in seen:  # the first on the path is the one that imports find
                continue
            seen.add(name)
            for point in distribution.entry_points:
                if point.group in found:
                    point.module, point.extras  # noqa: B018  reading them parses the value
                    found[point.group].append(Entry(point, name, printable(str(distribution.version))))
        except Exception as error:  # noqa: BLE001  metadata may be broken in any way, and must stop nobody
            where = getattr(distribution, "_path", "")
            told = f"distribution {name} ({where}): its metadata cannot be read ({one_line(repr(error), 200)})"
            faults.append(f"{printable(told)}; reinstall or remove it")
    return found, tuple(faults)


def entries(group: str) -> dict[str, list[Entry]]:
    """Entry points of a group by name: of several the one that is dsv4's own alone, which no other
    can replace.
    """
    found: dict[str, list[Entry]] = {}
    for entry in _read()[0][group]:
        found.setdefault(printable(entry.point.name), []).append(entry)
    return {name: [e for e in same if e.distribution == OWN] or same for name, same in found.items()}


def faults() -> list[str]:
    """Say in a line each what is wrong with installed distributions that register something:
    broken, or a clash of names.
    """
    found, lines = _read()
    said = [*lines]
    for group in _GROUPS:
        for name, same in entries(group).items():
            others = [e for e in found[group] if printable(e.point.name) == name and e not in same]
            said += [
                f"distribution {other.distribution} registers {name!r} in {group}, which is dsv4's own name; it is ignored"
                for other in others
            ]
            if len(same) > 1:
                said.append(_clash(group, name, same))
    return said + [f"backend {b.name!r}: {b.problem}" for b in installed().values() if b.problem.startswith("distri")]


def _clash(group: str, name: str, same: Sequence[Entry]) -> str:
    who = " and ".join(sorted(f"{e.distribution} {e.version}" for e in same))
    return f"{name!r} in {group} is registered by {who}; uninstall all but one"


def loaded(entry: Entry) -> Any:
    """Import what an entry point names; raise ``BackendError`` naming the distribution, whatever
    goes wrong.
    """
    with blaming(f"{entry.point.name!r} of distribution {entry.distribution}", "failed to import"):
        return entry.point.load()


@contextmanager
def blaming(who: str, did: str) -> Iterator[None]:
    """Turn whatever others' code raises, an exit included, into a ``BackendError`` that begins with
    ``who`` and ``did``.
    """
    try:
        yield
    except (BackendError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a library may raise anything: SystemExit, pyo3's PanicException
        said = one_line(f"{type(error).__name__}: {error}")
        raise BackendError(f"{who} {did}: {said}") from error


def _found(requirement: Requirement) -> bool:
    """Look for a requirement in metadata, whatever its modules are called; without metadata (a
    source checkout) for its module.
    """
    try:
        version = metadata.version(requirement.name)
        return version is None or requirement.specifier.contains(version, prereleases=True)
    except metadata.PackageNotFoundError:
        try:
            return find_spec(requirement.name.replace("-", "_")) is not None
        except (ImportError, ValueError):
            return False


@functools.cache
def installed() -> dict[str, Installed]:
    """Every backend that an installed distribution registers, by name. Reads metadata only."""
    return {name: _described(name, same) for name, same in entries(GROUP).items()}


def _described(name: str, same: Sequence[Entry]) -> Installed:
    point, distribution, version = same[0]
    if len(same) > 1:
        return Installed(name, point.module, distribution, version, problem=_clash(GROUP, name, same))
    extra = next(iter(point.extras), "")
    try:
        declared = [Requirement(r) for r in (point.dist.requires or [])] if point.dist else []
        needed = [
            r
            for r in declared
            if ((r.marker is None and not extra) or (r.marker and extra and _only_with(r, extra))) and r.name != OWN
        ]
        missing = tuple(f"{r.name}{r.specifier}" for r in needed if not _found(r))
    except Exception as error:  # noqa: BLE001  the same: broken metadata is said, and stops nobody else
        problem = (
            f"distribution {distribution}: its requirements cannot be read ({one_line(str(error), 200)}); reinstall it"
        )
        return Installed(name, point.module, distribution, version, problem=problem)
    return Installed(
        name, point.module, distribution, version, tuple(f"{r.name}{r.specifier}" for r in needed), missing, extra
    )


def _only_with(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def backend_class(name: str) -> type[Backend]:
    """Import the chosen backend, and no other; raise ``BackendError`` where it is unknown, lacks a
    library or fails to import.
    """
    known = installed()
    if name not in known:
        raise BackendError(
            f"unknown backend {name!r}; installed: {', '.join(sorted(known)) or 'none'}. `dsv4 backends` lists them with what they need"
        )
    if known[name].problem:
        raise BackendError(f"backend {name!r}: {known[name].problem}")
    manager = pluggy.PluginManager("dsv4")
    manager.add_hookspecs(BackendHooks)
    who = f"backend {name!r} ({known[name].module})"
    try:
        with blaming(who, "failed to import"):
            manager.register(entries(GROUP)[name][0].point.load())
    except BackendError as error:
        if known[name].missing:
            raise BackendError(
                f"backend {name!r} needs {', '.join(known[name].missing)}, not found here; {known[name].install_command}"
            ) from error
        raise BackendError(f"{error}; `dsv4 doctor -b {name}` looks at what it needs") from error
    with blaming(who, "failed in its hook dsv4_backend"):
        found = manager.hook.dsv4_backend()
    if found is None:
        raise BackendError(
            f"module {known[name].module!r} has no hook dsv4_backend; decorate a function of that name with dsv4_core.contract.registry.hookimpl"
        )
    from dsv4_core.contract.backend import Backend

    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendError(
            f"{who}: its hook dsv4_backend gave {one_line(repr(found), 80)}, which is no subclass of dsv4_core.contract.backend.Backend"
        )
    return found


def create(name: str, /, **options: Any) -> Backend:
    """Construct a backend; options that are None are left to its defaults. Raise ``BackendError``
    where its constructor fails, whatever it raises, and ``ValueError`` where that is about an
    option.
    """
    cls = backend_class(name)
    given = cls.read_options({name: value for name, value in options.items() if name != "numerics"})
    if options.get("numerics") is not None:
        given["numerics"] = options["numerics"]
    try:
        with blaming(f"backend {name!r}", "cannot start"):
            try:
                made = cls(**given)
            except ValueError as error:
                raise BackendError(f"{error}") from error
    except BackendError as error:
        if error.__cause__ is None or isinstance(error.__cause__, ValueError):
            raise
        raise BackendError(f"{error}; `dsv4 doctor -b {name}` looks at what it needs") from error
    if "numerics" not in vars(made):
        raise BackendError(
            f"backend {name!r}: its constructor does not call Backend's: super().__init__(numerics=..., **options)"
        )
    return made


class Oracle(Protocol):
    """What results are judged by: every op in a wider format than any backend's, unrounded, and its
    sensitivity to rounding.
    """

    def evaluate(
        self, op: str, operands: Sequence[Any], scalars: Mapping[str, Any], *, samples: int, seed: int
    ) -> tuple[Any, list[Any]]:
        """Give the op's exact result on host operands, and ``samples`` results perturbed as the
        contract allows.
        """


def oracle_entry() -> Entry:
    """The oracle that judges: dsv4's own, or the one that DSV4_ORACLE names. No distribution
    becomes it by being installed.
    """
    name = os.environ.get("DSV4_ORACLE")
    found = entries(ORACLES)
    own = [same for same in found.values() if same[0].distribution == OWN]
    same = found.get(name) if name else (own[0] if own else None)
    if name and not same:
        raise BackendError(
            f"DSV4_ORACLE = {name!r}: no such oracle is installed; there is {', '.join(found) or 'none'}"
        )
    if not same:
        raise BackendError(
            "no oracle is installed (entry points dsv4.oracles); dsv4 itself brings one: pip install --force-reinstall dsv4"
        )
    if len(same) > 1:
        raise BackendError(_clash(ORACLES, same[0].point.name, same))
    if same[0].distribution != OWN:
        print(
            f"judged by the oracle {name!r} of distribution {same[0].distribution} {same[0].version} (DSV4_ORACLE)",
            file=sys.stderr,
        )
    return same[0]


def oracle(numerics: Numerics, narrower: Mapping[str, tuple[str, ...]]) -> Oracle:
    """Construct the oracle for a mode and a backend's declared narrower intermediates: dsv4's own,
    unless DSV4_ORACLE names another that is installed (entry points ``dsv4.oracles``).
    """
    return cast("Oracle", loaded(oracle_entry())(numerics=numerics, narrower=narrower))


def reference() -> type[Backend]:
    """Import the backend that the oracle is made of: it is registered under the oracle's own
    name.
    """
    return backend_class(oracle_entry().point.name)


@dataclass(frozen=True)
class Choice:
    """Which backend was chosen, by what, and (for auto) why."""

    name: str
    why: str


def choose(flag: str | None, *, directory: Path | None = None) -> Choice:
    """Choose by ``--backend``, then ``DSV4_BACKEND``, then ``[run] backend`` in dsv4.toml, then
    auto.

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
    try:
        run = toml_file(path, Toml, 'write [run] and backend = "NAME"').run
    except FileNotFoundError:
        return None
    except FileError as error:
        raise BackendError(str(error)) from None
    return run.backend if run and run.backend else None


def _auto() -> Choice:
    """Take a device's backend where its libraries and its device node are there, else the
    reference.
    """
    known = installed()
    for name, device in (("ascend", "/dev/davinci0"), ("cuda", "/dev/nvidia0")):
        if name in known and not known[name].missing and Path(device).exists():
            return Choice(name, f"auto: {device} is there and so is all that {name} needs")
    if "torch" in known and not known["torch"].missing:
        return Choice("torch", "auto: no accelerator found; torch is installed")
    return Choice("reference", "auto: no accelerator and no torch found")
