"""Where weights come from: a checkpoint, one rank's part of it, or shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.dtypes import Experts, Host, ScaledArray


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or shapes alone."""

    config: ModelConfig

    def array(self, name: str) -> Host:
        """Give a tensor by its full name."""

    def weight(self, name: str) -> Host | ScaledArray:
        """Give ``name.weight``, joined with its scale if it has one."""

    def experts(self, prefix: str, projection: str) -> Experts:
        """Give one projection (w1, w2, w3) of every routed expert under ``prefix``."""
