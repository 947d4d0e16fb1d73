"""Compile every Triton kernel that a decode step of the published models launches, as far as that
goes without CANN; write a report.

``list`` runs where dsv4 is installed and says what is launched. ``build`` and ``linalg`` run in an
environment of its own, with triton-ascend, ascendnpu-ir, pybind11, attrs and psutil from PyPI and
nothing of dsv4: Triton's front end and Triton-Ascend's adapter lower each kernel to MLIR of tensors
(linalg), and bishengir-compile that to HIVM, in which every instruction of a vector core and every
byte of its memory is placed. There it wants hivmc, the assembler, which is CANN's alone.

    python backends/ascend/tools/compile_kernels.py list FILE
    DIR/bin/python backends/ascend/tools/compile_kernels.py build FILE --report kernels.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "dsv4_backend_ascend"
TARGETS = {
    "910B": ("bishengir-compile", "Ascend910B3", ["--enable-hivm-compile=true"]),
    "910C": ("bishengir-compile", "Ascend910_9392", ["--enable-hivm-compile=true"]),
    "950": ("bishengir-compile-a5", "Ascend950PR_9599", []),
}
OPTIONS = ["--enable-auto-multi-buffer=true", "--enable-hfusion-compile=true", "--enable-triton-kernel-compile=true"]
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i1": 1 / 8, "i8": 1, "i16": 2, "i32": 4, "i64": 8}


def sources() -> str:
    """Digest of the kernels' sources."""
    files = sorted((PACKAGE / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def listed(to: Path) -> None:
    """Write what is launched."""
    from dsv4_backend_ascend.specialised import every

    launches = [{**one._asdict(), "in": where} for one, where in every().items()]
    to.write_text(json.dumps({"sources": sources(), "launches": launches}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(launches)} kernels with their types and constants: {to}")


def linalg(launch: dict[str, Any], generation: str) -> str:
    """MLIR of one kernel after Triton's front end and Triton-Ascend's adapter."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = launch["kernel"].partition(".")
    kernel = getattr(importlib.import_module(f"dsv4_backend_ascend.kernels.{module}"), name)
    constants = dict(launch["constants"])
    names = [argument for argument in kernel.arg_names if argument not in constants]
    signature = dict(zip(names, launch["types"], strict=True))
    backend = compiler.AscendBackend(GPUTarget("npu", TARGETS[generation][1], 0))
    options = backend.parse_options({"compile_on_910_95": generation == "950"})
    context = ir.context()
    ir.load_dialects(context)
    source = ASTSource(kernel, signature=signature, constants=constants)
    mod = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {**options.__dict__, "hash": "0", "target": backend.target}
    return compiler.ttir_to_linalg(compiler.make_ttir(mod, metadata, options), metadata, options, named_ops=True)


def lowered(given: Path, folder: Path) -> int:
    """Write the linalg of what is listed, for 910B: a file each, by number."""
    sys.path.insert(0, str(PACKAGE.parent))
    for i, launch in enumerate(json.loads(given.read_text(encoding="utf-8"))["launches"]):
        (folder / f"{i}.mlir").write_text(linalg(launch, "910B"), encoding="utf-8")
    return 0


def hivm(text: str, generation: str, folder: Path) -> tuple[str, str]:
    """HIVM of a kernel's linalg, or why there is none."""
    import ascendnpuir

    program, target, more = TARGETS[generation]
    given = folder / "kernel.mlir"
    given.write_text(re.sub(r', mix_mode = "\w+"', "", text), encoding="utf-8")  # as Triton-Ascend hands it over
    temporary = folder / generation
    binary = Path(ascendnpuir.__file__).parent / "bin" / program
    ran = subprocess.run(
        [
            str(binary),
            str(given),
            f"--target={target}",
            *OPTIONS,
            *more,
            f"--save-temps={temporary}",
            "-o",
            str(folder / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    made = temporary / "module.hivm.opt.mlir"
    if made.exists():
        return made.read_text(encoding="utf-8"), ""
    errors = [line for line in ran.stderr.splitlines() if "error:" in line.lower()]
    return "", re.sub(r'loc\("[^"]*"[^)]*\): ', "", " ".join(errors))[:300] or "no HIVM"


def memory(text: str) -> int:
    """Bytes of a vector core's memory that HIVM places buffers in."""
    numbers = {name: int(value) for name, value in re.findall(r"(%c\w+) = arith.constant (\d+) : i64", text)}
    end = 0.0
    for offset, shape in re.findall(r"pointer_cast\((%c\w+)\)[^:]*: memref<([\dx\w]+), #hivm.address_space<ub>>", text):
        *sizes, kind = shape.split("x")
        size = BYTES[kind]
        for n in sizes:
            size *= int(n)
        end = max(end, numbers[offset] + size)
    return int(end)


def one_by_one(text: str) -> int:
    """Loops of HIVM that pass over a buffer element by element."""
    loops = re.findall(r"scf\.for (%\w+) = .*?\{(.*?)\n\s*\}", text, re.DOTALL)
    return sum(bool(re.search(rf"memref\.load %\w+\[{name}\].*address_space<ub>", body)) for name, body in loops)


def build(given: Path, report: Path) -> int:
    """Compile what is listed, for every chip."""
    sys.path.insert(0, str(PACKAGE.parent))
    wanted = json.loads(given.read_text(encoding="utf-8"))
    if wanted["sources"] != sources():
        raise SystemExit(f"{given} lists kernels of other sources; write it again")
    kernels, failed = [], 0
    for launch in wanted["launches"]:
        reached: dict[str, Any] = {}
        for generation in TARGETS:
            try:
                text = linalg(launch, generation)
            except Exception as error:  # noqa: BLE001  a compiler's: whatever it is, the report says it
                said = getattr(error, "stderr", None) or str(error).encode()
                reached[generation] = {"reached": "nothing", "error": said.decode()[-300:]}
                continue
            with tempfile.TemporaryDirectory() as folder:
                made, error_ = hivm(text, generation, Path(folder))
            reached[generation] = (
                {"reached": "HIVM", "bytes of a core's memory": memory(made), "loops over elements": one_by_one(made)}
                if made
                else {"reached": "linalg", "error": error_}
            )
        failed += any("error" in result for result in reached.values())
        kernels.append({**launch, "chips": reached})
        print(
            launch["kernel"],
            dict(launch["constants"]),
            {g: r.get("error", r["reached"]) for g, r in reached.items()},
            flush=True,
        )
    found = {
        "says": "each kernel by Triton's front end, Triton-Ascend's adapter and bishengir-compile, up to where it calls hivmc, "
        "which CANN alone has: no machine code was made and no NPU was present",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("triton-ascend", "ascendnpu-ir")},
        "targets": {generation: target for generation, (_, target, _) in TARGETS.items()},
        "sources": wanted["sources"],
        "kernels": kernels,
    }
    report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kernels)} kernels, {failed} not compiled to HIVM on every chip: {report}")
    return 1 if failed else 0


def main() -> int:
    """Command line; fails where a kernel does not reach HIVM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list").add_argument("file", type=Path)
    lower = commands.add_parser("linalg")
    lower.add_argument("file", type=Path)
    lower.add_argument("folder", type=Path)
    wanted = commands.add_parser("build")
    wanted.add_argument("file", type=Path)
    wanted.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "list":
        listed(args.file)
        return 0
    return lowered(args.file, args.folder) if args.command == "linalg" else build(args.file, args.report)


if __name__ == "__main__":
    sys.exit(main())
