"""SIGKILL at random moments, of everything that writes: python tests/killing.py --moments 40
--report reports/fuzz/DATE-killed.md.

Whatever is left must not look complete unless it is, and the same work, done again, must come to
the same files.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rewriting import small

from dsv4_core.checkpoint.convert import Options, convert
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.files.writing import write as write_whole

Work = Callable[[], Any]


def digests(directory):
    """Every file's content by its path, but for names that say where the source was."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def in_a_child(work):
    """Run in a fork; give its process. Nothing is torn down, as nothing is after SIGKILL."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
    finally:
        os._exit(0)


def seconds_of(work: Work) -> float:
    began = time.monotonic()
    os.waitpid(in_a_child(work), 0)
    return time.monotonic() - began


def killed(work, after):
    child = in_a_child(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class Converting:
    """A copy is under its own name or not there."""

    def __init__(self, folder):
        self.source, self.out = small(folder / "source"), folder / "out"

    def work(self):
        convert(self.source, self.out, Options(bf16=True))

    def complete(self):
        return self.out.exists()

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.out.with_name("out.partial"), ignore_errors=True)

    def resumed(self):
        self.work()


class Creating:
    """A random checkpoint is complete once it has its index."""

    def __init__(self, folder):
        self.out = folder / "out"

    def work(self):
        small(self.out, seed=3)

    def complete(self):
        try:
            Checkpoint(self.out)
        except ValueError:
            return False
        return True

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def resumed(self):
        self.clear()  # nothing is ever overwritten: an unfinished one is removed by hand
        self.work()


class Exporting:
    """An export is complete once it has its manifest."""

    def __init__(self, folder):
        self.out = folder / "out"

    def work(self):
        from dsv4_conformance.exchange.export import export

        for _ in export(self.out, "smoke", "native", ["rms_norm", "cache_read"], {}):
            pass

    def complete(self):
        return (self.out / "manifest.json").exists()

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def resumed(self):
        self.clear()
        self.work()


class Reporting:
    """A report is complete once it has report.json; another run's may have been there before."""

    def __init__(self, folder):
        from dsv4_conformance.check import Session
        from dsv4_conformance.run import runner

        from dsv4_core.contract import registry

        self.out = folder / "out"
        self.run = runner.run(Session(registry.create("reference"), "smoke"), ops=["rms_norm"])

    def work(self):
        from dsv4_conformance.report.write import write

        for _ in range(20):
            write(self.run, self.out, "dsv4 conformance run", "dsv4 conformance run", {})

    def complete(self):
        return (self.out / "report.json").exists()

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def resumed(self):
        self.work()


class Building:
    """Kernels in C are complete once their hash lies beside them. A small source stands for them:
    what is tried is the keeping.
    """

    def __init__(self, folder):
        self.out, sources = folder / "out", folder / "c"
        sources.mkdir()
        (sources / "one.c").write_text("int answer(void) { return 42; }\n")
        self.sources = sources

    def work(self):
        from dsv4_backend_torch import kept

        os.environ["XDG_CACHE_HOME"] = str(self.out)
        kept.SOURCES = self.sources
        kept.library()

    def complete(self):
        from dsv4_backend_torch.kept import sound

        found = list(self.out.rglob("*.so"))
        if not any(sound(path) for path in found):
            return False
        assert ctypes.CDLL(str(found[0])).answer() == 42
        return True

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def resumed(self):
        self.out.mkdir(exist_ok=True)
        os.waitpid(in_a_child(self.work), 0)
        assert self.complete()


KINDS: dict[str, Any] = {
    "convert": Converting,
    "init": Creating,
    "export": Exporting,
    "report writing": Reporting,
    "kernel build": Building,
}


@dataclass
class Struck:
    """What so many kills left: states that looked complete and were, unfinished ones that the same
    work then finished, wrong ones.
    """

    complete: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)


def strike(task: Any, moments: int, rng: Random) -> Struck:
    """Kill so many times, from before the start to after the end."""
    whole = seconds_of(task.work)
    wanted, struck = held(task), Struck()
    assert wanted
    task.clear()
    for _ in range(moments):
        after = rng.uniform(0, whole)
        killed(task.work, after)
        looks_complete = task.complete()
        if looks_complete and held(task) != wanted:
            struck.wrong.append(f"after {after:.3f} s: looks complete and is not")
        if not looks_complete or isinstance(task, Reporting):
            task.resumed()
            if held(task) != wanted:
                struck.wrong.append(f"after {after:.3f} s: done again, it is another")
        struck.complete += looks_complete
        struck.finished += not looks_complete
        task.clear()
    return struck


def held(task: Any) -> dict[str, str]:
    """Files that a task made, by content; temporary names that a kill left are nobody's."""
    found = digests(task.out)
    if isinstance(task, Building):  # a compiler's own output may differ from run to run; what counts was called
        return {"called": str(task.complete())}
    return {name: digest for name, digest in found.items() if not name.endswith(".tmp")}


def main() -> int:
    """Strike every kind; print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=40, help="of each kind")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    lines = [
        "| writes | kills | looked complete, and was | unfinished, then finished | wrong |",
        "|---|---:|---:|---:|---:|",
    ]
    wrong: list[str] = []
    total = [0, 0]
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            struck = strike(kind(Path(folder)), given.moments, Random(f"{name} {given.moments}"))
        lines.append(f"| {name} | {given.moments} | {struck.complete} | {struck.finished} | {len(struck.wrong)} |")
        print(lines[-1], *struck.wrong, sep="\n", flush=True)
        total = [total[0] + struck.complete, total[1] + struck.finished]
        wrong += [f"- {name}: {what}" for what in struck.wrong]
    lines.append(f"| sum | {given.moments * len(KINDS)} | {total[0]} | {total[1]} | {len(wrong)} |")
    text = [
        "# SIGKILL at random moments", "", f"Generated by `python tests/killing.py --moments {given.moments} --report FILE`; do not edit.", "",
        f"{time.strftime('%Y-%m-%d')}. Moments lie evenly between the start and the end of an undisturbed run. What looks complete is",
        "held against that run's files, content for content; what does not is done again, and then held against them.", "", *lines, *wrong, "",
    ]  # fmt: skip
    if given.report:
        write_whole(given.report, "\n".join(text))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
