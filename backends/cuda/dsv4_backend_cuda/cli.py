"""``dsv4 kernels``: compile and judge the Triton kernels without a GPU; write their launch table
with one.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
from dsv4_backend_torch import interpret

from dsv4_backend_cuda import build, prove
from dsv4_backend_cuda.launch import ARCHITECTURES, compatible
from dsv4_core.cli.stages import WELL
from dsv4_core.contract.spec import BackendError
from dsv4_core.files.writing import write_over


@click.group("kernels")
def command() -> None:
    """Build the CUDA backend's kernels offline, or tune them on a GPU."""


def _architectures(ctx: click.Context, option: click.Parameter, value: str) -> list[int]:
    del ctx, option
    known = {f"sm_{a}": a for a in ARCHITECTURES}
    if unknown := [name for name in value.split(",") if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} has no kernels here; they are compiled for {', '.join(known)}")
    return [known[name] for name in value.split(",")]


def require_triton(*, untested: bool) -> None:
    """Raise ``BackendError`` without Triton, or with a version that no baseline and no proof is
    for, unless ``untested``.
    """
    proven = interpret.TESTED_TRITON[-1]
    if find_spec("triton") is None:
        raise BackendError(f"kernels are compiled by Triton, which is not installed here; pip install triton=={proven}")
    if not build.baseline(found := version("triton")).exists() and not untested:
        raise BackendError(
            f"triton {found}: there is no baseline of its registers, spills and instructions; "
            f"install triton=={proven}, or add --untested-triton to go on without one"
        )


@command.command("build")
@click.option(
    "--arch",
    "architectures",
    default=",".join(f"sm_{a}" for a in ARCHITECTURES),
    callback=_architectures,
    help="Comma-separated, sm_80 to sm_120.",
)
@click.option("--kernel", default="", help="Only kernels whose name contains this.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1, 1024), help="Compiling processes.")
@click.option("--untested-triton", is_flag=True, help="Go on with a Triton version that the baseline is not from.")
@click.option("--update-baseline", is_flag=True, help="Make spills and hot loops of this build the baseline.")
def build_command(
    architectures: list[int],
    kernel: str,
    report: Path | None,
    jobs: int,
    *,
    untested_triton: bool,
    update_baseline: bool,
) -> None:
    """Compile every kernel and configuration, no driver needed, and gate each; exit 1 if a gate
    fails.
    """
    from dsv4_core.cli.console import wide_console

    require_triton(untested=untested_triton)
    try:
        results = list(build.build(architectures, kernel, jobs=jobs))
    except interpret.InterpreterError as error:
        raise BackendError(str(error)) from None
    if not results:
        known = ", ".join(dict.fromkeys(spec.name for spec in build.specs()))
        raise BackendError(f"--kernel {kernel}: no kernel's name contains it; they are {known}")
    if update_baseline:
        build.write_baseline(results)
    results = build.against_baseline(results)
    console = wide_console()
    console.print(build.table(results))
    decode = build.decode_table(results)
    if decode.row_count:
        console.print(decode)
    if report:
        write_over(report, json.dumps(build.report(results), indent=1) + "\n")
    failed = [r for r in results if r.failures]
    click.echo(
        f"{len(results)} kernel variants, {len(failed)} failed, {sum(bool(r.unsupported) for r in results)} unsupported"
    )
    for r in failed:
        click.echo(f"{r.key}: {'; '.join(r.failures)}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


@command.command("tune")
@click.option("--device", "device_name", default="cuda", show_default=True)
@click.option("--kernel", default="", help="Only kernels whose name contains this.")
@click.option("--untested-triton", is_flag=True, help="Go on with a Triton version that no baseline is from.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table here; else into the package's own.",
)
def tune_command(device_name: str, kernel: str, out: Path | None, *, untested_triton: bool) -> None:
    """Time candidate configurations on this machine's GPU and write the fastest into the launch
    table.
    """
    from dsv4_backend_cuda import tune

    require_triton(untested=untested_triton)
    try:
        import torch
    except ImportError:
        raise BackendError("tuning needs PyTorch with CUDA; install it, or keep the checked-in table") from None
    if not torch.cuda.is_available():
        raise BackendError(
            "tuning needs a GPU and there is none that PyTorch can use here; the checked-in launch table stays as it is"
        )
    for name, before, after in tune.tune(device_name, kernel, out):
        click.echo(
            f"{name}: {before.milliseconds:.4f} ms {before.config} -> {after.milliseconds:.4f} ms {after.config}"
        )


@command.command("warm")
@click.argument("model", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--preset", "presets", multiple=True, type=click.Choice(["flash", "pro"]), help="A published model.")
@click.option("--arch", type=int, help="Compute capability to compile for, e.g. 90; else this machine's GPU's.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1, 1024), help="Compiling processes.")
@click.option(
    "--depth",
    type=click.Choice(["compile", "parse", "count"]),
    default="compile",
    show_default=True,
    help="compile: into Triton's cache. parse, count: to see what would be.",
)
def warm_command(model: Path | None, presets: tuple[str, ...], arch: int | None, jobs: int, depth: str) -> None:
    """Compile what MODEL's steps launch into Triton's cache, before the first request waits for
    it.
    """
    from dsv4_backend_cuda import warm
    from dsv4_core.checkpoint.config import PRESETS
    from dsv4_core.checkpoint.weights import Checkpoint

    require_triton(untested=True)
    if not model and not presets:
        raise click.UsageError("nothing to warm: name a MODEL directory, or --preset flash or pro")
    if arch is None:
        import torch

        from dsv4_backend_cuda import device

        device.require_gpu("cuda")
        major, minor = torch.cuda.get_device_capability("cuda")
        arch = 10 * major + minor
    try:
        compatible(arch)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--arch") from None
    models = {name: PRESETS[name] for name in presets}
    if model:
        models[model.name] = Checkpoint(model).config
    failures = {}
    for done in warm.warm(models, arch, depth, jobs=jobs):
        count = sum(done.specialisations.values())
        click.echo(
            f"{done.what}: {count} specialisations of {len(done.specialisations)} kernels, {len(done.failures)} failed"
        )
        failures |= done.failures
    for which, why in failures.items():
        click.echo(f"{which}: {why}", err=True)
    if failures:
        raise click.exceptions.Exit(1)


@command.command("prove")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the report; what it holds is not run again.",
)
@click.option(
    "--stage", "stages", multiple=True, type=click.Choice(list(prove.STAGES)), help="Only this stage; may be repeated."
)
@click.option("--again", is_flag=True, help="Run stages anew that have ended.")
@click.option(
    "--dry-run", is_flag=True, help="Go through the stages without a GPU: interpreted or launched dry, nothing timed."
)
def prove_command(out: Path, stages: tuple[str, ...], *, again: bool, dry_run: bool) -> None:
    """Show everything that this machine's GPU can show of the kernels, in stages of ten minutes,
    and write one report.

    Exit status: 0 all passed, 1 something failed or is not finished, 2 could not run.
    """
    require_triton(untested=True)
    try:
        made, text = prove.prove(out, dry=dry_run, only=stages, again=again, tell=click.echo)
    except FileExistsError as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    click.echo(f"\n{text}\nreport: {out / 'report.md'}")
    if any(made.stages[name].state not in WELL for name in stages or prove.STAGES):
        raise click.exceptions.Exit(1)
