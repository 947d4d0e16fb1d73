"""The fuzzer's corpus, replayed, and some new inputs for every surface; minutes of it are proof."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import mutate
from harness import BAD, Worker, call, fuzz, fuzz_lines, judged, outcome_of, patch
from surfaces import prepare, surfaces

CORPUS = sorted((HERE / "corpus").glob("*.jsonl"))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    kept = os.environ.get("DSV4_ONE_PROCESS")
    os.environ["DSV4_ONE_PROCESS"] = "1"
    os.chdir(folder)
    prepare(folder)
    yield folder
    os.chdir(before)
    if kept is None:
        del os.environ["DSV4_ONE_PROCESS"]


def bad(tally):
    return [(name, " ".join(words)[:200], o.verdict, o.place, o.said[-300:]) for name, _, words, o in tally.bad]


def test_nothing_that_ever_failed_fails_again(state):
    """A corpus entry is a command, and what of the damaged file is other than the sound one's."""
    by_name = {s.name.replace(" ", "-"): s for s in surfaces(state)}
    found = []
    for file in CORPUS:
        surface = by_name.get(file.stem)
        worker = Worker(state, surface)
        good = (state / surface.file).read_bytes() if surface else b""
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if surface:
                at, length = entry["at"], entry["length"]
                (state / surface.file).unlink()
                (state / surface.file).write_bytes(good[:at] + base64.b64decode(entry["new"]) + good[at + length :])
            names = (Path(surface.file).name, *surface.named) if surface else ()
            outcome = outcome_of(worker, file.stem, names, entry["words"], None)
            if outcome.verdict in BAD:
                found.append((file.stem, outcome))
        worker.stop()
        if surface:
            (state / surface.file).write_bytes(good)
    assert not found


@pytest.mark.parametrize("inputs", [15, pytest.param(3000, marks=pytest.mark.proof)])
def test_every_surface(state, inputs):
    found = [
        line
        for surface in surfaces(state)
        for line in bad(fuzz(state, surface, max(1, inputs // surface.slow), seed=inputs))
    ]
    assert not found


@pytest.mark.parametrize("inputs", [40, pytest.param(5000, marks=pytest.mark.proof)])
def test_command_lines(state, inputs):
    assert not bad(fuzz_lines(state, inputs, seed=inputs))


def test_the_last_net_would_be_seen(state, monkeypatch):
    """The harness tells what it is there to tell: an unforeseen error, an unnamed file, an escape, a wrong success."""
    from dsv4_core.cli import backends

    monkeypatch.setattr(backends, "_sorted", lambda: 1 / 0)
    status, out, err, place = call(["backends"])
    assert status == 70
    assert "backends.py" in place
    assert judged("x", (), status, out, err, place, None).verdict == "traceback"
    assert judged("x", ("file",), 2, "", "dsv4: wrong", "", None).verdict == "unnamed"
    assert judged("x", (), 2, "", "dsv4: \x1b[2J", "", None).verdict == "escape"
    assert judged("x", (), 0, "other", "", "", "sound").verdict == "wrong success"


def test_a_patch_gives_the_input_back():
    rng, good = Random(1), bytes(range(200))
    for _ in range(200):
        data = mutate.raw(rng, good)
        at, length, new = patch(good, data)
        assert good[:at] + new + good[at + length :] == data


@pytest.mark.parametrize("runs", [500, pytest.param(200_000, marks=pytest.mark.proof)])
@pytest.mark.parametrize("reader", ["shard", "config", "index", "converted", "toml", "npy", "tokenizer"])
def test_coverage_guided(reader, runs, tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, HERE / "guided.py", reader, f"-runs={runs}", "-max_len=4096", "-seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
