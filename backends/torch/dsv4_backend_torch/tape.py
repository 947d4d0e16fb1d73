"""A decode step as a tape: the calls of C kernels that it made, repeated by one call.

A step is run once and every kernel that it calls is written down with its addresses; what it
computed by PyTorch instead cannot be written down, so such a step is run each time.
"""

from __future__ import annotations

import ctypes
import math
import time
from array import array
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.dtypes import Host

SEEN_ONLY = {  # calls that compute nothing: they name memory, or take some
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip

PERHAPS = {"contiguous", "flatten", "reshape", "to"}  # these too, where they give their argument's own memory


class Recording(Protocol):
    """What a tape needs of the backend whose step it is."""

    compiled: Any

    def from_numpy(self, array: Host) -> torch.Tensor:
        """Take over a host array."""


class Tape:
    """Calls in order, and all that they have addresses of."""

    def __init__(self) -> None:
        self._entries: list[int] = []
        self._packed: list[bytes] = []
        self._kept: list[object] = []

    def __len__(self) -> int:
        return len(self._entries)

    def calls(self) -> list[tuple[int, bytes]]:
        """Each kernel's entry and its packed arguments."""
        return list(zip(self._entries, self._packed, strict=True))

    def add(self, entry: int, packed: bytes, keep: object) -> None:
        """Write down a call."""
        self._entries.append(entry)
        self._packed.append(packed)
        self._kept.append(keep)

    def keep(self, thing: object) -> None:
        """Let something live as long as the tape: memory that calls have addresses of."""
        self._kept.append(thing)

    def runner(self, library: ctypes.CDLL) -> Callable[[], int]:
        """What runs the tape; it gives 0 where every call did its work."""
        arguments = np.frombuffer(b"".join(self._packed), np.uint8).copy()
        ends = np.cumsum([len(each) for each in self._packed])
        lines = array("q")
        for entry, end, packed in zip(self._entries, ends.tolist(), self._packed, strict=True):
            lines.extend((entry, arguments.ctypes.data + end - len(packed)))
        self._kept += [arguments, lines]
        run, address, count = library.run_tape, lines.buffer_info()[0], len(self._entries)
        run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        return lambda: int(run(address, count, torch.get_num_threads()))


class Watch(TorchDispatchMode):
    """Notes what PyTorch computes while a tape is written, and keeps what it makes alive."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape, self.foreign = tape, ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch not to wrap ``__torch_dispatch__`` for its compiler, which nobody asked for
        here: the wrapper's first call imports that compiler, two seconds of processor time.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        made = func(*args, **(kwargs or {}))
        same = name in PERHAPS and made.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        if not (same or name in SEEN_ONLY):
            self.foreign = self.foreign or name
        self.tape.keep(made)
        return made


class Recorded:
    """A function of a step's buffers as a tape. ``why``: what kept it from being one, once it has
    been called.
    """

    def __init__(self, backend: Recording, function: Callable[..., Any]) -> None:
        self.backend, self.function = backend, function
        self.why = ""
        self._buffers: list[tuple[Host, torch.Tensor]] = []
        self._replay: Callable[[], int] | None = None
        self._result: Any = None

    def __call__(self, *hosts: Host) -> Any:
        """The function's result on these host arrays, which holds until the next call."""
        if self.why:
            return self.function(*map(self.backend.from_numpy, hosts))
        if self._replay is None:
            return self._record(hosts)
        for (buffer, _), host in zip(self._buffers, hosts, strict=True):
            if buffer.shape != host.shape or buffer.dtype != host.dtype:
                have, given = (f"{a.dtype}{list(a.shape)}" for a in (buffer, host))
                raise ValueError(f"a step that was recorded with {have}, not {given}; record a step for each shape")
            buffer[...] = host
        if (
            self._replay()
        ):  # a value that kernels leave to PyTorch; what was written is written again, with the same values
            return self.function(*(tensor.clone() for _, tensor in self._buffers))
        return self._result

    def timed(self, runs: int = 20) -> list[tuple[str, float]]:
        """Each kernel's name and seconds, in the tape's order: called alone, the fastest of
        ``runs``; empty before a step was recorded.
        """
        compiled, calls = self.backend.compiled, self._tape.calls() if self._replay else ()
        found = [(compiled.name_of(entry), math.inf) for entry, _ in calls]
        for _ in range(runs):
            for i, (entry, packed) in enumerate(calls):
                begin = time.perf_counter()
                compiled.call(entry, packed)
                found[i] = found[i][0], min(found[i][1], time.perf_counter() - begin)
        return found

    def _record(self, hosts: tuple[Host, ...]) -> Any:
        compiled = self.backend.compiled
        assert compiled
        own = [np.array(host) for host in hosts]
        self._buffers = [(buffer, self.backend.from_numpy(buffer)) for buffer in own]
        tape = Tape()
        compiled.tape = tape
        try:
            with torch.inference_mode(), Watch(tape) as watch:
                result = self.function(*(tensor for _, tensor in self._buffers))
        finally:
            compiled.tape = None
        self.why = watch.foreign
        if not self.why:
            self._tape, self._result = tape, result
            self._replay = tape.runner(compiled.library)
        return result
