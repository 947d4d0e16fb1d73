"""DSpark: the drafter of the official releases. One pass proposes a block of tokens, a bigram table
makes them depend on each other.

It reads what some layers of the main stack put out (``Model.forward`` with ``taps``), keeps a ring
of W rows for each of its stages, and shares the main model's embedding and head. Source: the
published inference code, as quoted in public.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsv4_core.graph.cache import written
from dsv4_core.graph.step import Addresses, StepShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.step import Fed


class Graph(Protocol):
    """What DSpark shares with the main model."""

    config: ModelConfig
    backend: Backend

    def embedding(self, ids: Array) -> Array:
        """Look up rows."""

    def block(self, block: Any, h: Array, step: Fed) -> Array:
        """One layer."""

    def on_grid(self, rows: Array) -> Array:
        """Round key/value rows to FP8."""

    def turned(self, rows: Array, norm: Any, positions: Array, freqs: Array) -> Array:
        """Norm rows and turn them by RoPE."""

    def vocabulary_logits(self, x: Array) -> Array:
        """Logits of normed rows."""


@dataclass(frozen=True)
class DsparkWeights:
    """Its stages (blocks of the graph), what the first reads the taps with, and the last one's
    heads.
    """

    stages: tuple[Any, ...]
    main_proj: Any
    main_norm: Any
    head: Any
    markov_w1: Any
    markov_w2: Any
    confidence: Any


def mean_of_streams(hc: int, dim: int) -> tuple[Host, Host, Host]:
    """Give the ``hc_head`` weights (fn, scale, base) that reduce streams to their plain mean.

    With ``fn`` zero and ``eps`` 0 every stream has the weight ``sigmoid(base)``: 1 / hc to a
    float32 unit.
    """
    base = math.log(1 / (hc - 1)) if hc > 1 else 40.0
    return np.zeros((hc, hc * dim), np.float32), np.zeros(1, np.float32), np.full(hc, base, np.float32)


class Dspark:
    """The drafter of one model."""

    def __init__(self, model: Graph, weights: DsparkWeights, mean: Any) -> None:
        """Raise ``ValueError`` where a stage has a compress ratio, which DSpark has not; ``mean``:
        ``mean_of_streams``, loaded.
        """
        c = model.config
        if any(ratios := c.compress_ratios[c.num_hidden_layers :]):
            raise ValueError(
                f"config.json: compress_ratios end with {list(ratios)}; the stages of DSpark have ratio 0: run without --speculative"
            )
        self.model, self.weights, self.mean = model, weights, mean

    def tap(self, h: Array) -> Array:
        """Give the plain mean [T, D] of a layer's streams [T, hc, D]."""
        mean = self.mean
        return self.model.backend.hc_head(h, mean.fn, mean.scale, mean.base, norm_eps=1.0, eps=0.0)

    def remember(self, taps: Sequence[Array], step: Fed) -> None:
        """Write a context row a token into every stage's ring; ``taps``: of the target layers, in
        the configuration's order.
        """
        be, c, w = self.model.backend, self.model.config, self.weights
        with be.computing():
            x = be.linear(be.concat(list(taps), axis=1), w.main_proj, out_dtype=be.activation_dtype)
            x = be.rms_norm(x, w.main_norm, eps=c.rms_norm_eps)
            for stage in w.stages:
                row = be.linear(x, stage.attn.wkv, out_dtype=be.activation_dtype)
                row = self.model.turned(row, stage.attn.kv_norm, step.positions, stage.freqs)
                cache = step.cache.layers[stage.index]
                row = self.model.on_grid(row)
                cache.ring = written(be, cache.ring, row, step.ring_write, layout=step.cache.kv_layout)

    def block(self, step: Addresses) -> tuple[Array, Array]:
        """Run a block's rows through all stages; give what its heads read [T, D] and the logits
        before the table [T, vocab].
        """
        be, c, head = self.model.backend, self.model.config, self.weights.head
        with be.computing():
            h = be.hc_expand(self.model.embedding(step.ids), hc=c.hc_mult)
            for stage in self.weights.stages:
                h = self.model.block(stage, h, step)
            g = be.hc_head(h, head.hc.fn, head.hc.scale, head.hc.base, norm_eps=c.rms_norm_eps, eps=c.hc_eps)
            return g, self.model.vocabulary_logits(be.rms_norm(g, head.norm, eps=c.rms_norm_eps))

    def after(self, ids: Array, g: Array) -> tuple[Array, Array]:
        """What the table adds to the logits [n, vocab] after tokens ``ids`` [n], and the confidence
        before its sigmoid [n, 1].
        """
        be, w = self.model.backend, self.weights
        with be.computing():
            e = be.embedding(ids, w.markov_w1)
            sure = be.linear(be.concat([g, e], axis=1), w.confidence, out_dtype=be.wide_dtype)
            return be.logits(e, w.markov_w2), sure


def block_step(cache: Cache, ids: Host, sequences: Host, start: Host) -> Addresses:
    """Give the addresses of draft blocks ``ids`` [n, B] of ``sequences`` [n] that hold ``start``
    [n] tokens.

    Every row of a block sees the last W rows of its sequence's rings and all of the block's; none
    is stored.
    """
    n, seq = ids.shape
    c, be = cache.config, cache.backend
    before = min(c.sliding_window, be.round_up(int(start.max(initial=0))))
    shape = StepShape(n, seq, before, before + seq, ())
    host = np.zeros(shape.size, np.int32)

    def put(name: str, values: Any) -> None:
        begin, size = shape.parts[name]
        host[begin : begin + math.prod(size)].reshape(size)[...] = values

    position = start[:, None] + np.arange(-before, 0)  # [n, before]
    sequence = np.arange(n)[:, None]
    slots = np.where(position < 0, -1, sequences[:, None] * cache.ring_rows + position % cache.ring_rows)
    past = np.where(position < 0, -1, sequence * before + np.arange(before))
    own = n * before + sequence * seq + np.arange(seq)
    put("ids", ids.reshape(-1))
    put("positions", (start[:, None] + np.arange(seq)).reshape(-1))
    put("ring_read", slots.reshape(-1))
    put("ring_write", -1)
    put("window_idxs", np.repeat(np.concatenate([past, own], axis=1), seq, axis=0))
    return Addresses(cache, shape, be.from_numpy(host))
