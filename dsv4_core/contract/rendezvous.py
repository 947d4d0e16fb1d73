"""Where the ranks of a run meet: the environment variables that torchrun sets, and that anyone else
can.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


MOST_RANKS = 65536  # beyond any cut that the published models allow


@dataclass(frozen=True)
class Rendezvous:
    """This process's rank among ``ranks``, and the store at ``host:port``.

    ``hosted``: the launcher holds the store (torchrun does); else rank 0 does. ``attempt``: how
    often the launcher has restarted the ranks, whose store then still holds what the last ones
    wrote.
    """

    rank: int
    ranks: int
    local_rank: int
    host: str
    port: int
    hosted: bool
    attempt: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Rendezvous | None:
        """Read RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; None where there is no RANK or only one
        rank.

        Raises ``ValueError`` naming what is missing or no number.
        """
        if "RANK" not in environ or environ.get("WORLD_SIZE") == "1":
            return None
        names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environ]:
            raise ValueError(
                f"RANK is set and {', '.join(missing)} is not; start the ranks with torchrun, or set all of them"
            )
        texts = {
            name: environ.get(name, environ["RANK"]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")
        }
        if wrong := [
            name for name, text in texts.items() if not (text.isascii() and text.isdigit() and len(text) < 10)
        ]:
            raise ValueError(f"{wrong[0]} = {texts[wrong[0]]!r} must be a number")
        numbers = {name: int(text) for name, text in texts.items()}
        if not 1 <= numbers["MASTER_PORT"] <= 65535:
            raise ValueError(f"MASTER_PORT = {texts['MASTER_PORT']} must be from 1 to 65535")
        if numbers["WORLD_SIZE"] > MOST_RANKS:
            raise ValueError(f"WORLD_SIZE = {texts['WORLD_SIZE']} must be at most {MOST_RANKS}")
        if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise ValueError(f"RANK = {numbers['RANK']} must be in 0 .. WORLD_SIZE - 1 = {numbers['WORLD_SIZE'] - 1}")
        return cls(
            rank=numbers["RANK"],
            ranks=numbers["WORLD_SIZE"],
            local_rank=numbers["LOCAL_RANK"],
            host=environ["MASTER_ADDR"],
            port=numbers["MASTER_PORT"],
            hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @property
    def holder(self) -> int | None:
        """The rank that holds the store; None where the launcher does."""
        return None if self.hosted else 0

    @property
    def on_one_host(self) -> bool:
        """Whether the store is reached over the loopback interface, so that all ranks are on this
        host.
        """
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")

    @property
    def place(self) -> str:
        """Host and process, for messages."""
        return f"{socket.gethostname()}, process {os.getpid()}"
