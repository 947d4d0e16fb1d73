"""Run on a CPU what Triton-Ascend's adapter makes of each kernel, and compare with the interpreter.

Contracts are called at published widths with the kernels interpreted; what each launch was given is
kept. Then the same kernels, lowered to linalg in the environment of ``compile_kernels.py``, are
compiled by LLVM for this machine and given the same. It shows that Triton's front end and the
adapter keep a kernel's meaning; HIVM, and what comes after it, nothing here can run.

    python backends/ascend/tools/replay_kernels.py --python DIR/bin/python --report replayed.json

Wants LLVM 19 with mlir-opt (Debian: mlir-19-tools, llvm-19) and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from dsv4_backend_ascend import triton
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann.call import planning
from dsv4_backend_ascend.specialised import START, TYPES, scalar_type

from dsv4_core.contract.dtypes import RowLayout, ScaledArray

LLVM = ("mlir-opt-19", "mlir-translate-19", "llc-19")
PROGRAMS = 5  # of a launch here: fewer than units, so that each loops
UNITS = {"bfloat16": 2, "float32": 64, "int32": 0}
"""What a result may be off by: two roundings of BF16; of float32 two units for each of Sinkhorn's
half steps and what comes before, since sums and exponentials are other ones.
"""
PASSES = [
    *(
        "--convert-elementwise-to-linalg",
        "--canonicalize",
        "--eliminate-empty-tensors",
        "--empty-tensor-to-alloc-tensor",
    ),
    "--one-shot-bufferize=allow-return-allocs-from-loops=true allow-unknown-ops=1",
    *(
        "--buffer-deallocation-pipeline",
        "--convert-linalg-to-loops",
        "--convert-scf-to-cf",
        "--expand-strided-metadata",
    ),
    *("--lower-affine", "--convert-math-to-libm", "--arith-expand=include-bf16=true", "--convert-math-to-llvm"),
    *("--finalize-memref-to-llvm", "--convert-arith-to-llvm", "--convert-func-to-llvm", "--convert-index-to-llvm"),
    *("--convert-cf-to-llvm", "--reconcile-unrealized-casts"),
]

COPY = """
#include <string.h>
typedef struct { char *allocated, *aligned; long offset, dims[]; } Strided; /* dims: sizes, then strides */
typedef struct { long rank; Strided *of; } Any;
static void copy(long size, long rank, const long *sizes, const long *from, const long *to, const char *a, char *b) {
  if (!rank) { memcpy(b, a, size); return; }
  for (long i = 0; i < *sizes; i++) copy(size, rank - 1, sizes + 1, from + 1, to + 1, a + i * *from * size, b + i * *to * size);
}
void memrefCopy(long size, Any *from, Any *to) {
  Strided *a = from->of, *b = to->of;
  long n = from->rank;
  copy(size, n, a->dims, a->dims + n, b->dims + n, a->aligned + a->offset * size, b->aligned + b->offset * size);
}
"""
"""What MLIR's runtime library has: a copy between runs with gaps."""


class Launched(NamedTuple):
    """A launch: what it was given, and its results as the interpreter left them, None for what is
    none.
    """

    kernel: str
    constants: dict[str, Any]
    before: list[Any]
    after: list[torch.Tensor | None]


class Memref(ctypes.Structure):
    """MLIR's descriptor of a run of elements."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("allocated", "aligned")),
        *((name, ctypes.c_int64) for name in ("offset", "size", "stride")),
    ]


def copied(arguments: Any) -> list[Any]:
    """Copies of tensors; one that stands there twice is one copy."""
    made = {a.data_ptr(): a.clone() for a in arguments if isinstance(a, torch.Tensor)}
    return [made[a.data_ptr()] if isinstance(a, torch.Tensor) else a for a in arguments]


def launches() -> list[Launched]:
    """Call contracts at Flash's and Pro's widths, and keep what was launched."""
    seen: list[Launched] = []
    run = triton.launch

    def noted(backend: Any, kernel: str, units: int, *arguments: Any, results: Any, **constants: Any) -> None:
        if planning():
            return
        copies = copied(arguments)
        run(backend, kernel, units, *arguments, results=results, **constants)
        made = {result.data_ptr() for result in results}
        after = [a.clone() if isinstance(a, torch.Tensor) and a.data_ptr() in made else None for a in arguments]
        seen.append(Launched(kernel, constants, copies, after))

    triton.launch = noted
    backend = AscendBackend(simulate="910B", prefer="triton")
    draw = torch.Generator().manual_seed(0)

    def act(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(torch.bfloat16)

    def wide(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    positions, freqs = torch.tensor([7, START], dtype=torch.int32), 10000.0 ** (-torch.arange(32) / 32)
    eps, mix = 1e-6, {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}
    for dim, lora, experts in ((4096, 1024, 256), (7168, 1536, 384)):
        for channels in (dim, lora):
            backend.rms_norm(act(3, channels), act(channels), eps=eps)
        streams = (act(2, 4, dim), wide(24, 4 * dim) * dim**-0.5, wide(3), wide(24))
        backend.hc_pre_norm(*streams, act(dim), **mix)
        backend.hc_pre(*streams, **mix)
        backend.gate(act(3, dim), act(experts, dim), wide(experts) * 0.1, topk=6, route_scale=1.5)
        table = torch.stack([torch.randperm(experts, generator=draw)[:6] for _ in range(9)])
        ids = torch.tensor([8, 0, 3], dtype=torch.int32)
        backend.gate_hash(act(3, dim), act(experts, dim), table, ids, route_scale=1.5)
    for heads, dim, weight in ((64, 512, None), (1, 512, act(512)), (1, 128, act(128))):
        backend.rms_norm_rope(act(2, heads, dim), weight, positions, freqs, eps=eps)
    backend.apply_rope(act(2, 64, 128), positions, freqs, inverse=False)
    backend.apply_rope(act(2, 64, 512), positions, freqs, inverse=True)
    backend.hadamard(act(70, 128))
    backend.act_qdq(act(3, 4096), format="e4m3", block=128, channels=4096)
    backend.act_qdq(act(3, 512), format="e4m3", block=64, channels=448)
    backend.act_qdq(act(64, 128), format="e2m1", block=32, channels=128)
    index = torch.tensor([8, -1, 0, 3], dtype=torch.int32)
    for rows in (act(4, 512), act(4, 128), wide(4, 512), wide(4, 1024), wide(4, 2048)):
        backend.cache_write(
            torch.zeros((9, rows.shape[1]), dtype=rows.dtype), rows, index, layout=RowLayout("plain", rows.shape[1])
        )
    backend.cache_read(act(9, 128), index, layout=RowLayout("plain", 128))
    triton.joined(backend, act(9, 512), index, act(2, 512), act(20, 512), index + 5, zeros=1)
    for ratio, width, dim in ((128, 512, 512), (4, 1024, 512), (4, 256, 128)):
        span = ratio * (width // dim)
        slots = torch.arange(2 * span, dtype=torch.int32).flip(0)
        slots[1] = -1
        windows = torch.stack([torch.arange(span) + 2 * span - ratio, torch.arange(span)]).to(torch.int32)
        windows[1, 2] = -1
        state = wide(2 * span, 2 * width)
        backend.cached_compress(wide(ratio + span, 2 * width), state, slots, wide(ratio, width), windows, dim=dim)
    for weights in (wide(3), None):
        backend.swiglu(act(3, 2048) * 8, act(3, 2048) * 8, weights, limit=10.0)
    stacks = [
        ScaledArray(
            torch.randint(0, 256, (3, out, cols // 2), generator=draw, dtype=torch.uint8),
            torch.randint(110, 140, (3, out, cols // 32), generator=draw, dtype=torch.uint8),
            "e2m1",
        )
        for out, cols in ((128, 256), (128, 256), (256, 128))
    ]
    triton.expanded(backend, stacks, torch.tensor([2, 0], dtype=torch.int32))
    triton.combined(backend, act(12, 4096), act(2, 4096), 6, torch.bfloat16)
    triton.launch = run
    return seen


def listed(seen: list[Launched], to: Path) -> None:
    """What ``compile_kernels.py`` is to lower."""
    wanted = [
        {
            "kernel": one.kernel,
            "types": [TYPES[a.dtype] if isinstance(a, torch.Tensor) else scalar_type(a) for a in one.before],
            "constants": list(one.constants.items()),
        }
        for one in seen
    ]
    to.write_text(json.dumps({"launches": wanted}), encoding="utf-8")


def library(given: Path) -> Any:
    """A kernel's linalg, compiled for this machine."""
    text = given.read_text(encoding="utf-8")
    name = re.findall(r"func\.func @(\w+)", text)[0]
    text = re.sub(r"(func\.func @\w+\(.*\)) attributes \{[^}]*\}", r"\1 attributes {llvm.emit_c_interface}", text)
    source, low, ir, made, so = (given.with_suffix(f".{end}") for end in ("c.mlir", "llvm.mlir", "ll", "o", "so"))
    source.write_text(text, encoding="utf-8")
    copy = given.with_name("copy.c")
    copy.write_text(COPY, encoding="utf-8")
    for command in (
        [LLVM[0], str(source), "--allow-unregistered-dialect", *PASSES, "-o", str(low)],
        [LLVM[1], "--mlir-to-llvmir", str(low), "-o", str(ir)],
        [LLVM[2], "-O2", "-filetype=obj", "-relocation-model=pic", str(ir), "-o", str(made)],
        ["cc", "-O2", "-fPIC", "-shared", "-o", str(so), str(made), str(copy), "-lm"],
    ):
        subprocess.run(command, check=True)
    return getattr(ctypes.CDLL(str(so)), f"_mlir_ciface_{name}")


def replay(one: Launched, function: Any) -> list[Any]:
    """Run a kernel's programs one after another; give its tensors as they are then."""
    arguments = copied(one.before)
    scratch = torch.zeros(64, dtype=torch.uint8)
    given: list[Any] = []
    for a in (scratch, scratch, *arguments):
        if isinstance(a, torch.Tensor):
            room = a.untyped_storage().nbytes() // a.element_size()
            given.append(ctypes.byref(Memref(a.data_ptr(), a.data_ptr(), 0, room, 1)))
        else:
            given.append(ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int32(a))
    for program in range(PROGRAMS):
        function(*given, *map(ctypes.c_int32, (PROGRAMS, 1, 1, program, 0, 0)))
    return arguments


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """How far the furthest element is off, in units of the dtype's last place at the size of its
    row's largest element; 0 where all bits are the same.
    """
    if got.dtype not in {torch.bfloat16, torch.float32}:
        return 0.0 if torch.equal(got, want) else float("inf")
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    unit = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-24
    size = b.abs().amax(-1, keepdim=True) if b.dim() else b.abs()
    off = torch.where(same, 0.0, (a - b).abs() / (unit * size).clamp(min=1e-300))
    return float(np.nan_to_num(off.max().item(), nan=float("inf"))) if off.numel() else 0.0


def main() -> int:
    """Command line; fails where a result is off by more than ``UNITS``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has triton-ascend")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    if missing := [tool for tool in (*LLVM, args.python) if not shutil.which(tool)]:
        parser.error(f"not found: {', '.join(missing)}; Debian's mlir-19-tools and llvm-19 bring LLVM's")
    seen = launches()
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        listed(seen, Path(folder) / "list.json")
        tool = str(Path(__file__).with_name("compile_kernels.py"))
        compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        subprocess.run([args.python, tool, "linalg", f"{folder}/list.json", folder], check=True, env=compiling)
        for i, one in enumerate(seen):
            got = replay(one, library(Path(folder) / f"{i}.mlir"))
            pairs = [(g, w) for g, w in zip(got, one.after, strict=True) if w is not None]
            off = {str(w.dtype).removeprefix("torch."): 0.0 for _, w in pairs}
            for g, w in pairs:
                kind = str(w.dtype).removeprefix("torch.")
                off[kind] = round(max(off[kind], difference(g, w)), 3)
            kernels.append({"kernel": one.kernel, "constants": list(one.constants.items()), "units off": off})
            print(one.kernel, one.constants, off, flush=True)
    wrong = [k for k in kernels if any(units > UNITS[kind] for kind, units in k["units off"].items())]
    report = {
        "says": "each kernel's linalg, as Triton-Ascend's adapter makes it, compiled by LLVM for a CPU and given what the interpreter was given; "
        "furthest element of a result, in units of its row's last place",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "kernels": kernels,
    }
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    same = sum(not any(k["units off"].values()) for k in kernels)
    print(f"{len(kernels)} launches, {same} the same to the bit, {len(wrong)} off")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
