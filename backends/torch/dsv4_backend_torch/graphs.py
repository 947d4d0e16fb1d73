"""A function of host arrays as a graph of a device's: captured once, replayed on buffers of its
own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dsv4_core.contract.dtypes import BFLOAT16, Host

WARM_UPS = 2  # runs before the capture: kernels are compiled and loaded, and torch's pools filled, none of which a capture may do


class Recorded:
    """``Backend.record`` on a device with graphs (CUDA, NPU). Not for several threads at once.

    The first call runs the function, captures it and replays; later ones copy the host arrays into
    pinned memory, from there into the graph's inputs, and replay: no kernel is launched by Python,
    nothing is allocated, and no copy waits. Each graph has a memory pool of its own, so that one's
    replay never overwrites another's result. A function that cannot be captured (it reads a value
    on the host) is run each time, and a warning says why.

    ``cuda``: torch's module of the device, or what stands in for it in a test; ``graph_class``: its
    graph.
    """

    def __init__(
        self, function: Callable[..., Any], device: torch.device, cuda: Any = torch.cuda, graph_class: str = "CUDAGraph"
    ) -> None:
        self.function, self.device, self.cuda, self.graph_class = function, device, cuda, graph_class
        self.graph: Any = None
        self.refused = ""
        self.pinned: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self.forms: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
        self.result: Any = None
        self.copied: Any = None

    def __call__(self, *hosts: Host) -> Any:
        """Run on host arrays; raise ``ValueError`` where their shapes or dtypes are others than at
        the first call.
        """
        if not self.forms:
            self._allocate(hosts)
        if (forms := [(h.shape, h.dtype) for h in hosts]) != self.forms:
            raise ValueError(
                f"recorded for arrays {self.forms}, called with {forms}; record another function for those"
            )
        if self.copied is not None:
            self.copied.synchronize()  # the last call's copy may still be reading the pinned memory
        for pinned, given, host in zip(self.pinned, self.inputs, hosts, strict=True):
            pinned.copy_(_tensor(host))
            given.copy_(pinned, non_blocking=True)
        self.copied = self.cuda.Event()
        self.copied.record()
        if self.refused:
            return self.function(*self.inputs)
        if self.graph is None and not self._capture():
            return self.function(*self.inputs)
        self.graph.replay()
        return self.result

    def _allocate(self, hosts: tuple[Host, ...]) -> None:
        self.forms = [(h.shape, h.dtype) for h in hosts]
        pinned = self.device.type not in {"cpu", "meta"}
        for host in hosts:
            like = _tensor(host)
            self.pinned.append(torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned))
            self.inputs.append(torch.empty(like.shape, dtype=like.dtype, device=self.device))

    def _capture(self) -> bool:
        """Warm up beside the current stream, capture; False where that cannot be had."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.function(*self.inputs)
        self.cuda.current_stream().wait_stream(stream)
        graph = getattr(self.cuda, self.graph_class)()
        try:
            with self.cuda.graph(graph, stream=stream):
                self.result = self.function(*self.inputs)
        except RuntimeError as error:
            self.refused = str(error).strip().splitlines()[0]
            warnings.warn(
                f"a step could not be captured and is launched each time: {self.refused}", RuntimeWarning, stacklevel=4
            )
            return False
        self.graph = graph
        return True


def _tensor(host: Host) -> torch.Tensor:
    """A host array's memory as a tensor on the CPU."""
    return (
        torch.from_numpy(host.view(np.int16)).view(torch.bfloat16) if host.dtype == BFLOAT16 else torch.from_numpy(host)
    )
