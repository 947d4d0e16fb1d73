"""Checks that a backend brings for its own device: a vendor's kernels against another
implementation on the same chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4_conformance.check import Check, Finding, Group, Session

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend, DeviceCheck
    from dsv4_core.contract.spec import Tier


@dataclass(frozen=True)
class OnDevice:
    """One of a backend's own checks; what it finds wrong is the message."""

    own: DeviceCheck
    group: Group = "device"
    level: int = 1

    @property
    def id(self) -> str:
        """``device/OP/CASE``."""
        return f"device/{self.own.op}/{self.own.case}"

    @property
    def op(self) -> str:
        """The op that is checked."""
        return self.own.op

    @property
    def tier(self) -> Tier:
        """As the backend says."""
        return self.own.tier

    def run(self, session: Session) -> Finding:
        """Ask the backend."""
        del session
        wrong = self.own.run()
        return Finding(
            self.id, self.op, self.group, self.level, "failed" if wrong else "passed", wrong, used=2.0 if wrong else 0.0
        )


def checks(backend: Backend) -> list[Check]:
    """The backend's own checks, as the suite runs them."""
    return [OnDevice(own) for own in backend.device_checks()]
