"""Larger blocks for the interpreter, where an operation costs the same for a hundred numbers as for ten thousand.

Only sizes that no result's bits depend on: how many outputs or channels a program takes at a time, never how a sum is cut into pieces. Everything else
is as sm_90 runs it.
"""

from __future__ import annotations

from dsv4_backend_cuda import launch

LARGER = {
    "fp4_experts_decode": {"BLOCK_N": 256},
    "fp4_experts_prefill": {"BLOCK_N": 256},
    "fp4_linear_decode": {"BLOCK_N": 256},
    "fp4_linear_prefill": {"BLOCK_N": 256},
    "bf16_linear_decode": {"BLOCK_N": 256},
    "bf16_linear_prefill": {"BLOCK_N": 256},
    "grouped_linear_decode": {"BLOCK_N": 256},
    "grouped_linear_prefill": {"BLOCK_N": 256},
    "linear_decode": {"BLOCK_N": 128},  # of one scale block
    "fp8_experts_decode": {"BLOCK_N": 128},
    "mix": {"BLOCK_K": 512},
    "rms_norm": {"ROWS": 8},
    "route": {"ROWS": 16},
    "swiglu": {"ROWS": 16},
    "sort": {"BLOCK": 4096},
    "compress": {"BLOCK": 512},
    "rope": {"HEADS": 64},
    "act_quant": {"GROUPS": 128},
    "act_qdq": {"GROUPS": 256},
    "sparse_attn_combine": {"HEADS": 64},
}


def enlarge(arch: int) -> None:
    """Take the larger blocks in this process's launch table."""
    for kernel, sizes in LARGER.items():
        launch.config(kernel, arch).update(sizes)
