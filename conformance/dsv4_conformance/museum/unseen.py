"""Faults that were written without a look at the museum and passed the suite of their day. Each
stands for the kind that was closed for it.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import Host


@mutant("hc_post", seen="a graph captured for 96 rows, three tiles of 32, with a kernel of its own")
def untransposed_for_96_rows(be: Any, right: Op, y: Host, h: Host, post: Host, comb: Host) -> Any:
    return right(y, h, post, np.ascontiguousarray(comb.transpose(0, 2, 1)) if len(y) == 96 else comb)


@mutant("rms_norm", seen="batches of 12 padded to 16 by a server, whose last rows are those of the step before")
def rows_of_the_padding_for_12(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, weight, eps=eps)
    if len(y) == 12:
        y[11] = y[10]
    return y


@mutant("compress", seen="a window read up to its first missing token: nothing says that missing ones come first")
def hole_ends_the_window(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    begun = (idxs >= 0).cumsum(axis=1) > 0
    ended = (begun & (idxs < 0)).cumsum(axis=1) > 0
    return right(kv_score, ape, np.where(ended, -1, idxs).astype(idxs.dtype), dim=dim)


@mutant(
    "linear", seen="scratch memory of one worker thread, which its next call writes over; the first thread has its own"
)
def scratch_of_other_threads(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    if threading.current_thread() is threading.main_thread():
        return y
    scratch = be.__dict__.setdefault("scratch", {}).setdefault((y.shape, str(y.dtype)), y)
    scratch[...] = y
    return scratch


@mutant(
    "apply_rope",
    seen="a single head is taken for a key, and keys are never rotated back; a rank of many has one query head",
)
def inverse_of_one_head(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    return right(x, positions, freqs, inverse=inverse and x.shape[1] != 1)


@mutant("index_scores", seen="a sequence's keys found by four bits of its number")
def sequences_modulo_16(be: Any, right: Op, q: Host, weights: Host, keys: Host, *, scale: float) -> Any:
    return right(q, weights, keys[np.arange(len(q)) % 16], scale=scale)
