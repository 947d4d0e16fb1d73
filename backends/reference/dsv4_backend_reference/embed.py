"""Embedding and sampling in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_backend_reference.numeric import Numeric
from dsv4_core.contract.ops.embed import EmbedOps

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host


class ReferenceEmbed(Numeric, EmbedOps):
    """Contracts of ``ops/embed.py``."""

    def embedding(self, ids: Host, weight: Host) -> Host:
        inside = (ids >= 0) & (ids < weight.shape[0])
        rows = weight[np.where(inside, ids, 0)]
        rows[~inside] = 0
        return self.rounded(rows)

    def sample(self, logits: Host, uniform: Host, *, temperature: float, top_p: float) -> Host:
        sound = np.isfinite(logits.max(-1, keepdims=True))
        if temperature == 0:
            return np.where(sound[:, 0], logits.argmax(-1), -1).astype(np.int32)
        scaled = np.where(sound, logits, 0) / temperature
        p = np.exp(scaled - scaled.max(-1, keepdims=True))
        order = np.argsort(-p, axis=-1, kind="stable")
        running = np.cumsum(
            np.take_along_axis(p, order, -1), axis=-1, dtype=np.float64
        )  # a vocabulary of equal terms drifts
        running /= running[:, -1:]
        kept = np.minimum(
            (running < top_p).sum(-1), running.shape[1] - 1
        )  # index of the last token of the shortest prefix
        goal = uniform * np.take_along_axis(running, kept[:, None], -1)[:, 0]
        chosen = np.minimum((running <= goal[:, None]).sum(-1), kept)
        return np.where(sound[:, 0], np.take_along_axis(order, chosen[:, None], -1)[:, 0], -1).astype(np.int32)
