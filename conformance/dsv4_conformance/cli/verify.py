"""``dsv4 conformance verify``: whether a report is what it says, by running a drawn sample of it
again.
"""

from __future__ import annotations

import random
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv4_core.cli.commands import Command
from dsv4_core.contract import registry
from dsv4_core.files.reading import FileError, json_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_conformance.files.forms import CertifiedReport, Sworn

ADVICE = "write it with dsv4 conformance run --report DIR of this version"
GOOD = {"xfailed": "failed", "xpassed": "passed"}  # what an expected failure is without its list
QUICK = ("op", "invariance", "trace")  # groups of which much is drawn; of others one check, which may take a minute


@click.command("verify", cls=Command)
@click.argument("report", type=click.Path(path_type=Path, exists=True))
@click.option("--sample", type=click.IntRange(1), default=40, show_default=True, help="Checks that are run again.")
@click.option("--seed", type=int, help="Of the draw; by default one that nobody could foresee.")
def command(report: Path, sample: int, seed: int | None) -> None:
    """Verify REPORT (report.json or its folder): that it is whole, of these very files, and that a
    drawn sample comes out the same.

    Exit status: 0 verified, 1 something differs, 2 could not be tried.
    """
    from dsv4_conformance.files.forms import CertifiedReport

    path = report / "report.json" if report.is_dir() else report
    held = json_file(path, CertifiedReport, ADVICE)
    if held.backend not in registry.installed():
        known = ", ".join(sorted(registry.installed()))
        raise ValueError(f"{path}: of backend {held.backend!r}, which is not installed here; installed: {known}")
    differ = [*consistent(held), *same_files(held)]
    seed = secrets.randbits(32) if seed is None else seed
    drawn = draw(held.findings, sample, seed)
    with tempfile.TemporaryDirectory() as folder:
        again = rerun(held, [f.id for f in drawn], Path(folder))
    results = {f.id: f for f in again.findings}
    for was in drawn:
        now = results.get(was.id)
        if now is None:
            differ.append(f"{was.id}: did not run again")
        elif GOOD.get(was.status, was.status) != now.status:
            differ.append(f"{was.id}: {was.status} in the report, {now.status} here")
        elif was.inputs != now.inputs:
            differ.append(f"{was.id}: other inputs than here (hash {was.inputs}, here {now.inputs})")
    for line in differ:
        click.echo(f"differs: {line}")
    for line in versions(held, again):
        click.echo(f"note: {line}")
    level = "no level (it judges a selection)" if held.level is None else f"level {held.level}"
    what = f"{len(drawn)} of {len(held.findings)} checks run again (--seed {seed})"
    click.echo(f"{'DIFFERS' if differ else 'VERIFIED'}: {path}, backend {held.backend}, {level}; {what}")
    raise click.exceptions.Exit(int(bool(differ)))


def consistent(held: CertifiedReport) -> list[str]:
    """What a report says of itself that its own findings deny: the level, and for this very suite
    the list of checks.
    """
    from dsv4_conformance.report import certificate
    from dsv4_conformance.run.catalogue import collect
    from dsv4_conformance.run.runner import level_of_statuses

    said = []
    reached = None if held.partial else level_of_statuses([(f.level, f.status) for f in held.findings])
    if reached != held.level:
        said.append(f"level {held.level} in the report; its findings come to {reached}")
    if not held.partial and held.certificate.suite == certificate.suite():
        options = dict(word.split("=", 1) for word in held.certificate.arguments if "=" in word)
        backend = registry.create(held.backend, numerics=held.numerics, **options)
        ids, named = {c.id for c in collect(held.tier, held.numerics, backend)}, {f.id for f in held.findings}
        if missing := sorted(ids - named):
            said.append(f"{len(missing)} checks of tier {held.tier} are not in the report, first {missing[0]}")
    return said


def same_files(held: CertifiedReport) -> list[str]:
    """Which files are others here than those that the report is of."""
    from dsv4_conformance.report import certificate

    c = held.certificate
    said = [] if c.suite == certificate.suite() else [f"suite {c.suite}; here {certificate.suite()}"]
    for what, was, now in (
        ("plug-in", c.plugin, certificate.plugin(held.backend)),
        ("oracle", c.oracle, certificate.oracle()),
    ):
        if was.files != now["files"]:
            here = f"{now['distribution']} {now['version']}, files {now['files']}"
            said.append(f"{what} of {was.distribution} {was.version}, files {was.files}; here {here}")
    return said


def draw(findings: Sequence[Sworn], count: int, seed: int) -> list[Sworn]:
    """Draw a sample: at most one check of a model and one law, the rest quick ones; what was
    unsupported is left out.
    """
    rng = random.Random(seed)
    ran = [f for f in findings if f.status != "unsupported"]
    slow = [[f for f in ran if f.group == group] for group in ("model", "law")]
    picked = [rng.choice(some) for some in slow if some]
    quick = [f for f in ran if f.group in QUICK]
    picked += rng.sample(quick, min(max(count - len(picked), 0), len(quick)))
    return picked[:count]


def rerun(held: CertifiedReport, ids: Sequence[str], folder: Path) -> CertifiedReport:
    """Run the named checks in a process of their own, with the report's numerics and options."""
    from dsv4_conformance.files.forms import CertifiedReport

    words = [
        "conformance",
        "run",
        "--backend",
        held.backend,
        *held.certificate.arguments,
        "--quiet",
        "--report",
        str(folder),
    ]
    for case in ids:
        words += ["--case", case]
    done = subprocess.run(  # noqa: S603  our own command; the words were held to their form
        [sys.executable, "-m", "dsv4_core", *words], check=False, capture_output=True, text=True
    )
    try:
        return json_file(folder / "report.json", CertifiedReport, ADVICE)
    except (FileError, FileNotFoundError):
        raise ValueError(f"the sample could not be run: {(done.stderr or done.stdout).strip()[-400:]}") from None


def versions(held: CertifiedReport, again: CertifiedReport) -> list[str]:
    """Libraries of other versions here: no fault, but a reason where bits differ."""
    was, now = held.certificate.libraries, again.certificate.libraries
    return [
        f"{name} {was[name]} in the report, {now[name]} here"
        for name in sorted(was.keys() & now.keys())
        if was[name] != now[name]
    ]
