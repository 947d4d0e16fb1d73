"""Split-K: how the sum of a product is shared out where its outputs alone give too few programs."""

from __future__ import annotations

from dsv4_backend_cuda import roofline
from dsv4_backend_cuda.launch import cdiv

LEAST = 4
"""Steps of 128 inputs in a piece: fewer, and filling the pipeline takes longer than the piece."""


WORTH_A_LAUNCH = 4
"""Pieces from which the time saved is more than the launch that adds them up, by the model of the
machine code (docs/kernels.md).
"""


def span(programs: int, steps: int, arch: int, *, reader: bool = False) -> int:
    """Steps of 128 inputs that one program sums, of ``steps``. ``reader``: the kernel that reads
    the result adds the pieces up.

    Follows from shapes and the architecture's product in ``roofline.DEVICES`` alone, not from the
    GPU that is there: results have the same bits on every GPU of an architecture. All of them where
    the pieces would not all run at once.
    """
    pieces = min(roofline.DEVICES[arch].multiprocessors // max(programs, 1), steps // LEAST)
    return cdiv(steps, pieces) if pieces >= (2 if reader else WORTH_A_LAUNCH) else steps
