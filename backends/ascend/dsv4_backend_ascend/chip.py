"""What a plan, an op of the cann tier and the self-test know of the backend: its chip, and what it may use of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_backend_torch.backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_backend_ascend.capability import Answer, Generation


class ChipBackend(TorchBackend):
    """PyTorch on a chip of some generation, found, simulated or only planned for.

    ``cann_version``: None is any. ``drift``: calls of the table that the installed ops cannot take, ``kept_composed``: contracts
    that no npu op may run, each with the reason.
    """

    tier: str
    activations: str
    expand_bytes: int
    generation: Generation
    cann_version: str | None
    drift: dict[str, str]
    kept_composed: dict[str, str]

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` gives for these operands, made once while they are in use."""
        del key
        return make()

    def planned(self, op: str, arrays: tuple[Any, ...], scalars: dict[str, Any]) -> Answer:
        """Which tier runs a call, with which ops."""
        raise NotImplementedError
