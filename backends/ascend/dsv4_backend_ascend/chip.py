"""What a plan, an op of the cann tier and the self-test know of the backend: its chip, and what it
may use of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_backend_torch.backend import TorchBackend

if TYPE_CHECKING:
    import torch

    from dsv4_backend_ascend.capability import Answer, Generation
    from dsv4_backend_ascend.kept import Kept


class ChipBackend(TorchBackend):
    """PyTorch on a chip of some generation, found, simulated or only planned for.

    ``cann_version``: None is any. ``drift``: calls of the table that the installed ops cannot take,
    ``kept_composed``: contracts that no npu op may run, each with the reason. ``planning``: a dry
    run asks whether a call is allowed. ``prefer``: ``triton``, or nothing. ``vector_cores``: of the
    chip, a program of a Triton launch each.
    """

    tier: str
    activations: str
    gating: str
    expand_bytes: int
    generation: Generation
    cann_version: str | None
    drift: dict[str, str]
    kept_composed: dict[str, str]
    plans: dict[tuple[Any, ...], Answer]
    prefer: str
    vector_cores: int

    kept: Kept
    planning = False

    def gated(self, pairs: torch.Tensor, weights: torch.Tensor | None, limit: float) -> torch.Tensor:
        """``swiglu`` of gate and up side by side, [rows, 2, channels]."""
        gate, up = pairs.unbind(1)
        return self.swiglu(gate, up, weights, limit=limit)

    def departing(self, op: str) -> bool:
        """Whether an op that departs from this contract was asked for."""
        raise NotImplementedError

    def planned(self, op: str, arrays: tuple[Any, ...], scalars: dict[str, Any]) -> Answer:
        """Which tier runs a call, with which ops."""
        raise NotImplementedError
