"""What is said of a backend on this machine. Imports nothing, so that a backend can be looked at
without its libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["runs", "simulates only", "cannot run"]


@dataclass(frozen=True)
class Diagnosis:
    """One line of `dsv4 doctor`: what was looked at, what was found, and (where something is wrong)
    what to do.
    """

    what: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Look:
    """Whether a backend can run here as far as files and metadata tell, why not, and what was
    looked at.

    ``simulates only``: its device is not here, and it can stand in for it on a CPU. A backend says
    so by a function without arguments that gives a ``Look``, under its own name in the entry points
    ``dsv4.looks``; that module loads no library.
    """

    status: Status
    note: str = ""
    lines: tuple[Diagnosis, ...] = ()
