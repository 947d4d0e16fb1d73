"""Ranks over torch.distributed, as far as they do not depend on whose arrays they send: the store,
connecting, parting.

Core imports no torch: a backend hands over the module that it imported.
"""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dsv4_core.files.words import one_line
from dsv4_core.ranks.watch import JOIN, RankError, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_core.contract.rendezvous import Rendezvous

SLOWEST = timedelta(minutes=30)  # a collective waits so long for a rank that still shows signs of life
ANSWER = timedelta(seconds=10)  # of the store


@contextmanager
def reaching() -> Iterator[None]:
    """Tell a connection that broke, or that was never made, from other errors: torch.distributed
    has no class for it.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error


def resolved(where: Rendezvous) -> None:
    """Raise ``RankError`` where MASTER_ADDR is no host that this machine knows: the library would
    try for a minute.
    """
    try:
        socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RankError(
            f"rank {where.rank}: MASTER_ADDR = {where.host!r} is no host that is known here ({error})"
        ) from error


def listen(where: Rendezvous) -> socket.socket:
    """Listen at MASTER_ADDR and MASTER_PORT, and on no other interface, for the store that this
    rank holds.
    """
    family, _, _, _, address = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise RankError(
            f"rank {where.rank} holds the ranks' store and cannot listen at {where.host}:{where.port} ({error.strerror}); "
            "MASTER_ADDR must be an address of rank 0's machine, and MASTER_PORT free there"
        ) from error


def await_store(where: Rendezvous) -> None:
    """Wait until somebody listens where the store should be; torch's own waiting takes twice its
    limit, and tells of its stack.
    """
    until = time.monotonic() + JOIN
    while True:
        try:
            socket.create_connection((where.host, where.port), timeout=JOIN).close()
        except OSError as error:  # noqa: PERF203  it waits
            if time.monotonic() > until:
                raise RankError(
                    f"rank {where.rank} found no store of {name_of(where.holder)} at {where.host}:{where.port} within {JOIN:.0f} s "
                    f"({error.strerror or error}); start every rank, with the same MASTER_ADDR and MASTER_PORT"
                ) from None
            time.sleep(0.1)
        else:
            return


class StoredRanks:
    """All ranks of a run. Constructing it reaches the store, ``connect`` the other ranks through
    ``library`` (gloo, nccl ...).

    ``device_id``: the device that this rank's collectives run on, for a library that asks for one
    (NCCL: without it, it guesses from the rank's number, and connects late).
    """

    device_id: Any = None
    host_reads_stall = False

    def __init__(self, distributed: Any, where: Rendezvous, library: str) -> None:
        """``distributed``: the module torch.distributed. Raise ``RankError`` where the store cannot
        be reached.
        """
        self.distributed, self.library, self.attempt = distributed, library, where.attempt
        self.rank, self.ranks, self.holder = where.rank, where.ranks, where.holder

        def store(*, is_master: bool, seconds: timedelta) -> Any:
            listening = {"master_listen_fd": listen(where).detach()} if is_master else {}
            return distributed.TCPStore(
                where.host, where.port, where.ranks, is_master, timeout=seconds, wait_for_workers=False, **listening
            )

        resolved(where)
        if where.rank != where.holder:
            await_store(where)
        try:
            self._own = store(is_master=where.rank == where.holder, seconds=timedelta(seconds=JOIN))
            self.store = distributed.PrefixStore(where.attempt, store(is_master=False, seconds=ANSWER))
        except RuntimeError as error:
            raise RankError(
                f"rank {where.rank} reached no store of {name_of(where.holder)} at {where.host}:{where.port}: {str(error).splitlines()[0]}"
            ) from error

        with reaching():
            first = self.store.compare_set(f"dsv4/claim/{self.rank}", "", where.place).decode(errors="replace")
        if first != where.place:
            raise RankError(
                f"rank {self.rank} of this run is {one_line(first)}, already; give every process a RANK of its own, "
                "and every run a MASTER_PORT of its own"
            )

    def connect(self) -> None:
        """Connect with all other ranks, which do the same."""
        dist = self.distributed
        store = dist.PrefixStore(f"{self.attempt}/torch", self._own)
        if not dist.is_initialized():
            with reaching():
                on = {} if self.device_id is None else {"device_id": self.device_id}
                dist.init_process_group(
                    self.library, store=store, rank=self.rank, world_size=self.ranks, timeout=SLOWEST, **on
                )

    def own_group(self, members: Sequence[Sequence[int]]) -> Any:
        """Make the library's groups that together hold every rank once; give this rank's."""
        with reaching():
            made = [self.distributed.new_group(list(ranks), timeout=SLOWEST) for ranks in members]
        return next(group for group, ranks in zip(made, members, strict=True) if self.rank in ranks)

    def close(self) -> None:
        """Leave."""
        self.distributed.destroy_process_group()
