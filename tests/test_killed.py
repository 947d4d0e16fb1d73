"""SIGKILL at random moments: what is left never looks complete unless it is, and the same command then finishes it."""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

import pytest
from rewriting import small

from dsv4_core.checkpoint.convert import Options, convert
from dsv4_core.checkpoint.tensors import INDEX
from dsv4_core.checkpoint.weights import Checkpoint


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


def seconds_of(work):
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


@pytest.mark.parametrize("moments", [3, pytest.param(50, marks=pytest.mark.proof)])
@pytest.mark.parametrize("kind", [Converting, Creating, Exporting, Reporting])
def test_what_sigkill_leaves(kind, moments, tmp_path):
    task, rng = kind(tmp_path), Random(f"{kind.__name__} {moments}")
    whole = seconds_of(task.work)
    wanted = digests(task.out)
    assert wanted
    task.clear()
    complete = 0
    for _ in range(moments):
        killed(task.work, rng.uniform(0, whole))
        if task.complete():
            complete += 1
            assert {k: v for k, v in digests(task.out).items() if not k.endswith(".tmp")} == wanted
        if task.complete() and kind is not Reporting:
            task.clear()
        else:
            task.resumed()
            found = {k: v for k, v in digests(task.out).items() if not k.endswith(".tmp")}
            assert found == wanted
            task.clear()
    assert complete <= moments


def test_a_checkpoint_without_its_index_is_not_taken_for_one(tmp_path):
    model = small(tmp_path / "model")
    (model / INDEX).unlink()
    with pytest.raises(ValueError, match="no such file, nor model"):
        Checkpoint(model)


def test_locks_of_killed_processes_are_free(tmp_path):
    from dsv4_core.files.reading import FileError
    from dsv4_core.files.writing import writing_alone

    out = tmp_path / "out"

    def hold():
        with writing_alone(out):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = in_a_child(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(FileError, match=rf"{out}: process {child} is writing it"), writing_alone(out):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with writing_alone(out):
        assert Path(tmp_path / ".out.lock").exists()
    assert not Path(tmp_path / ".out.lock").exists()
