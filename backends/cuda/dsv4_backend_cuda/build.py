"""Compile every kernel for every architecture without a GPU or driver, and gate what came out.

Runs in a process in which the interpreter is not active. What it reports of speed is a model, not a
measurement.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from re import search
from typing import Any

from dsv4_backend_torch import interpret

from dsv4_backend_cuda import decode, roofline, sass
from dsv4_backend_cuda.launch import ARCHITECTURES, KernelSpec
from dsv4_core.files.writing import write

BASELINES = Path(
    __file__
).parent  # of checked-in baselines, one for each version of Triton: compilers differ in spills and loops
HEADING = "Compiled offline; model, not measured"


@dataclass(frozen=True)
class Result:
    """One kernel variant on one architecture: what the machine code holds, what the model makes of
    it, which gates failed.
    """

    kernel: str
    variant: str
    arch: int
    config: dict[str, Any] = field(default_factory=dict)
    registers: int = 0
    shared: int = 0
    tensor_memory: int = 0
    blocks: int = 0
    occupancy: float = 0.0
    mma: list[str] = field(default_factory=list)
    instructions: int = 0
    loop_instructions: int = 0
    loop_kinds: dict[str, int] = field(default_factory=dict)
    loop_bytes_issued: int = 0
    spills: int = 0
    conversions: int = 0
    stall_cycles: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    bound: str = ""
    share: float = 0.0
    unsupported: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Name in the baseline."""
        return f"{self.kernel}/{self.variant}/sm_{self.arch}"


def specs() -> Iterator[KernelSpec]:
    """Specifications of all kernels, from each file of ``kernels``."""
    if interpret.active() or os.environ.get("TRITON_INTERPRET") == "1":
        raise interpret.InterpreterError(
            "kernels cannot be compiled in a process that interprets them; unset TRITON_INTERPRET and start anew"
        )
    package = import_module("dsv4_backend_cuda.kernels")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        yield from getattr(import_module(f"dsv4_backend_cuda.kernels.{module}"), "SPECS", ())


def cache_root() -> Path:
    """Folder of compiled results: ``$XDG_CACHE_HOME/dsv4/kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsv4" / "kernels"


def fingerprint(spec: KernelSpec, constexprs: dict[str, Any], options: dict[str, Any], arch: int) -> str:
    """Hash of all that decides a result: source with its callees, arguments, options, Triton, and
    the inspection's own code.
    """
    own = "".join(Path(m.__file__).read_text() for m in (sass, roofline) if m.__file__) + Path(__file__).read_text()
    work = spec.work(constexprs)
    parts = [
        spec.kernel.cache_key,
        dict(spec.signature),
        constexprs,
        options,
        arch,
        asdict(work),
        dict(spec.mma),
        spec.looped,
        version("triton"),
        own,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def compile_kernel(spec: KernelSpec, constexprs: dict[str, Any], options: dict[str, Any], arch: int) -> Any:
    """Compile ahead of time for ``arch``; pointers are taken as aligned to 16 bytes, as torch
    allocates them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    if missing := [n for n in names if n not in spec.signature and n not in constexprs]:
        raise TypeError(
            f"kernel {spec.name!r}: argument {missing[0]!r} is in neither its signature nor its constexprs; add it to the KernelSpec"
        )
    source = ASTSource(
        fn=spec.kernel,
        signature={n: spec.signature.get(n, "constexpr").removesuffix(":16") for n in names},
        constexprs={(names.index(n),): v for n, v in constexprs.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n, kind in spec.signature.items()
            if kind.startswith("*") or kind.endswith(":16")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def build_one(spec: KernelSpec, variant: str, arch: int) -> Result:
    """Compile, inspect, model and gate one variant, or take the result from the cache."""
    if reason := spec.unsupported.get(arch):
        return Result(spec.name, variant, arch, unsupported=reason)
    constexprs, options = spec.constexprs(variant, arch), spec.options(arch)
    config = {**constexprs, **options}
    stored = cache_root() / f"{fingerprint(spec, constexprs, options, arch)}.json"
    if stored.exists():
        return Result(**json.loads(stored.read_text()))
    try:
        compiled = compile_kernel(spec, constexprs, options, arch)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the result
        lines = str(error).strip().splitlines()
        return Result(
            spec.name,
            variant,
            arch,
            config=config,
            failures=[f"does not compile: {type(error).__name__}: {lines[-1] if lines else ''}"],
        )
    code = sass.inspect(compiled.asm["cubin"], looped=spec.looped)
    device, work = roofline.DEVICES[arch], spec.work(constexprs)
    meta = compiled.metadata
    tensor_memory = meta.tmem_size or 0
    blocks = roofline.blocks_per_multiprocessor(
        device, registers=code.registers, shared=meta.shared, warps=meta.num_warps, tensor_memory=tensor_memory
    )
    model = roofline.estimate(
        device,
        work,
        instructions=len(code.loop),
        warps=meta.num_warps,
        conversions=code.conversions(),
        stalls=code.stall_cycles(),
        blocks=blocks,
    )
    result = Result(
        kernel=spec.name, variant=variant, arch=arch, config=config, registers=code.registers, shared=meta.shared, tensor_memory=tensor_memory,
        blocks=blocks, occupancy=blocks * meta.num_warps / device.warps, mma=code.mma_shapes(), instructions=len(code.instructions),
        loop_instructions=len(code.loop), loop_kinds=code.kinds(), loop_bytes_issued=code.loop_bytes() * meta.num_warps, spills=code.spills(),
        conversions=code.conversions(), stall_cycles=code.stall_cycles(), bytes=work.bytes, flops=work.flops, bound=model.bound,
        share=model.share, failures=list(_gates(spec, arch, code, meta.shared, tensor_memory, blocks)),
    )  # fmt: skip
    write(stored, json.dumps(asdict(result)))
    return result


def _gates(spec: KernelSpec, arch: int, code: sass.Code, shared: int, tensor_memory: int, blocks: int) -> Iterator[str]:
    device = roofline.DEVICES[arch]
    if not any(i.opcode.startswith(("STG", "UTMASTG", "UBLKCP")) for i in code.instructions):
        yield f"empty kernel: {len(code.instructions)} instructions and none stores to memory"
    if (family := spec.mma.get(arch)) and not any(search(rf"^({family})", f) for f in code.families()):
        yield f"tensor cores: expected {family}, found {', '.join(code.families()) or 'none'}"
    if shared > device.shared_per_block:
        yield f"shared memory: {shared} bytes of {device.shared_per_block}"
    if tensor_memory > device.tensor_memory:
        yield f"tensor memory: {tensor_memory} columns of {device.tensor_memory}"
    if code.registers > 255:
        yield f"registers: {code.registers} of 255"
    elif not blocks:
        yield f"no block fits on a multiprocessor: {code.registers} registers a thread"


def baseline(triton: str = "") -> Path:
    """The file of a Triton version's baseline (the installed one's): patch releases share it."""
    return BASELINES / f"build_baseline-{'.'.join((triton or version('triton')).split('.')[:2])}.json"


def against_baseline(results: Iterable[Result]) -> list[Result]:
    """Add a failure where a hot loop spills more or issues more than the checked-in baseline, or is
    not in it.
    """
    known = json.loads(baseline().read_text()) if baseline().exists() else {}
    judged = []
    for r in results:
        failures = list(r.failures)
        if not r.unsupported and not failures:
            if r.key not in known:
                failures.append(
                    f"no baseline for {r.key}; run `dsv4 kernels build --update-baseline` and review the difference"
                )
            else:
                for what, got in (("spills", r.spills), ("loop_instructions", r.loop_instructions)):
                    if got > known[r.key][what]:
                        failures.append(f"{what}: {got}, baseline {known[r.key][what]}")
        judged.append(Result(**(asdict(r) | {"failures": failures})))
    return judged


def write_baseline(results: Iterable[Result]) -> None:
    """Make these results the baseline; rows of kernels that were not built stay."""
    built = {r.key: r for r in results}
    kernels = {r.kernel for r in built.values()}
    rows = {
        k: {"spills": r.spills, "loop_instructions": r.loop_instructions}
        for k, r in built.items()
        if not r.unsupported and not r.failures
    }
    known = json.loads(baseline().read_text()) if baseline().exists() else {}
    kept = {k: v for k, v in known.items() if k in built or k.split("/")[0] not in kernels}
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((kept | rows).items())]
    write(baseline(), "{\n" + ",\n".join(lines) + "\n}\n")


def build(architectures: Iterable[int] = ARCHITECTURES, only: str = "", *, jobs: int = 1) -> Iterator[Result]:
    """Build all variants of all kernels (whose name contains ``only``) for the architectures, in
    ``jobs`` processes, in order.
    """
    wanted = list(architectures)
    tasks = [
        (i, v, a)
        for i, s in enumerate(specs())
        if only in s.name
        for v in s.variants
        for a in wanted
        if a in s.architectures
    ]
    if jobs == 1:
        yield from map(_build_task, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_build_task, tasks)


@cache
def _all_specs() -> tuple[KernelSpec, ...]:
    return tuple(specs())


def _build_task(task: tuple[int, str, int]) -> Result:
    index, variant, arch = task
    return build_one(_all_specs()[index], variant, arch)


def report(results: Iterable[Result]) -> dict[str, Any]:
    """The JSON report."""
    rows = list(results)
    return {
        "heading": HEADING,
        "triton": version("triton"),
        "devices": {f"sm_{a}": asdict(d) for a, d in roofline.DEVICES.items()},
        "results": [asdict(r) for r in rows],
        "decode": [asdict(s) for s in decode.steps(rows)],
    }


def table(results: Iterable[Result]) -> Any:
    """The report as a rich table."""
    from rich.table import Table

    out = Table(title=HEADING)
    for column in (
        "kernel",
        "variant",
        "arch",
        "regs",
        "shared",
        "occ.",
        "MMA",
        "loop",
        "spills",
        "bytes",
        "kflop",
        "bound",
        "floor / predicted",
        "gate",
    ):
        out.add_column(column, overflow="fold")
    for r in results:
        if r.unsupported:
            out.add_row(r.kernel, r.variant, f"sm_{r.arch}", *[""] * 10, f"unsupported: {r.unsupported}")
            continue
        family = ", ".join(sorted({m.split(".")[0] for m in r.mma}))
        out.add_row(
            r.kernel, r.variant, f"sm_{r.arch}", str(r.registers), str(r.shared), f"{r.occupancy:.0%}", family, str(r.loop_instructions), str(r.spills),
            f"{r.bytes:.0f}", f"{r.flops / 1e3:.0f}", r.bound, f"{r.share:.0%}", "; ".join(r.failures) or "passed",
        )  # fmt: skip
    return out


def decode_table(results: Iterable[Result]) -> Any:
    """What a decode step's products cannot do without, of what is predicted, as a rich table: an
    architecture a column.
    """
    from rich.table import Table

    rows = list(decode.steps(results))
    columns = sorted({s.arch for s in rows})
    out = Table(title=f"Decode, one token: floor of memory over predicted time. {HEADING}")
    for column in ("model", "product", "MB", *(f"sm_{a}" for a in columns)):
        out.add_column(column)
    for key in dict.fromkeys((s.model, s.layer, s.megabytes) for s in rows):
        shares = {s.arch: f"{s.share:.0%}" for s in rows if (s.model, s.layer, s.megabytes) == key}
        out.add_row(key[0], key[1], f"{key[2]:.2f}", *(shares.get(a, "") for a in columns))
    return out
