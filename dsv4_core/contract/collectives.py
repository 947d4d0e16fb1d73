"""What a backend brings so that several processes can run one model: a store that they share, and
collectives on its arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.spec import Array


class Store(Protocol):
    """A map from strings to bytes that all ranks share; torch's TCPStore is one."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def check(self, keys: list[str], /) -> bool:
        """Say whether all keys have been written."""

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        """Read keys that have been written."""


class Group(Protocol):
    """Some of the ranks, and collectives on one backend's arrays among them; every member calls
    each, in one order.

    All raise ``ConnectionError`` where a member cannot be reached.
    """

    def all_reduce(self, x: Array, *, out_dtype: str) -> Array:
        """Sum over the members, wide, rounded once to ``out_dtype``; the same bits on each."""

    def all_gather(self, x: Array) -> Array:
        """Stack the members' arrays, of one shape and dtype: [size, ...]."""

    def all_to_all(self, parts: Sequence[Array], send: Sequence[int], receive: Sequence[int]) -> list[Array]:
        """Give the next ``send[m]`` rows of every array to member m, and get ``receive[m]`` from
        it; 0 is possible.
        """


class ProcessGroup(Protocol):
    """All ranks, as a backend's library connects them. ``holder``: the rank in whose process
    ``store`` lives, if any. ``host_reads_stall``: the host waits for a device where it reads an
    array.
    """

    rank: int
    ranks: int
    store: Store
    holder: int | None
    host_reads_stall: bool

    def connect(self) -> None:
        """Connect with all other ranks, which do the same."""

    def groups(self, members: Sequence[Sequence[int]]) -> Group:
        """Make groups that together hold every rank once, which every rank does in one order; give
        this rank's.
        """

    def dequantise(self, codes: Array, scale: Array, *, block: int) -> Array:
        """Undo ``act_quant``, exactly, in the activation dtype."""

    def local_ids(self, ids: Array, first: int) -> Array:
        """Ids [n] counted from ``first``, int32; read where they lie."""

    def close(self) -> None:
        """Leave."""
