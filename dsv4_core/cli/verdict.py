"""An exit status that is out of the reach of plug-ins.

A plug-in that ends its process, from Python or from C, decides that process's status. So a command
runs in a child that says on a pipe what it came to; its parent, which imports no plug-in, believes
that alone. Forking before anything is imported takes a millisecond and a few megabytes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

UNFORESEEN = 70  # EX_SOFTWARE
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_PR_SET_PDEATHSIG = 1
_BY_KERNEL = 0x80  # si_code of what a terminal sends, to the child as well


def wanted() -> bool:
    """Whether a child is of use: not for a rank, whose launcher looks after its own process, nor
    under DSV4_ONE_PROCESS=1 (for debuggers and tests), nor for a server, which has no verdict.
    """
    alone = "RANK" not in os.environ and os.environ.get("DSV4_ONE_PROCESS") != "1"
    return alone and sys.platform == "linux" and len(sys.argv) > 1 and "serve" not in sys.argv[1:3]


def in_a_child() -> Callable[[int], None]:
    """Fork. The child returns, with a function that says its status; the parent waits and leaves as
    the child said.
    """
    read, said = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(said)
        _wait(child, read)
    os.close(read)
    ctypes.CDLL(None).prctl(
        _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0
    )  # it ends with its parent, however that does
    if os.getppid() != parent:
        os._exit(UNFORESEEN)

    def say(status: int) -> None:
        os.write(said, bytes([status & 255]))

    return say


def _wait(child: int, read: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    while True:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            break
        came = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        if came.si_signo != signal.SIGCHLD and came.si_code != _BY_KERNEL:
            os.kill(child, came.si_signo)
    status = os.waitstatus_to_exitcode(ended)
    verdict = os.read(read, 1)
    if status < 0:
        _die_of(-status)
    if not verdict and not status:
        os.write(2, b"dsv4: something ended the process with status 0 before the command was done\n")
        os._exit(UNFORESEEN)
    os._exit(verdict[0] if verdict and verdict[0] else status)


def _die_of(number: int) -> None:
    """End as the child did, so that a shell says what it would have said of it."""
    if number not in {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)
