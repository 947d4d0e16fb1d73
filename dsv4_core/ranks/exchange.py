"""What ranks send each other: partial sums, vocabulary parts, and token copies on their way to
their experts and back.

A backend brings the collectives (``Backend.process_group``); this decides what goes where, and
counts it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dsv4_core.contract.dtypes import FP8_BLOCK, Host, dtype_name, numpy_dtype
from dsv4_core.graph.model import Parallel
from dsv4_core.ranks.watch import RankError, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.rank_part import Place
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.collectives import Group, ProcessGroup
    from dsv4_core.contract.dtypes import Experts
    from dsv4_core.contract.spec import Array

T = TypeVar("T")
FEW = 256  # rows of all ranks together, up to which each computes on every rank's: a decode step, not a prompt


class Traffic:
    """Bytes that this rank sent to others and seconds it spent so, by purpose; and what the MoE
    exchange carried.

    Seconds include waiting for slower ranks. On a device they are the host's: its own may still be
    running.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.tokens = 0  # of this rank's group, times MoE layers
        self.copies = 0  # of them that this rank sent to the experts of others
        self.returned = 0  # of others' that it computed and sent back


class Link:
    """A group with its traffic counted, and broken connections told from other errors. Alone, it
    sends nothing.
    """

    def __init__(self, group: Group | None, size: int, place: int, traffic: Traffic, watch: Watch) -> None:
        self.group, self.size, self.place, self.traffic, self.watch = group, size, place, traffic, watch

    def run(self, purpose: str, sent: float, collective: Callable[[Group], T]) -> T:
        """Run one collective of a group of several; ``sent`` bytes leave this rank."""
        assert self.group is not None
        began = time.perf_counter()
        try:
            result = collective(self.group)
        except ConnectionError as error:
            self.watch.broken()  # where a rank is lost, the watch finds out which, and ends this one
            raise RankError(f"{purpose}: the connection to another rank broke: {error}") from error
        self.traffic.seconds[purpose] += time.perf_counter() - began
        self.traffic.sent[purpose] += round(sent)
        return result

    def all_reduce(self, purpose: str, x: Array, *, wide: str, out_dtype: str) -> Array:
        """Sum; counted as a ring does it: each rank passes on 2 (n - 1) / n of the array, in the
        wide dtype.
        """
        sent = 2 * (self.size - 1) / self.size * int(np.prod(x.shape)) * numpy_dtype(wide).itemsize
        return self.run(purpose, sent, lambda group: group.all_reduce(x, out_dtype=out_dtype))

    def all_gather(self, purpose: str, x: Array) -> Array:
        """Stack; each rank's part reaches n - 1 others."""
        return self.run(purpose, (self.size - 1) * nbytes(x), lambda group: group.all_gather(x))

    def all_to_all(self, purpose: str, parts: Sequence[Array], send: Host, receive: Host) -> list[Array]:
        """Exchange rows; what stays on this rank is not sent."""
        row = sum(row_bytes(part) for part in parts)
        sent = row * int(send.sum() - send[self.place])
        return self.run(purpose, sent, lambda group: group.all_to_all(parts, send.tolist(), receive.tolist()))


def nbytes(x: Array) -> int:
    """Bytes of any library's array."""
    return int(np.prod(x.shape)) * itemsize(x)


def row_bytes(x: Array) -> int:
    """Bytes of one row of it."""
    return int(np.prod(x.shape[1:])) * itemsize(x)


def itemsize(x: Array) -> int:
    """Bytes of one element of it."""
    return numpy_dtype(dtype_name(x)).itemsize


class Ranks:
    """This rank among the others: its links, what it has sent, and the reduction points that the
    graph is given.
    """

    def __init__(self, backend: Backend, place: Place, world: ProcessGroup, watch: Watch) -> None:
        """Connect, and make the groups: tokens are shared along tp, experts' rows travel along
        ep.
        """
        self.backend, self.place, self.world, self.watch = backend, place, world, watch
        self.traffic = Traffic()
        self.fp8 = False
        tp, ep = place.tp, place.ep
        rows = [[e * tp + t for t in range(tp)] for e in range(ep)]
        columns = [[e * tp + t for e in range(ep)] for t in range(tp)]
        try:
            world.connect()
            by_token = world.groups(rows) if tp > 1 else None
            by_expert = world.groups(columns) if ep > 1 else None
        except ConnectionError as error:
            watch.broken()
            raise RankError(f"the ranks could not be connected: {error}") from error
        self.tp = Link(by_token, tp, place.t, self.traffic, watch)
        self.ep = Link(by_expert, ep, place.e, self.traffic, watch)

    def parallel(self, config: ModelConfig, *, quantised: bool) -> Parallel:
        """Give what the graph needs to know; ``quantised``: experts multiply FP8 activations, so
        that rows may travel as FP8.
        """
        place, act, wide = self.place, self.backend.activation_dtype, self.backend.wide_dtype

        def reduce(purpose: str) -> Callable[[Array], Array] | None:
            if place.tp == 1:
                return None
            return lambda x: self.tp.all_reduce(purpose, x, wide=wide, out_dtype=act) if x.shape[0] else x

        exchange = None
        if place.ep > 1:
            self.fp8 = quantised and act == "bfloat16"
            exchange = self.exchange
        cuts, several = place.cuts_output(config), place.tp > 1
        return Parallel(
            first_expert=lambda count: place.experts(count).start,
            holds_shared=place.holds_shared(config),
            local_ids=self.local_ids(config) if several else None,
            reduce_embedding=reduce("embedding sum"),
            gather_low_rank=self.gather_channels if several and not cuts else None,
            reduce_attention=reduce("attention sum") if several and cuts else None,
            experts=exchange,
            reduce_moe=reduce("experts sum"),
            gather_logits=self.gather_logits(config) if several else None,
            sequences=place.sequences if place.ep > 1 else None,
            gather_sequences=self.gather_rows if place.ep > 1 else None,
            padded=self.padded,
        )

    def exchange(self, count: int, padded: int) -> Callable[..., Array]:
        """Give what stands in for ``moe`` with ``count`` experts in a step of so many ``padded``
        rows.
        """
        experts = ExpertExchange(self, count)
        return partial(experts.everywhere, padded) if padded else experts

    def padded(self, sequences: Sequence[int], batch: int, tokens: int) -> int:
        """``StepShape.padded`` of a step of ``tokens`` for each of these of a batch's sequences."""
        if self.place.ep == 1 or not self.world.host_reads_stall:
            return 0
        most = tokens * self.place.most(sequences, batch)
        return most if most * self.place.ep <= FEW else 0

    def local_ids(self, config: ModelConfig) -> Callable[[Array], Array]:
        """Count token ids from the first row of the vocabulary that is held here; the others fall
        outside.
        """
        first = self.place.vocabulary(config.vocab_size).start
        return lambda ids: self.world.local_ids(ids, first)

    def gather_channels(self, x: Array) -> Array:
        """Join the tp ranks' channels [T, n] to [T, tp * n]."""
        if not x.shape[0]:
            return self.backend.zeros((0, x.shape[1] * self.place.tp), dtype_name(x))
        every = self.tp.all_gather("attention gather", x)
        return self.backend.concat([every[t] for t in range(self.place.tp)], axis=1)

    def gather_logits(self, config: ModelConfig) -> Callable[[Array], Array]:
        """Join the tp ranks' parts of the vocabulary, which may differ by one in size: the shorter
        are padded.
        """
        be = self.backend
        parts = [replace(self.place, rank=t).vocabulary(config.vocab_size) for t in range(self.place.tp)]
        sizes = [part.stop - part.start for part in parts]

        def gather(logits: Array) -> Array:
            tokens, mine = logits.shape
            if not tokens:
                return be.zeros((0, config.vocab_size), be.wide_dtype)
            if mine < max(sizes):
                logits = be.concat((logits, be.zeros((tokens, max(sizes) - mine), be.wide_dtype)), axis=1)
            every = self.tp.all_gather("logits gather", logits)
            return be.concat([every[t][:, :size] for t, size in enumerate(sizes)], axis=1)

        return gather

    def gather_rows(self, rows: Host) -> Host:
        """Join the groups' rows [n, ...] of a host array in the order of the groups; n may differ,
        and be 0.
        """
        be = self.backend
        counts = be.to_numpy(self.ep.all_gather("ids gather", be.from_numpy(np.array([len(rows)], np.int32))))[:, 0]
        padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        every = be.to_numpy(self.ep.all_gather("ids gather", be.from_numpy(padded)))
        return np.concatenate([part[:count] for part, count in zip(every, counts, strict=True)])

    def hear(self, said: bytes) -> bytes:
        """Give every rank what rank 0 says; what the others say is not looked at."""
        be = self.backend
        for link in (self.ep, self.tp):  # along rank 0's column, then along each row: the first of each group knows
            if link.size == 1:
                continue
            length = int(be.to_numpy(link.all_gather("orders", be.from_numpy(np.array([len(said)], np.int32))))[0, 0])
            words = np.zeros(-(-length // 4), "<i4")
            if link.place == 0:
                words.view(np.uint8)[:length] = np.frombuffer(said, np.uint8)
            if length:
                words = be.to_numpy(link.all_gather("orders", be.from_numpy(words)))[0]
            said = words.tobytes()[:length]
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Part when all are done; after an error the library's own parting could wait for ranks
        that are gone.
        """
        if error is None:
            self.watch.done()
            self.world.close()


class ExpertExchange:
    """``moe`` over the ranks of an ep group: each token's copies travel to the ranks that hold
    their experts, and back.

    Counts go first, an integer for each expert of the receiver, so that splits may be uneven and
    empty; they are read on the host. Then one row for each copy: its channels (where weights are
    FP8 or FP4, quantised as the experts' first product would, which loses nothing: quantising them
    again gives the same codes) and its routing weight. The receiver runs ``moe`` on what came as
    tokens of one expert each, and returns rows in the activation dtype, which the sender combines,
    wide, in its own order.
    """

    def __init__(self, ranks: Ranks, n_experts: int) -> None:
        self.ranks = ranks
        self.bounds = ranks.place.expert_bounds(n_experts, ranks.place.t)

    def __call__(
        self,
        x: Array,
        weights: Array,
        indices: Array,
        shared: Array | None,
        w1: Experts,
        w3: Experts,
        w2: Experts,
        *,
        first_expert: int,
        limit: float,
        out_dtype: str,
    ) -> Array:
        """As the contract ``moe``, for the experts of all ranks of the group."""
        be, link, traffic = self.ranks.backend, self.ranks.ep, self.ranks.traffic
        (tokens, dim), topk = x.shape, indices.shape[1]
        first, end = self.bounds[0], self.bounds[-1]
        rows, row_weights, order, offsets = be.dispatch(x, weights, indices, first_expert=first, n_experts=end - first)
        host_offsets = be.to_numpy(offsets).astype(np.int64)
        here, held = int(host_offsets[-1]), np.diff(self.bounds)
        counts = be.from_numpy(np.diff(host_offsets).astype(np.int32)[:, None])
        mine = np.full(link.size, held[link.place])
        arriving = be.to_numpy(link.all_to_all("expert counts", [counts], held, mine)[0]).reshape(link.size, -1)
        send = np.diff(host_offsets[np.array(self.bounds) - first])
        receive = arriving.sum(1, dtype=np.int64)

        parts = [rows[:here], row_weights[:here].reshape((here, 1))]
        if self.ranks.fp8:
            parts[:1] = be.act_quant(rows[:here], block=FP8_BLOCK)
        *channels, copy_weights = link.all_to_all("expert dispatch", parts, send, receive)
        copies = self.ranks.world.dequantise(*channels, block=FP8_BLOCK) if self.ranks.fp8 else channels[0]
        experts = np.repeat(np.tile(first_expert + np.arange(mine[0]), link.size), arriving.reshape(-1))
        y = be.moe(
            copies,
            copy_weights,
            be.from_numpy(experts.astype(np.int32)[:, None]),
            None,
            w1,
            w3,
            w2,
            first_expert=first_expert,
            limit=limit,
            out_dtype=be.activation_dtype,
        )
        (back,) = link.all_to_all("expert combine", [y], receive, send)
        traffic.tokens += tokens
        traffic.copies += int(send.sum() - send[link.place])
        traffic.returned += int(receive.sum() - receive[link.place])
        elsewhere = be.zeros((tokens * topk - here, dim), be.activation_dtype)
        return be.combine(be.concat((back, elsewhere), axis=0), order, offsets, shared, topk=topk, out_dtype=out_dtype)

    def everywhere(
        self,
        padded: int,
        x: Array,
        weights: Array,
        indices: Array,
        shared: Array | None,
        w1: Experts,
        w3: Experts,
        w2: Experts,
        *,
        first_expert: int,
        limit: float,
        out_dtype: str,
    ) -> Array:
        """As ``moe`` too, reading nothing on the host, in a step of ``padded`` rows a rank: every
        rank gets every token, multiplies by its own experts, and adds its own tokens' shared
        expert; what the ranks have is summed, wide.
        """
        be, link, tokens = self.ranks.backend, self.ranks.ep, x.shape[0]
        begin, rows = link.place * padded, link.size * padded

        def among_zeros(mine: Array, before: int, after: int) -> Array:
            zeros = [be.zeros((count, *mine.shape[1:]), dtype_name(mine)) for count in (before, after)]
            return be.concat([part for part in (zeros[0], mine, zeros[1]) if part.shape[0]], axis=0)

        def everyones(mine: Array) -> Array:
            every = link.all_gather("expert gather", among_zeros(mine, 0, padded - tokens))
            return every.reshape((rows, *mine.shape[1:]))

        y = be.moe(
            everyones(x),
            everyones(weights),
            everyones(indices),
            None if shared is None else among_zeros(shared, begin, rows - begin - tokens),
            w1,
            w3,
            w2,
            first_expert=first_expert,
            limit=limit,
            out_dtype=be.wide_dtype,
        )
        return link.all_reduce("expert sum", y, wide=be.wide_dtype, out_dtype=out_dtype)[begin : begin + tokens]


def copy_bytes(config: ModelConfig, *, act: str, wide: str, fp8: bool) -> tuple[int, int]:
    """Formula: bytes of a token copy on its way to its expert (FP8 codes and a scale per 128
    channels, or the activation itself; and its routing weight), and of its result on the way back.
    """
    dim, item = config.hidden_size, numpy_dtype(act).itemsize
    return (dim + dim // FP8_BLOCK if fp8 else dim * item) + numpy_dtype(wide).itemsize, dim * item


def report(ranks: Ranks, config: ModelConfig, *, seconds: float) -> list[str]:
    """Lines for people: what this rank sent, by purpose, and the time so; the expert step's bytes
    against the formula.
    """
    traffic, place, be = ranks.traffic, ranks.place, ranks.backend
    spent, total = sum(traffic.seconds.values()), sum(traffic.sent.values())
    lines = [f"communication: {total} bytes sent, {spent:.2f} s of {seconds:.2f} s"]
    lines += [f"  {name}: {sent} bytes in {traffic.seconds[name]:.2f} s" for name, sent in sorted(traffic.sent.items())]
    if traffic.tokens:
        out, back = copy_bytes(config, act=be.activation_dtype, wide=be.wide_dtype, fp8=ranks.fp8)
        for name, copies, row in (("dispatch", traffic.copies, out), ("combine", traffic.returned, back)):
            sent, each = traffic.sent[f"expert {name}"], copies * row
            lines.append(f"expert {name}: {sent} bytes sent; formula {each}: {copies} copies of {row}")
        away = config.num_experts_per_tok / place.tp * (place.ep - 1) / place.ep
        measured = traffic.copies * (out + back) / traffic.tokens
        lines.append(
            f"expert step: {measured:.0f} bytes a token and layer of this rank's group, there and back; "
            f"{away * (out + back):.0f} were routing uniform"
        )
    return lines
