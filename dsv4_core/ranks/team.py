"""One process as one of several ranks: meeting the others, agreeing with them, and what each
did.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsv4_core.checkpoint.layout import QUANTISED
from dsv4_core.contract.rendezvous import Rendezvous
from dsv4_core.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dsv4_core.checkpoint.rank_part import Place, ShardedSource
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.contract.backend import Backend
    from dsv4_core.graph.model import Parallel
    from dsv4_core.ranks.exchange import Ranks


class Team:
    """This process and the other ranks, if there are any; ``ranks`` None: it is alone."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.source: ShardedSource | None = None
        self.stored = self.part = 0
        self.is_cut = False
        self.began = time.perf_counter()

    @property
    def speaks(self) -> bool:
        """Whether this rank prints what the program is asked for."""
        return self.ranks is None or self.ranks.place.rank == 0

    @property
    def place(self) -> Place:
        """This rank's."""
        from dsv4_core.checkpoint.rank_part import Place

        return self.ranks.place if self.ranks else Place()

    def open(self, directory: Path, drafter: Path | None = None) -> Checkpoint:
        """Open a checkpoint, or this rank's copy of its parts, which has its own drafter:
        ``ValueError`` for another.
        """
        from dsv4_core.checkpoint.rank_copy import cut_for, open_copy
        from dsv4_core.checkpoint.weights import Checkpoint

        self.is_cut = cut_for(directory) is not None
        if self.is_cut and drafter:
            raise ValueError(f"{directory} was cut for ranks, with its drafter; --drafter is for a whole checkpoint")
        return open_copy(directory, self.place) if self.is_cut else Checkpoint(directory, drafter=drafter)

    def agree(self, what: dict[str, Any]) -> None:
        """Hold what this rank was given against the others'; raise ``RankError`` where they differ.
        Alone: nothing to do.
        """
        if self.ranks:
            self.ranks.watch.agree(what)

    def share(self, checkpoint: Checkpoint) -> tuple[ShardedSource, Parallel]:
        """Give the source and the reduction points of this rank, once all ranks are known to run
        the same.
        """
        from dsv4_core.checkpoint.rank_copy import origin
        from dsv4_core.checkpoint.rank_part import ShardedSource, share
        from dsv4_core.graph.model import ALONE

        place = self.place
        if self.ranks:
            backend = self.ranks.backend
            self.agree(
                {
                    "dsv4 version": __version__,
                    "backend": f"{backend.name}, {backend.numerics}",
                    "split": f"--tp {place.tp} --ep {place.ep}",
                    "configuration": asdict(checkpoint.config),
                    "checkpoint": origin(checkpoint.path) if self.is_cut else checkpoint.identity(),
                }
            )
        self.source = ShardedSource(checkpoint, place, is_cut=self.is_cut)
        self.stored = self.part = checkpoint.nbytes
        if not self.is_cut:
            self.part = share(checkpoint.config, place, [checkpoint.spec(name) for name in checkpoint.names])
        quantised = checkpoint.expert_dtype in QUANTISED and not checkpoint.is_int8
        parallel = self.ranks.parallel(checkpoint.config, quantised=quantised) if self.ranks else ALONE
        return self.source, parallel

    def report(self) -> str:
        """Give every rank's lines: bytes of weights read, bytes sent and the time for it. All ranks
        have to ask.
        """
        if self.source is None:
            return ""
        from dsv4_core.ranks.exchange import report

        read, place = sum(self.source.read.values()), self.source.place
        lines = [f"weights: {read} bytes read; its part of the checkpoint's {self.stored} has {self.part}"]
        if self.ranks:
            seconds = time.perf_counter() - self.began
            lines += report(self.ranks, self.source.config, seconds=seconds)
        text = "".join(f"rank {place.rank}: {line}\n" for line in lines)
        return "".join(self.ranks.watch.collect("stats", text) if self.ranks else [text])


def own_directory(directory: Path) -> Path:
    """Give the directory that this process reads: its rank's, where the model was cut for ranks."""
    from dsv4_core.checkpoint import rank_copy

    where = Rendezvous.from_environment()
    return rank_copy.own_directory(directory, where.rank if where else 0, where.ranks if where else 1)


@contextmanager
def team(create: Callable[[int], Backend], tp: int, ep: int) -> Iterator[Team]:
    """Meet the other ranks (for none: nothing is done), and part from them, whatever happens in
    between.

    ``create``: makes the backend for the n-th rank of this machine. Raises ``ValueError`` where the
    ranks that were started are not those asked for, ``RankError`` where some cannot be met.
    """
    where = Rendezvous.from_environment()
    started, wanted = where.ranks if where else 1, tp * ep
    if started != wanted:
        command = f"torchrun --nproc-per-node {wanted} -m dsv4_core ..."
        raise ValueError(f"--tp {tp} --ep {ep} needs {wanted} ranks and {started} was started; {command}")
    if where is None:
        yield Team()
        return
    from dsv4_core.checkpoint.rank_part import Place
    from dsv4_core.ranks.exchange import Ranks
    from dsv4_core.ranks.signed import SignedStore, secret
    from dsv4_core.ranks.watch import Watch

    key = secret()
    if not key and not where.on_one_host:
        raise ValueError(
            f"MASTER_ADDR = {where.host}: ranks of several hosts need a secret that they share; set DSV4_STORE_KEY to the same on all, "
            "or give --store-key-file (SECURITY.md says what it is for)"
        )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is said once, by the watch, without C++ stacks
    backend = create(where.local_rank)
    world = backend.process_group(where)
    store = SignedStore(world.store, key) if key else world.store
    watch = Watch(store, rank=where.rank, ranks=where.ranks, holder=where.holder, place=where.place)
    with watch, Ranks(backend, Place(tp, ep, where.rank), world, watch) as ranks:
        yield Team(ranks)
