"""Simulated CANN: the npu ops that the backend calls, on the CPU, as the documents describe them.

Registered under the schemas of the real torch-npu wheel, refusing what the documents refuse,
rounding where they say the device rounds, and leaving NaN where they leave results undefined. It
proves that the backend calls the ops as documented; it cannot prove that a vendor's kernel does
what its document says.
"""

from dsv4_backend_ascend.simulate import (
    extension,
    format_cast,
    gating,
    grouped_matmul,
    indexer,
    mhc,
    norm,
    quant_matmul,
    quantise,
    rotary,
    routing,
    sparse_attention,
    swiglu,
    transpose_matmul,
)
from dsv4_backend_ascend.simulate.library import KERNELS, SHAPES, CannError, Chip, Kernel, install

__all__ = [
    "KERNELS", "SHAPES", "CannError", "Chip", "Kernel", "extension", "format_cast", "gating", "grouped_matmul",
    "indexer", "install", "mhc", "norm", "quant_matmul", "quantise", "rotary", "routing", "sparse_attention",
    "swiglu", "transpose_matmul",
]  # fmt: skip
