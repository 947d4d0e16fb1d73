"""Poison around every buffer: a read outside it shows in the result, a write outside it in the
poison.

Operands are slices of a larger array on the backend, so guards exist on a device as well: the whole
buffer is handed over, sliced by the Array protocol's ``[...]``, and fetched back after the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.contract.dtypes import Host

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Array

ROWS = 2  # guard rows before and after: an off-by-one in either direction, twice
COLUMNS = 16  # poisoned columns on either side of a non-contiguous view; keeps rows aligned to 32 bytes
HUGE = 1 << 30  # guards larger than this are not made: the buffer is as it is


def poison(dtype: np.dtype[np.generic]) -> int | float:
    """NaN for floats; 255 for bytes (NaN in E4M3 and E8M0); for indices a number that lies outside
    any array.
    """
    if dtype.kind == "u":
        return 255
    return min(0x5F5F5F5F, np.iinfo(dtype.str).max) if dtype.kind == "i" else float("nan")


class Guarded:
    """An operand inside a poisoned buffer. ``array`` is what the op is given."""

    def __init__(self, backend: Backend, name: str, host: Host, *, view: bool) -> None:
        self.backend, self.name = backend, name
        if host.ndim == 0 or host.nbytes > HUGE:
            self.inside: tuple[slice, ...] = (Ellipsis,)  # type: ignore[assignment]
            buffer = np.ascontiguousarray(host)
        else:
            columns = COLUMNS if view and host.ndim > 1 else 0
            between = 1 if view else 0
            shape = (
                (host.shape[0] + 2 * ROWS, *(n + between for n in host.shape[1:-1]), host.shape[-1] + 2 * columns)
                if host.ndim > 1
                else (len(host) + 2 * ROWS,)
            )
            buffer = np.full(shape, poison(host.dtype), host.dtype)
            rows = slice(ROWS, ROWS + host.shape[0])
            middle = tuple(slice(0, n) for n in host.shape[1:-1])  # a row of a view is not the last one's neighbour
            self.inside = (rows, *middle, slice(columns, columns + host.shape[-1])) if host.ndim > 1 else (rows,)
            buffer[self.inside] = host
        self.before = buffer.copy() if host.nbytes <= HUGE else buffer[:0]
        self.buffer = backend.from_numpy(buffer)
        self.array: Array = self.buffer[self.inside]

    def problems(self, *, mutable: bool) -> list[str]:
        """Name what was written that must not be: the guard, or an operand that the contract does
        not mutate.
        """
        if not self.before.size:
            return []
        after, before = np.ascontiguousarray(self.backend.to_numpy(self.buffer)), self.before
        changed = (_bits(after) != _bits(before)).reshape(*before.shape, -1).any(-1)
        inside = np.zeros(before.shape, bool)
        inside[self.inside] = True
        found = []
        if (changed & ~inside).any():
            where = [int(i) for i in np.argwhere(changed & ~inside)[0]]
            offset = [w - (s.start or 0) for w, s in zip(where, self.inside, strict=False)]
            found.append(f"wrote outside operand {self.name!r}, at {offset} of shape {list(before[self.inside].shape)}")
        if not mutable and (changed & inside).any():
            where = [int(i) for i in np.argwhere((changed & inside)[self.inside])[0]]
            found.append(f"modified operand {self.name!r} at {where}; the contract does not say that it may (mutates)")
        return found

    def aliased_by(self, result: Host) -> bool:
        """Say whether a result shares memory with the operand, as far as the host can see."""
        return bool(np.may_share_memory(np.asarray(self.backend.to_numpy(self.buffer)), result))


class GuardedWeight:
    """A tensor of the checkpoint in a poisoned buffer on the host; ``array`` is what
    ``Backend.load`` is given. What a backend does to a copy of its own is not seen.
    """

    def __init__(self, name: str, host: Host) -> None:
        self.name = name
        if host.ndim == 0 or host.nbytes > HUGE:
            self.buffer = self.array = host
        else:
            self.buffer = np.full((len(host) + 2 * ROWS, *host.shape[1:]), poison(host.dtype), host.dtype)
            self.array = self.buffer[ROWS : ROWS + len(host)]
            self.array[...] = host
        self.before = self.buffer.copy() if host.nbytes <= HUGE else self.buffer[:0]

    def problems(self) -> list[str]:
        """Say whether the backend wrote into the checkpoint."""
        if not self.before.size or not (_bits(self.buffer) != _bits(self.before)).any():
            return []
        return [f"modified weight {self.name!r} in place; the model's weights are shared and, mapped, read-only"]

    def aliased_by(self, result: Host) -> bool:
        """Say whether a result shares memory with the weight, as far as the host can see."""
        return bool(np.may_share_memory(self.buffer, result))


def _bits(x: Host) -> Host:
    return x.reshape(*x.shape, 1).view(np.uint8) if x.size else np.zeros((*x.shape, 1), np.uint8)
