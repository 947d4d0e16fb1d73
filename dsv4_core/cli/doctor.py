"""``dsv4 doctor``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import click

from dsv4_core.cli.commands import Command, option
from dsv4_core.cli.options import BackendFlags, backend_options, json_option
from dsv4_core.cli.schema import Chosen, Diagnosed, Doctored, Line, emit
from dsv4_core.contract.look import look
from dsv4_core.contract.registry import installed

PATIENCE = 120  # seconds for one backend's imports and its look at a device: a broken driver may hang


@click.command("doctor", cls=Command)
@option("--only", hidden=True, help="Load one backend in this process and print JSON.")
@option("--load", is_flag=True, help="Load the libraries of every backend, too, and construct it.")
@backend_options
@json_option
def command(only: str | None, load: bool, flags: BackendFlags, as_json: bool) -> None:
    """Say what this machine has and what each backend lacks; exits with 1 if the configured backend
    cannot run.

    Files and metadata are looked at, which takes a second. A backend that you name (``-b``) is also
    loaded and constructed, and with ``--load`` all are: each in a process of its own, so that a
    broken library harms nobody else.
    """
    if only:
        click.echo(json.dumps(_loaded_here(only, flags)))
        return
    choice = flags.choose()
    named = bool(flags.backend or flags.options)
    backends = []
    for name in sorted(installed()):
        chosen = name == choice.name
        backends.append(_diagnosed(name, flags if chosen else None, load=load or (chosen and named)))
    found = next((b for b in backends if b.name == choice.name), None)
    healthy = found is not None and found.status == "runs"
    result = Doctored(host=_host(), chosen=Chosen(name=choice.name, why=choice.why), backends=backends)
    if as_json:
        emit("doctor", result, ok=healthy)
    else:
        _print(result)
    if found is None:
        click.echo(
            f"\n{choice.name} ({choice.why}): no such backend is installed; `dsv4 backends` lists those that are",
            err=True,
        )
    raise click.exceptions.Exit(0 if healthy else 1)


def _diagnosed(name: str, flags: BackendFlags | None, *, load: bool) -> Diagnosed:
    """Look at a backend and, where that is asked for, load it; what loading says has the last
    word.
    """
    from dsv4_core.cli.running import bar

    seen = look(name)
    lines = [asdict(line) for line in seen.lines]
    if not load or installed()[name].missing or installed()[name].problem:
        error = seen.note if seen.status == "cannot run" else ""
        if load and seen.status == "cannot run" and installed()[name].missing:
            b = installed()[name]
            error = f"backend {name!r} needs {', '.join(b.missing)}, not found here; {b.install_command}"
        note = [{"what": "here", "found": seen.note, "advice": ""}] if seen.status == "simulates only" else []
        return _form(name, seen.status, [*lines, *note], error, loaded=False)
    with bar(f"loading {name}"):
        said = _elsewhere(name, flags)
    lines = [line for line in lines if line["what"] not in {one["what"] for one in said["lines"]}]
    status = "runs" if not said["error"] else "cannot run" if seen.status == "runs" else seen.status
    return _form(name, status, [*lines, *said["lines"]], said["error"], loaded=True)


def _form(name: str, status: Any, lines: list[dict[str, str]], error: str, *, loaded: bool) -> Diagnosed:
    return Diagnosed(name=name, status=status, loaded=loaded, lines=[Line(**line) for line in lines], error=error)


def _print(result: Doctored) -> None:
    for line in result.host:
        click.echo(f"{line.what:18} {line.found}")
    for b in result.backends:
        chosen = f" (configured: {result.chosen.why})" if b.name == result.chosen.name else ""
        how = "" if b.loaded or b.status == "cannot run" else f"; not loaded: `dsv4 doctor -b {b.name}` does"
        click.echo(f"\n{b.name}{chosen}: {WORDS[b.status]}{how}")
        for line in b.lines:
            click.echo(f"  {line.what:16} {line.found}" + (f"\n{'':19}-> {line.advice}" if line.advice else ""))
        if b.error:
            click.echo(f"  {b.error}")


WORDS = {"runs": "can run", "simulates only": "simulates only", "cannot run": "cannot run"}


def _host() -> list[Line]:
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found = (
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("memory, cores", f"{memory / 1e9:.1f} GB, {os.cpu_count()}"),
        ("NumPy", f"{np.__version__}, BLAS: {blas['name']} {blas['version']}"),
    )
    return [Line(what=what, found=text, advice="") for what, text in found]


def _elsewhere(name: str, flags: BackendFlags | None) -> dict[str, Any]:
    """Load a backend in a process of its own; a crash or a hang becomes its error."""
    arguments = flags.arguments() if flags else []
    command_line = [sys.executable, "-m", "dsv4_core", "doctor", "--only", name, *arguments]
    environment = os.environ | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"
    }  # a broken torch-npu would fail any import of torch
    try:
        done = subprocess.run(  # noqa: S603  ourselves
            command_line, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {
            "lines": [],
            "error": f"did not answer within {PATIENCE} s: a driver hangs? Try `python -c 'import {installed()[name].module}'`",
        }
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"lines": [], "error": f"its process ended with status {done.returncode}: {last}"}


def _loaded_here(name: str, flags: BackendFlags) -> dict[str, Any]:
    from dsv4_core.contract import registry
    from dsv4_core.contract.spec import BackendError

    lines: list[dict[str, str]] = []
    error = ""
    try:
        lines += [asdict(line) for line in registry.backend_class(name).diagnose()]
        registry.create(name, numerics=flags.numerics, **flags.options)
    except Exception as problem:  # noqa: BLE001  whatever a vendor's library raises is what we are here to report
        error = f"{problem}" if isinstance(problem, BackendError) else f"{type(problem).__name__}: {problem}"
    return {"lines": lines, "error": error}
