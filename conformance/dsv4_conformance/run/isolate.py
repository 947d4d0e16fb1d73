"""Checks in processes of their own: one that crashes the interpreter, hangs or eats memory is
reported, and the rest still runs; several run at a time.

A process is told one id after another, answers each with a line of JSON on a pipe of its own (so
that what a backend prints does no harm), and is replaced when it dies.
"""

from __future__ import annotations

import json
import math
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_conformance.check import Check, Finding, Session, Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_core.contract.spec import Numerics, Tier

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What libraries read; what the user has set stands."""
START_UP = 120.0  # seconds for a process to import its backend before the first check's own limit counts
ORDER = (
    "model",
    "law",
    "trace",
    "device",
    "invariance",
    "op",
)  # the longest first, so that no process is left with one at the end


@dataclass(frozen=True)
class Workers:
    """How checks are run: a backend by name and options, limits of a check (infinite: none), and
    how many processes.
    """

    backend: str
    numerics: Numerics
    options: dict[str, Any]
    tier: Tier
    seconds: float = math.inf
    megabytes: float = math.inf
    jobs: int = 1
    dump: str = ""
    """Where failing op cases are written; empty: nowhere."""
    sticky: bool = False
    """An error may outlive its check (a device's context stays broken): its process is replaced."""

    def execute(self, checks: Sequence[Check]) -> Iterator[Finding]:
        """Run checks; a finding for each, in order where there is one process and as they come
        where there are more.
        """
        if self.jobs == 1:
            with closing(Process(self)) as process:
                yield from map(process.run, checks)
            return
        groups, found = deque(together(checks)), queue.SimpleQueue[Finding | BaseException]()
        for _ in range(self.jobs):
            threading.Thread(target=self._take, args=(groups, found), daemon=True).start()
        for _ in checks:
            finding = found.get()
            if isinstance(finding, BaseException):
                raise finding
            yield finding

    def _take(self, groups: deque[list[Check]], found: queue.SimpleQueue[Finding | BaseException]) -> None:
        """Run group after group in a process of this thread's own."""
        try:
            with closing(Process(self)) as process:
                while groups:
                    for check in groups.popleft():
                        found.put(process.run(check))
        except IndexError:  # another thread took the last group
            pass
        except BaseException as error:  # noqa: BLE001  the thread that waits for findings raises it
            found.put(error)


def together(checks: Sequence[Check]) -> list[list[Check]]:
    """Checks in groups that share what a session keeps: a recorded model, an op's cases, a law."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.group, check.id.split("/")[1] if check.group == "trace" else check.op), []).append(
            check
        )
    return [groups[key] for key in sorted(groups, key=lambda key: ORDER.index(key[0]))]


class Process:
    """A process that runs one check after another; started when it is needed."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process."""
        w = self.workers
        self.pipe, write = os.pipe()
        spec = {
            "backend": w.backend,
            "numerics": w.numerics,
            "options": w.options,
            "tier": w.tier,
            "pipe": write,
            "dump": w.dump,
        }
        threads = dict.fromkeys(THREADS, "1")  # cases are small, and threads that wait for work spin
        self.child = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-m", "dsv4_conformance.run.isolate", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(write,),
            env={**threads, **os.environ},
        )
        os.close(write)
        return self.child

    def close(self) -> None:
        """End the process."""
        if self.child:
            self.child.kill()
            self.child.communicate()
            os.close(self.pipe)
            self.child = None

    def run(self, check: Check) -> Finding:
        """Run one check; where the process is lost over it, say how."""
        seconds = self.workers.seconds + (0 if self.child else START_UP)
        child = self.child or self.start()
        assert child.stdin is not None
        try:
            child.stdin.write(check.id.encode() + b"\n")
            child.stdin.flush()
            finding = self.listen(child, check, time.monotonic() + seconds)
        except BrokenPipeError:  # it died before it could read
            finding = crashed(child, check)
        if finding.status in {"crashed", "memory", "timeout"} or (finding.status == "error" and self.workers.sticky):
            self.close()
        return finding

    def listen(self, child: subprocess.Popen[bytes], check: Check, deadline: float) -> Finding:
        """Wait for the answer, the end of the process or a limit."""
        buffer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.pipe, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=0.05):
                    data = os.read(self.pipe, 1 << 16)
                    buffer += data
                    if not data:
                        return crashed(child, check)
                    if buffer.endswith(b"\n"):
                        return Finding(**json.loads(buffer))
                used = resident_megabytes(child.pid)
                if used > self.workers.megabytes:
                    limit = f"the limit is {self.workers.megabytes:g} MB (--memory-limit)"
                    return lost(check, "memory", f"used {used} MB; {limit}")
                if time.monotonic() > deadline:
                    return lost(check, "timeout", f"still running after {self.workers.seconds:g} s (--time-limit)")


def crashed(child: subprocess.Popen[bytes], check: Check) -> Finding:
    """A finding for a check over which the process ended."""
    code = child.wait()
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return lost(check, "crashed", f"the process ended with {ending} during this check")


def lost(check: Check, status: Status, message: str) -> Finding:
    """A finding for a check that did not return."""
    return Finding(check.id, check.op, check.group, check.level, status, message, used=float("inf"))


def resident_megabytes(pid: int) -> int:
    """Resident memory of a process, from /proc; 0 where the system has none or the process is
    gone.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):
        return 0


def end_with(parent: int) -> None:
    """End this process once its parent has gone, whatever a check is busy with."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Run the checks that stdin names, one a line."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    from dsv4_conformance.run.catalogue import collect, find
    from dsv4_conformance.run.runner import run_check
    from dsv4_core.contract import registry

    spec = json.loads(sys.argv[1])
    backend = registry.create(spec["backend"], numerics=spec["numerics"], **spec["options"])
    session = Session(backend, spec["tier"], dump=Path(spec["dump"]) if spec["dump"] else None)
    known = {c.id: c for c in collect("full", spec["numerics"], backend)}
    with os.fdopen(spec["pipe"], "wb", buffering=0) as pipe:
        for line in sys.stdin:
            case_id = line.strip()
            check = known.get(case_id) or find(case_id)
            assert check is not None, case_id
            pipe.write(json.dumps(asdict(run_check(check, session))).encode() + b"\n")


if __name__ == "__main__":
    main()
