"""SIGKILL at random moments: what is left never looks complete unless it is, and the same command
then finishes it.
"""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
from killing import KINDS, in_a_child, strike
from rewriting import small

from dsv4_core.checkpoint.tensors import INDEX
from dsv4_core.checkpoint.weights import Checkpoint


@pytest.mark.parametrize("moments", [3, pytest.param(40, marks=pytest.mark.proof)])
@pytest.mark.parametrize("name", KINDS)
def test_what_sigkill_leaves(name, moments, tmp_path):
    if name == "kernel build":
        pytest.importorskip("torch")
    struck = strike(KINDS[name](tmp_path), moments, Random(f"{name} {moments}"))
    assert not struck.wrong
    assert struck.complete + struck.finished == moments


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
