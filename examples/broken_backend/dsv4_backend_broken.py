"""Five faults that backends have had, in ops that are otherwise the reference's. README.md says how
the suite's words lead to each.
"""

import numpy as np
from dsv4_backend_reference.backend import ReferenceBackend

from dsv4_core.registry import hookimpl


class BrokenBackend(ReferenceBackend):
    """The reference, but for five ops."""

    name = "broken"
    numerics_modes = ("native",)

    def rms_norm(self, x, weight, *, eps):
        wide = self.widen(x)
        y = wide / np.sqrt(self.square_mean(wide) + np.float32(eps))
        y = y if weight is None else y * self.widen(weight)
        return (y.view(np.uint32) >> 16).astype(np.uint16).view(x.dtype)  # fault 1: the low bits are cut off

    def index_scores(self, q, weights, keys, *, scale):  # noqa: ARG002
        return super().index_scores(q, weights, keys, scale=1.0)  # fault 2: the scale was meant to be applied later

    def cache_read(self, cache, index, *, layout):
        return super().cache_read(cache, np.maximum(index, 0), layout=layout)  # fault 3: -1 reads row 0

    def index_select(self, scores, visible, offset, *, topk):
        everything = np.full_like(visible, scores.shape[-1])
        return super().index_select(scores, everything, offset, topk=topk)  # fault 4: rows of the future are picked

    def hadamard(self, x):
        kept = self.__dict__.setdefault("buffers", {})
        buffer = kept.setdefault(x.shape, np.empty_like(x))  # fault 5: every call of a shape returns the same array
        buffer[...] = super().hadamard(x)
        return buffer


@hookimpl
def dsv4_backend():
    return BrokenBackend
