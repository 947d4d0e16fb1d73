"""Commands of ``dsv4 kernels prove`` that run in processes of their own: python -m
dsv4_backend_cuda.proving ceilings|times --json FILE.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from dsv4_backend_cuda import dry
from dsv4_core.files.writing import write_over


def ceilings() -> dict[str, float]:
    """What this GPU reaches: GB/s of a copy, and TFLOP/s of a BF16 and an FP8 product of 8192."""
    from triton.testing import do_bench

    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other, n = torch.empty_like(big), 8192
    found = {"copy_gb_per_s": 2 * big.numel() / do_bench(lambda: other.copy_(big)) / 1e6}
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    found["bf16_tflops"] = 2 * n**3 / do_bench(lambda: a @ a) / 1e9
    if torch.cuda.get_device_capability() >= (8, 9):
        f, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        product = torch._scaled_mm  # noqa: SLF001 - torch has no public name for it
        found["fp8_tflops"] = (
            2 * n**3 / do_bench(lambda: product(f, f.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)) / 1e9
        )
    return {k: round(v, 1) for k, v in found.items()}


def main() -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["ceilings", "times"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.what == "ceilings":
        write_over(options.json, json.dumps(ceilings(), indent=1) + "\n")
        return
    if options.dry_run:
        dry.activate(90, "count")
    from dsv4_backend_cuda.times import times

    rows = []
    for row in times():
        rows.append(asdict(row))
        write_over(options.json, json.dumps(rows, indent=0) + "\n")  # what is known stays, whatever comes


if __name__ == "__main__":
    main()
