"""The graph. Reads like the paper, calls only contracts, imports no array library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4_core.contract.dtypes import FP4_GROUP, KV_BLOCK, Experts
from dsv4_core.graph.cache import written
from dsv4_core.graph.dspark import Dspark, DsparkWeights, mean_of_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsv4_core.checkpoint.source import WeightSource
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host, RowLayout
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.step import Addresses, Compression, Fed


@dataclass(frozen=True)
class Parallel:
    """What one rank of several computes, and where partial results are put together.

    Alone: everything, and nothing to reduce. ``reduce_*`` get partial sums, wide where the contract
    gives them so, and round the whole once. ``local_ids``: token ids counted from this rank's part
    of the vocabulary. ``gather_low_rank``: joins the inputs of an output projection that is held
    whole. ``first_expert`` and ``experts`` of a block with so many experts: the first that is held
    here, and what stands in for ``moe`` where token copies travel, given ``StepShape.padded``.
    ``sequences``: which of a batch are this rank's, and ``gather_sequences`` joins host rows over
    all of the batch. ``padded``: that of a step of so many tokens for each of some sequences of a
    batch.
    """

    first_expert: Callable[[int], int] = lambda _: 0
    holds_shared: bool = True
    local_ids: Callable[[Array], Array] | None = None
    reduce_embedding: Callable[[Array], Array] | None = None
    gather_low_rank: Callable[[Array], Array] | None = None
    reduce_attention: Callable[[Array], Array] | None = None
    experts: Callable[[int, int], Callable[..., Array]] | None = None
    reduce_moe: Callable[[Array], Array] | None = None
    gather_logits: Callable[[Array], Array] | None = None
    sequences: Callable[[int], slice] | None = None
    gather_sequences: Callable[[Host], Host] | None = None
    padded: Callable[[Sequence[int], int, int], int] = lambda _sequences, _batch, _tokens: 0

    def mine(self, rows: Host) -> Host:
        """Give this rank's of the host rows of a whole batch."""
        return rows[self.sequences(len(rows))] if self.sequences else rows

    def joined(self, rows: Host) -> Host:
        """Give the whole batch's host rows, of which these are this rank's."""
        return self.gather_sequences(rows) if self.gather_sequences else rows


ALONE = Parallel()


@dataclass(frozen=True)
class Compressor:
    """Weights that turn a window of tokens into one row."""

    wkv: Any
    wgate: Any
    ape: Any
    norm: Any


@dataclass(frozen=True)
class Indexer:
    """Weights that choose compressed rows."""

    wq_b: Any
    weights_proj: Any
    compressor: Compressor


@dataclass(frozen=True)
class Attention:
    """Weights of one layer's attention."""

    wq_a: Any
    q_norm: Any
    wq_b: Any
    wkv: Any
    kv_norm: Any
    attn_sink: Any
    wo_a: Any
    wo_b: Any
    compressor: Compressor | None
    indexer: Indexer | None

    @property
    def compressors(self) -> list[Compressor]:
        """Of rows, and of the indexer's keys."""
        own = [self.compressor] if self.compressor else []
        return [*own, self.indexer.compressor] if self.indexer else own


@dataclass(frozen=True)
class Moe:
    """Weights of one layer's experts; a hash-routed gate has ``tid2eid``, a score-routed one
    ``bias``.

    ``shared`` is None on a rank that leaves the shared expert to another.
    """

    gate: Any
    bias: Any
    tid2eid: Any
    shared: tuple[Any, Any, Any] | None
    experts: tuple[Experts, Experts, Experts]


@dataclass(frozen=True)
class Mix:
    """Hyper-connection weights of one sub-layer."""

    fn: Any
    scale: Any
    base: Any


@dataclass(frozen=True)
class Block:
    """One layer."""

    index: int
    ratio: int
    freqs: Any
    hc_attn: Mix
    attn_norm: Any
    attn: Attention
    hc_ffn: Mix
    ffn_norm: Any
    ffn: Moe


@dataclass(frozen=True)
class Head:
    """From streams to the final norm's output."""

    hc: Mix
    norm: Any


@dataclass(frozen=True)
class Mtp:
    """The multi-token-prediction block and what it adds to a layer."""

    block: Block
    e_proj: Any
    h_proj: Any
    enorm: Any
    hnorm: Any
    head: Head


class Model:
    """DeepSeek-V4: ``forward`` gives streams, ``logits`` reduces them, ``mtp`` looks one token
    further.
    """

    def __init__(
        self,
        source: WeightSource,
        backend: Backend,
        *,
        parallel: Parallel = ALONE,
        draft: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load every weight through ``backend.load``; ``progress(done, of)`` is called after each
        layer.

        ``draft``: load the MTP block or DSpark, too, where the checkpoint holds one; else
        ``load_drafter`` does when asked.
        """
        self.config, self.backend, self.parallel = source.config, backend, parallel
        self._load = load = _Loader(source, backend, parallel)
        c = self.config
        self.embed, self.lm_head = load.weight("embed"), load.weight("head")
        self.head = load.head("")
        freqs = {ratio: backend.from_numpy(c.rope_frequencies(ratio)) for ratio in set(c.compress_ratios)}
        self.blocks: list[Block] = []
        for i in range(c.num_hidden_layers):
            self.blocks.append(load.block(f"layers.{i}", i, freqs))
            if progress:
                progress(i + 1, c.layers)
        self.mtp_block: Mtp | None = None
        self.dspark: Dspark | None = None
        if draft:
            self.load_drafter()
        if progress:
            progress(c.layers, c.layers)

    def load_drafter(self) -> None:
        """Load the MTP block or DSpark, where the checkpoint holds one and it is not loaded yet."""
        c, load = self.config, self._load
        freqs = {ratio: self.backend.from_numpy(c.rope_frequencies(ratio)) for ratio in set(c.compress_ratios)}
        if c.draft == "mtp" and self.mtp_block is None:
            self.mtp_block = load.mtp(freqs)
        elif c.draft == "dspark" and self.dspark is None:
            mean = Mix(*map(self.backend.load, mean_of_streams(c.hc_mult, c.hidden_size)))
            self.dspark = Dspark(self, load.dspark(freqs), mean)

    @property
    def drafts(self) -> int:
        """Tokens that what is loaded can propose at a time: 0, MTP's one, or a block of
        DSpark's.
        """
        return self.config.dspark_block_size if self.dspark else int(self.mtp_block is not None)

    def forward(self, step: Fed, taps: list[Array] | None = None) -> Array:
        """Run the main stack on a step's tokens; give the streams [T, hc, D].

        The cache's rows are written, its lengths are not. ``taps`` receives what DSpark reads, [T,
        D] a target layer.
        """
        be = self.backend
        with be.computing():
            h = be.hc_expand(self.embedding(step.ids), hc=self.config.hc_mult)
            for each in step.rectangles:
                for ratio in sorted({block.ratio for block in self.blocks} - {0}):
                    each.compression(ratio)  # its lists are joined here, and no layer has more to do than its like
            tapped = {}
            for block in self.blocks:
                h = self.block(block, h, step)
                if taps is not None and self.dspark and block.index in self.config.dspark_target_layer_ids:
                    tapped[block.index] = self.dspark.tap(h)
        if taps is not None and self.dspark:
            taps += [tapped[i] for i in self.config.dspark_target_layer_ids]
        return h

    def mtp(self, h: Array, next_ids: Array, step: Fed) -> Array:
        """Run the MTP block on the main stack's streams and the *next* tokens' ids, at the same
        positions; give its streams.
        """
        be, c, mtp = self.backend, self.config, self.mtp_block
        if mtp is None:
            raise ValueError("this checkpoint has no MTP block")
        with be.computing():
            e = be.rms_norm(self.embedding(next_ids), mtp.enorm, eps=c.rms_norm_eps)
            e = be.linear(e, mtp.e_proj, out_dtype=be.activation_dtype)
            streams = be.rms_norm(h.reshape((step.tokens * c.hc_mult, c.hidden_size)), mtp.hnorm, eps=c.rms_norm_eps)
            streams = be.linear(streams, mtp.h_proj, out_dtype=be.activation_dtype).reshape(h.shape)
            return self.block(mtp.block, be.hc_add(streams, e), step)

    def logits(self, h: Array, *, mtp: bool = False) -> Array:
        """Reduce streams [T, hc, D] to logits [T, vocab], wide."""
        be, c = self.backend, self.config
        head = self.mtp_block.head if mtp and self.mtp_block else self.head
        with be.computing():
            x = be.hc_head(h, head.hc.fn, head.hc.scale, head.hc.base, norm_eps=c.rms_norm_eps, eps=c.hc_eps)
            return self.vocabulary_logits(be.rms_norm(x, head.norm, eps=c.rms_norm_eps))

    def vocabulary_logits(self, x: Array) -> Array:
        """Logits [T, vocab], wide, of normed rows [T, D], put together from the ranks that hold
        them.
        """
        logits = self.backend.logits(x, self.lm_head)
        return self.parallel.gather_logits(logits) if self.parallel.gather_logits else logits

    def embedding(self, ids: Array) -> Array:
        """Look up rows [T, D], put together from the ranks that hold them."""
        p = self.parallel
        x = self.backend.embedding(p.local_ids(ids) if p.local_ids else ids, self.embed)
        return p.reduce_embedding(x) if p.reduce_embedding else x

    def block(self, block: Block, h: Array, step: Fed) -> Array:
        """One layer: attention, then experts, each between its hyper-connections."""
        x, post, comb = self._hc_pre(h, block.hc_attn, block.attn_norm)
        h = self.backend.hc_post(self.attention(block, x, step), h, post, comb)
        x, post, comb = self._hc_pre(h, block.hc_ffn, block.ffn_norm)
        return self.backend.hc_post(self.moe(block.ffn, x, step), h, post, comb)

    def _hc_pre(self, h: Array, mix: Mix, norm: Any) -> tuple[Array, Array, Array]:
        c = self.config
        return self.backend.hc_pre_norm(
            h, mix.fn, mix.scale, mix.base, norm, norm_eps=c.rms_norm_eps, eps=c.hc_eps, iters=c.hc_sinkhorn_iters
        )

    def attention(self, block: Block, x: Array, step: Fed) -> Array:
        """Window rows, compressed rows (all, or the indexer's picks), sink, grouped output
        projection.
        """
        be, c, w, p = self.backend, self.config, block.attn, self.parallel
        T, d, act = step.tokens, c.head_dim, be.activation_dtype
        if T == 0:  # a rank that takes part in the experts' exchange alone
            return x
        picked = w.indexer and any(each.compression(block.ratio).picks for each in step.rectangles)
        indexer = w.indexer if picked else None
        # products of one input stand together: a backend may compute them in one launch
        qr, kv = (be.linear(x, weight, out_dtype=act) for weight in (w.wq_a, w.wkv))
        scores = [be.kv_score(x, each.wkv, each.wgate) for each in w.compressors]
        weights = be.linear(x, indexer.weights_proj, out_dtype=be.wide_dtype) if indexer else None
        qr = be.rms_norm(qr, w.q_norm, eps=c.rms_norm_eps)
        q = be.linear(qr, w.wq_b, out_dtype=act)
        index_q = self._index_queries(indexer, qr, block, step) if indexer else None
        heads = q.shape[1] // d
        q = be.rms_norm_rope(q.reshape((T, heads, d)), None, step.positions, block.freqs, eps=c.rms_norm_eps)
        kv = self.turned(kv, w.kv_norm, step.positions, block.freqs)
        o = self._by_rectangle(block, step, q, kv, index_q, weights, *scores)

        o = be.apply_rope(o, step.positions, block.freqs, inverse=True)
        groups = heads * c.o_groups // c.num_attention_heads
        o = be.grouped_linear(o.reshape((T, groups, heads * d // groups)), w.wo_a)
        o = p.gather_low_rank(o) if p.gather_low_rank else o
        o = be.linear(o, w.wo_b, out_dtype=be.wide_dtype if p.reduce_attention else act)
        return p.reduce_attention(o) if p.reduce_attention else o

    def _by_rectangle(self, block: Block, step: Fed, *tokens: Any) -> Array:
        """Attend for each rectangle of a step, given its part of what every token has."""
        if len(step.rectangles) == 1:
            return self._attend(block, step.rectangles[0], *tokens)
        outputs: list[Array] = []
        begin = 0
        for rectangle in step.rectangles:
            end = begin + rectangle.tokens
            own: list[Any] = [None if array is None else array[begin:end] for array in tokens]
            outputs.append(self._attend(block, rectangle, *own))
            begin = end
        return self.backend.concat(outputs, axis=0)

    def _attend(
        self,
        block: Block,
        step: Addresses,
        q: Array,
        kv: Array,
        index_q: Array | None,
        weights: Array | None,
        *scores: Array,
    ) -> Array:
        """Close windows, pick rows, attend [T, heads, d], and write what later steps read.

        ``kv``: the tokens' own rows, normed and turned. ``index_q``, ``weights``: what the indexer
        picks by, None where nothing is picked. ``scores``: ``kv_score`` for each compressor.
        """
        be, w, d = self.backend, block.attn, self.config.head_dim
        cache, layout = step.cache.layers[block.index], step.cache.kv_layout
        idxs, rows, row_index = step.window_idxs, None, None
        if not block.ratio or not w.compressor:
            kv = self.on_grid(kv)
        else:
            where = step.compression(block.ratio)
            closed, cache.state = self._close_windows(w.compressor, scores[0], d, block.freqs, cache.state, step, where)
            kv, closed = self._rounded(kv, closed, layout)
            if closed is not None:
                cache.rows = written(be, _held(cache.rows), closed, where.row_write, layout=layout)
            picked = self._picked_rows(block, step, where, scores[-1], index_q, weights)
            if picked:
                rows, (row_index, idxs) = cache.rows, picked
        o = be.cached_sparse_attn(
            q, kv, cache.ring, step.ring_read, rows, row_index, w.attn_sink, idxs, layout=layout, softmax_scale=d**-0.5
        )
        cache.ring = written(be, cache.ring, kv, step.ring_write, layout=layout)
        return o

    def on_grid(self, rows: Array) -> Array:
        """Key/value rows [n, d] rounded to FP8, but for the channels that RoPE turns."""
        channels = rows.shape[1] - self.config.qk_rope_head_dim
        return self.backend.act_qdq(rows, format="e4m3", block=KV_BLOCK, channels=channels)

    def _index_on_grid(self, rows: Array) -> Array:
        """The indexer's queries or keys [n, di] rounded to FP4."""
        return self.backend.act_qdq(rows, format="e2m1", block=FP4_GROUP, channels=rows.shape[1])

    def turned(self, rows: Array, norm: Any, positions: Array, freqs: Array) -> Array:
        """Norm rows [n, d] and turn their last channels by RoPE."""
        n, d = rows.shape
        turned = self.backend.rms_norm_rope(
            rows.reshape((n, 1, d)), norm, positions, freqs, eps=self.config.rms_norm_eps
        )
        return turned.reshape((n, d))

    def _rounded(self, kv: Array, closed: Array | None, layout: RowLayout) -> tuple[Array, Array | None]:
        """Round this step's key/value rows, and by the same call those of windows that close where
        no packing will round them.
        """
        if closed is None or layout.kind != "plain":
            return self.on_grid(kv), closed
        both = self.on_grid(self.backend.concat((kv, closed), axis=0))
        return both[: kv.shape[0]], both[kv.shape[0] :]

    def _close_windows(
        self,
        w: Compressor,
        kv_score: Array,
        dim: int,
        freqs: Array,
        state: Array | None,
        step: Addresses,
        where: Compression,
    ) -> tuple[Array | None, Array]:
        """Rows [n * closing, dim], normed and turned, of the windows that close in this step (None
        where none does), and the state with this step's tokens in it.
        """
        be, layout = self.backend, step.cache.state_layout(where.ratio, dim)
        rows = None
        if where.closing:
            rows = be.cached_compress(kv_score, _held(state), where.state_read, w.ape, where.window_idxs, dim=dim)
            rows = self.turned(rows, w.norm, where.row_positions, freqs)
        return rows, written(be, _held(state), kv_score, where.state_write, layout=layout)

    def _index_queries(self, w: Indexer, qr: Array, block: Block, step: Fed) -> Array:
        """The indexer's queries [T, Hi, di], turned and rounded."""
        be, c = self.backend, self.config
        shape = (step.tokens, c.index_n_heads, c.index_head_dim)
        q = be.linear(qr, w.wq_b, out_dtype=be.activation_dtype).reshape(shape)
        q = be.apply_rope(q, step.positions, block.freqs, inverse=False)
        return self._index_on_grid(be.hadamard(q.reshape((shape[0] * shape[1], shape[2])))).reshape(shape)

    def _picked_rows(
        self,
        block: Block,
        step: Addresses,
        where: Compression,
        kv_score: Array,
        q: Array | None,
        weights: Array | None,
    ) -> tuple[Array, Array] | None:
        """Which compressed rows are read and which rows of all, window rows first, each token
        attends to: ``row_index``, ``idxs`` [T, ...]. ``kv_score``, ``q``, ``weights``: what the
        indexer has of the tokens, the last two None where nothing is picked.
        """
        w = block.attn.indexer
        if w is None:
            return (where.row_read, where.row_idxs) if where.bound and where.row_idxs is not None else None
        be, c, cache = self.backend, self.config, step.cache.layers[block.index]
        Hi, di, layout = c.index_n_heads, c.index_head_dim, step.cache.key_layout
        rows, cache.key_state = self._close_windows(
            w.compressor, kv_score, di, block.freqs, cache.key_state, step, where
        )
        if rows is not None:
            keys = be.hadamard(rows)
            keys = self._index_on_grid(keys) if layout.kind == "plain" else keys
            cache.keys = written(be, _held(cache.keys), keys, where.row_write, layout=layout)
        if where.picks is None or q is None or weights is None:
            return None
        picks = be.cached_index_topk(
            q.reshape((step.batch, step.seq, Hi, di)),
            weights.reshape((step.batch, step.seq, Hi)),
            _held(cache.keys),
            where.row_read,
            where.visible,
            where.picks.offset,
            layout=layout,
            scale=di**-0.5 * Hi**-0.5,
            topk=where.picks.topk,
        )
        if where.picks.idxs is not None:
            return picks.reshape((step.tokens * where.picks.topk,)), where.picks.idxs
        chosen = picks.reshape((step.tokens, where.picks.topk))
        return where.row_read, be.concat((step.window_idxs, chosen), axis=1)

    def moe(self, w: Moe, x: Array, step: Fed) -> Array:
        """Gate, routed experts, shared expert."""
        be, c, p = self.backend, self.config, self.parallel
        if w.tid2eid is not None:
            weights, indices = be.gate_hash(x, w.gate, w.tid2eid, step.ids, route_scale=c.routed_scaling_factor)
        else:
            weights, indices = be.gate(
                x, w.gate, w.bias, topk=c.num_experts_per_tok, route_scale=c.routed_scaling_factor
            )
        shared = be.ffn(x, *w.shared, limit=c.swiglu_limit) if w.shared else None
        out_dtype = be.wide_dtype if p.reduce_moe else be.activation_dtype
        count = w.gate.shape[0]
        experts = p.experts(count, step.padded) if p.experts else be.moe
        y = experts(
            x,
            weights,
            indices,
            shared,
            *w.experts,
            first_expert=p.first_expert(count),
            limit=c.swiglu_limit,
            out_dtype=out_dtype,
        )
        return p.reduce_moe(y) if p.reduce_moe else y


def _held(array: Array | None) -> Array:
    """Give a cache array that this layer's ratio is known to have."""
    assert array is not None
    return array


class _Loader:
    """Names of the published layout to weights on the backend."""

    def __init__(self, source: WeightSource, backend: Backend, parallel: Parallel) -> None:
        self.source, self.backend, self.config, self.parallel = source, backend, source.config, parallel

    def array(self, name: str) -> Any:
        return self.backend.load(self.source.array(name))

    def weight(self, name: str) -> Any:
        return self.backend.load(self.source.weight(name))

    def mix(self, prefix: str) -> Mix:
        return Mix(*(self.array(f"{prefix}_{part}") for part in ("fn", "scale", "base")))

    def head(self, prefix: str) -> Head:
        return Head(self.mix(f"{prefix}hc_head"), self.weight(f"{prefix}norm"))

    def compressor(self, prefix: str) -> Compressor:
        return Compressor(
            self.weight(f"{prefix}.wkv"),
            self.weight(f"{prefix}.wgate"),
            self.array(f"{prefix}.ape"),
            self.weight(f"{prefix}.norm"),
        )

    def attention(self, prefix: str, ratio: int) -> Attention:
        indexer = None
        if ratio == 4:
            at = f"{prefix}.indexer"
            indexer = Indexer(
                self.weight(f"{at}.wq_b"), self.weight(f"{at}.weights_proj"), self.compressor(f"{at}.compressor")
            )
        return Attention(
            **{
                name: self.weight(f"{prefix}.{name}")
                for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b")
            },
            attn_sink=self.array(f"{prefix}.attn_sink"),
            compressor=self.compressor(f"{prefix}.compressor") if ratio else None,
            indexer=indexer,
        )

    def moe(self, prefix: str, *, hashed: bool) -> Moe:
        held = ("w1", "w3", "w2") if self.parallel.holds_shared else ()
        shared = [self.weight(f"{prefix}.shared_experts.{name}") for name in held]
        experts = [self.backend.load_experts(self.source.experts(prefix, name)) for name in ("w1", "w3", "w2")]
        return Moe(
            gate=self.weight(f"{prefix}.gate"),
            bias=None if hashed else self.array(f"{prefix}.gate.bias"),
            tid2eid=self.array(f"{prefix}.gate.tid2eid") if hashed else None,
            shared=(shared[0], shared[1], shared[2]) if shared else None,
            experts=(experts[0], experts[1], experts[2]),
        )

    def block(self, prefix: str, index: int, freqs: dict[int, Array]) -> Block:
        ratio = self.config.compress_ratios[index]
        return Block(
            index=index,
            ratio=ratio,
            freqs=freqs[ratio],
            hc_attn=self.mix(f"{prefix}.hc_attn"),
            attn_norm=self.weight(f"{prefix}.attn_norm"),
            attn=self.attention(f"{prefix}.attn", ratio),
            hc_ffn=self.mix(f"{prefix}.hc_ffn"),
            ffn_norm=self.weight(f"{prefix}.ffn_norm"),
            ffn=self.moe(f"{prefix}.ffn", hashed=index < self.config.num_hash_layers),
        )

    def mtp(self, freqs: dict[int, Array]) -> Mtp:
        at = "mtp.0"
        return Mtp(
            block=self.block(at, self.config.num_hidden_layers, freqs),
            **{name: self.weight(f"{at}.{name}") for name in ("e_proj", "h_proj", "enorm", "hnorm")},
            head=self.head(f"{at}."),
        )

    def dspark(self, freqs: dict[int, Array]) -> DsparkWeights:
        c = self.config
        last = f"mtp.{c.stages - 1}"
        return DsparkWeights(
            stages=tuple(self.block(f"mtp.{s}", c.num_hidden_layers + s, freqs) for s in range(c.stages)),
            main_proj=self.weight("mtp.0.main_proj"),
            main_norm=self.weight("mtp.0.main_norm"),
            head=self.head(f"{last}."),
            markov_w1=self.weight(f"{last}.markov_head.markov_w1"),
            markov_w2=self.weight(f"{last}.markov_head.markov_w2"),
            confidence=self.weight(f"{last}.confidence_head.proj"),
        )
