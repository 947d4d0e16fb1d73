"""``dsv4 doctor``."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict

import click

from dsv4_core.cli.options import BackendFlags, backend_options
from dsv4_core.contract.registry import installed

PATIENCE = 120  # seconds for one backend's imports and its look at a device: a broken driver may hang


@click.command("doctor")
@click.option("--only", hidden=True, help="Diagnose one backend in this process and print JSON.")
@backend_options
def command(only: str | None, flags: BackendFlags) -> None:
    """Say what this machine has and what each backend lacks; exits with 1 if the configured backend cannot run.

    Every backend is looked at in a process of its own, so that a broken library harms nobody else.
    """
    if only:
        click.echo(json.dumps(_diagnose(only, flags)))
        return
    choice = flags.choose()
    for what, found in _host():
        click.echo(f"{what:18} {found}")
    healthy = True
    for name in sorted(installed()):
        chosen = name == choice.name
        report = _elsewhere(name, flags if chosen else None)
        mark = "can run" if not report["error"] else "cannot run"
        click.echo(f"\n{name}{' (configured: ' + choice.why + ')' if chosen else ''}: {mark}")
        for line in report["lines"]:
            click.echo(
                f"  {line['what']:16} {line['found']}" + (f"\n{'':19}-> {line['advice']}" if line["advice"] else "")
            )
        if report["error"]:
            click.echo(f"  {report['error']}")
            healthy = healthy and not chosen
    if choice.name not in installed():
        click.echo(
            f"\n{choice.name} ({choice.why}): no such backend is installed; `dsv4 backends` lists those that are",
            err=True,
        )
        healthy = False
    raise click.exceptions.Exit(0 if healthy else 1)


def _host() -> list[tuple[str, str]]:
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return [
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("memory, cores", f"{memory / 1e9:.1f} GB, {os.cpu_count()}"),
        ("NumPy", f"{np.__version__}, BLAS: {blas['name']} {blas['version']}"),
    ]


def _elsewhere(name: str, flags: BackendFlags | None) -> dict:  # type: ignore[type-arg]  # JSON
    """Diagnose a backend in a process of its own; a crash or a hang becomes its error."""
    arguments = ["--numerics", flags.numerics, *flags.arguments()] if flags else []
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


def _diagnose(name: str, flags: BackendFlags) -> dict:  # type: ignore[type-arg]  # JSON
    from dsv4_core.contract import registry
    from dsv4_core.contract.spec import BackendError

    lines = []
    for module in ("torch", "triton", "torch_npu"):  # found by metadata: importing is the backend's business
        if any(module.replace("_", "-") in requirement for requirement in installed()[name].requires):
            found = importlib.util.find_spec(module) is not None
            lines.append(
                {
                    "what": module,
                    "found": "installed" if found else "not installed",
                    "advice": "" if found else installed()[name].install_command,
                }
            )
    error = ""
    try:
        lines += [asdict(line) for line in registry.backend_class(name).diagnose()]
        registry.create(name, numerics=flags.numerics, **flags.options)
    except Exception as problem:  # noqa: BLE001  whatever a vendor's library raises is what we are here to report
        error = f"{problem}" if isinstance(problem, BackendError) else f"{type(problem).__name__}: {problem}"
    return {"lines": lines, "error": error}
