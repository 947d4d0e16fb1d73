"""The fuzzer's corpus, replayed, and some new inputs for every surface; minutes of it are proof."""

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
from harness import BAD, Fuzzed, again, call, entry_of, fuzz, fuzz_lines, judged, patched
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
    return [(" ".join(words)[:200], o.verdict, o.place, o.said[-300:]) for _, words, o in tally.bad]


def test_nothing_that_ever_failed_fails_again(state):
    """A corpus entry is a command, and what of the damaged file is other than the sound one's."""
    by_name = {s.name.replace(" ", "-"): s for s in surfaces(state)}
    found = []
    for file in CORPUS:
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        found += [(file.stem, o) for o in again(state, by_name.get(file.stem), entries) if o.verdict in BAD]
    assert not found


def test_every_sound_state_is_accepted(state):
    """Or else every input would be refused for what is wrong everywhere."""
    refused = []
    for surface in surfaces(state):
        with Fuzzed(state, surface) as fuzzed:
            met = [(words, fuzzed.meet(fuzzed.good, words)) for words in dict.fromkeys(surface.commands)]
        refused += [(surface.name, words, o.said) for words, o in met if o.verdict != "accepted"]
    assert not refused


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
    """The harness tells what it is there to tell: an unforeseen error, an unnamed file, an escape,
    a wrong success.
    """
    from dsv4_core.cli import backends

    monkeypatch.setattr(backends, "_sorted", lambda: 1 / 0)
    status, out, err, place = call(["backends"])
    assert status == 70
    assert "backends.py" in place
    assert judged((), status, out, err, place, None).verdict == "traceback"
    assert judged(("file",), 2, "", "dsv4: wrong", "", None).verdict == "unnamed"
    assert judged((), 2, "", "dsv4: \x1b[2J", "", None).verdict == "escape"
    assert judged((), 0, "\x07", "", "", None, ["generate"]).verdict == "accepted"
    assert judged((), 0, "", "\x07", "", None, ["generate"]).verdict == "escape"
    assert judged((), 0, "other", "", "", "sound").verdict == "wrong success"


def test_an_entry_of_the_corpus_gives_its_input_back(tmp_path):
    rng, good = Random(1), f'{{"path": "{tmp_path}/model"}}'.encode() + bytes(range(200))
    for _ in range(200):
        data = mutate.raw(rng, good)
        there = tmp_path / "another"
        entry = entry_of(tmp_path, good, data, ("inspect",))
        assert patched(tmp_path, good, entry) == data
        moved = good.replace(os.fsencode(tmp_path), os.fsencode(there))
        assert patched(there, moved, entry) == data.replace(os.fsencode(tmp_path), os.fsencode(there))


@pytest.mark.parametrize("runs", [500, pytest.param(200_000, marks=pytest.mark.proof)])
@pytest.mark.parametrize("reader", ["shard", "config", "index", "converted", "toml", "npy", "tokenizer"])
def test_coverage_guided(reader, runs, tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, HERE / "guided.py", reader, f"-runs={runs}", "-max_len=4096", "-seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
