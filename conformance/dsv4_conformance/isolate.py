"""Checks in a process of their own: one that crashes the interpreter, hangs or eats memory is reported, and the rest still runs.

One worker runs check after check and is replaced when it dies. It writes a line of JSON per event to a pipe of its own, so that what a backend prints
does no harm.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_conformance.checks import Check, Finding, Session, Status, collect

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_core.spec import Numerics, Tier

START_UP = 120.0  # seconds for a worker to import its backend before the first check's own limit counts


@dataclass(frozen=True)
class Worker:
    """What a worker is told: a backend by name and options, and the run's limits."""

    backend: str
    numerics: Numerics
    options: dict[str, Any]
    tier: Tier
    seconds: float
    megabytes: int

    def execute(self, checks: Sequence[Check]) -> Iterator[Finding]:
        """Run checks one by one in workers; a finding for each, in order."""
        todo = list(checks)
        while todo:
            done = 0
            for finding in self._batch(todo):
                done += 1
                yield finding
            todo = todo[done:]

    def _batch(self, todo: Sequence[Check]) -> Iterator[Finding]:
        """Findings of one worker until it has run everything or dies."""
        read, write = os.pipe()
        spec = json.dumps({**asdict(self), "pipe": write, "ids": [c.id for c in todo]})
        command = [sys.executable, "-m", "dsv4_conformance.isolate"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(write,))  # noqa: S603  our own module
        os.close(write)
        assert process.stdin is not None
        try:
            process.stdin.write(spec.encode())
            process.stdin.close()
            yield from self._listen(process, read, todo)
        finally:
            os.close(read)
            if process.poll() is None:
                process.kill()
            process.wait()

    def _listen(self, process: subprocess.Popen[bytes], pipe: int, todo: Sequence[Check]) -> Iterator[Finding]:
        selector = selectors.DefaultSelector()
        selector.register(pipe, selectors.EVENT_READ)
        buffer, done, deadline = b"", 0, time.monotonic() + self.seconds + START_UP
        while done < len(todo):
            if selector.select(timeout=0.05):
                data = os.read(pipe, 1 << 16)
                if not data:
                    process.wait()
                    yield lost(
                        todo[done], "crashed", f"the process ended with {ending(process.returncode)} during this check"
                    )
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    yield Finding(**json.loads(line))
                    done += 1
                    deadline = time.monotonic() + self.seconds
            used = resident_megabytes(process.pid)
            if used > self.megabytes:
                yield lost(todo[done], "memory", f"used {used} MB; the limit is {self.megabytes} MB (--memory-limit)")
                return
            if time.monotonic() > deadline:
                yield lost(todo[done], "timeout", f"still running after {self.seconds:g} s (--time-limit)")
                return


def lost(check: Check, status: Status, message: str) -> Finding:
    """A finding for a check that did not return."""
    return Finding(check.id, check.op, check.group, check.level, status, message, used=float("inf"))


def ending(code: int) -> str:
    """An exit status in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def resident_megabytes(pid: int) -> int:
    """Resident memory of a process, from /proc; 0 where the system has none or the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):
        return 0


def main() -> None:
    """Run the checks that stdin names."""
    from dsv4_conformance import replay
    from dsv4_conformance.runner import run_check
    from dsv4_core import registry

    spec = json.loads(sys.stdin.read())
    backend = registry.create(spec["backend"], numerics=spec["numerics"], **spec["options"])
    session = Session(backend, spec["tier"])
    known = {c.id: c for c in collect("full", spec["numerics"], backend.weight_formats)}
    with os.fdopen(spec["pipe"], "wb", buffering=0) as pipe:
        for case_id in spec["ids"]:
            check = known.get(case_id) or replay.find(case_id)
            assert check is not None, case_id
            finding = run_check(check, session)
            pipe.write(json.dumps(asdict(finding)).encode() + b"\n")


if __name__ == "__main__":
    main()
