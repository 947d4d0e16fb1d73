"""Ranks that are killed, stopped, started differently or not at all: the others end within 30 s and
say who and why.
"""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed")

from dsv4_conformance.model import golden
from launch import environment, free_port

from dsv4_core.contract.rendezvous import Rendezvous
from dsv4_core.ranks import watch as liveness
from dsv4_core.ranks.watch import RankError, Watch

ENDLESS = ["generate", "--tokens", "5,6,7,8", "--ignore-eos", "-n", "4000", "-b", "reference"]
LIMIT = 30  # seconds, from the moment that something goes wrong
STARTING = 90  # to import torch in several processes on a busy machine


def start(ranks, *more, arguments=ENDLESS, port=None, by_rank=None, environ=None):
    """Start plain processes, each as one rank, as anyone could without torchrun."""
    port = port or free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dsv4_core", *arguments, *more, *(by_rank or {}).get(r, ())],
            env=environment(r, ranks, port) | (environ or {}).get(r, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]


def wait_for_text(process):
    """Block until the rank that speaks has said something: all are in mid-generation."""
    assert process.stdout.read(5)


def ends(processes, expected, limit=LIMIT):
    """Hold every process to ending in time, with an error and a message; give the messages."""
    began = time.monotonic()
    said = []
    for process in processes:
        _, error = process.communicate(timeout=max(0.1, began + limit - time.monotonic()))
        assert process.returncode not in {0, None}
        assert "Traceback" not in error, error
        assert re.search(expected, error), error
        said.append(error)
    return said


@pytest.fixture
def clean():
    """Kill what a failed test has left, stopped processes included."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_rank_ends_the_others(clean, victim):
    clean += start(4, "--tp", "2", "--ep", "2")
    wait_for_text(clean[0])
    clean[victim].kill()
    survivors = [p for r, p in enumerate(clean) if r != victim]
    ends(survivors, rf"rank {victim}\b.*(was lost|ranks' store)")


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.proof)])
def test_a_rank_that_stops_answering_ends_the_other(clean, victim):
    """As a lost machine or a cut cable looks: no connection breaks, nothing comes any more."""
    clean += start(2, "--ep", "2")
    wait_for_text(clean[0])
    clean[victim].send_signal(signal.SIGSTOP)
    ends([clean[1 - victim]], rf"rank {victim}\b.*was lost")


FOUR = ("--tp", "2", "--ep", "2")


@pytest.mark.proof
@pytest.mark.parametrize("victim", [3, 0])
def test_of_four_ranks_one_that_stops_ends_the_others(clean, victim):
    clean += start(4, *FOUR)
    wait_for_text(clean[0])
    clean[victim].send_signal(signal.SIGSTOP)
    ends([p for r, p in enumerate(clean) if r != victim], rf"rank {victim}\b.*(was lost|ranks' store)")


@pytest.mark.proof
def test_of_four_ranks_one_with_another_secret_is_named(clean):
    clean += start(4, *FOUR, environ={3: {"DSV4_STORE_KEY": "quite another secret"}})
    ends(
        clean,
        "rank [0-3] .*is not signed with this rank's secret.*DSV4_STORE_KEY|rank [0-3] .*failed: .*secret",
        STARTING,
    )


@pytest.mark.proof
def test_of_four_ranks_one_with_another_checkpoint_is_named(clean, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(golden.checkpoint_path("tiny-jargon"), other)
    shard = next(other.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    clean += start(4, *FOUR, by_rank={3: [str(other)]})
    ends(clean, r"rank 3 \(.*has another checkpoint than rank 0", STARTING)


@pytest.mark.proof
def test_strangers_at_the_port_do_no_harm(clean):
    """Garbage, a huge length, and silence, before the ranks meet and while they run: the run goes
    on, and ends as it would.
    """
    port = free_port()
    clean += start(4, *FOUR, port=port)
    talking = threading.Event()
    silent: list[socket.socket] = []

    def disturb():
        for words in itertools.cycle(
            (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x00" * 8 + b"\x7f" + b"\xff" * 7, os.urandom(4096), b"")
        ):
            try:
                other = socket.create_connection(("127.0.0.1", port), timeout=1)
                other.sendall(words)
                silent.append(other)
            except OSError:  # nobody listens yet, or no more
                pass
            if talking.wait(0.2) or len(silent) > 200:
                return

    stranger = threading.Thread(target=disturb)
    stranger.start()
    try:
        wait_for_text(clean[0])
        time.sleep(3)
        assert [process.poll() for process in clean] == [None] * 4
    finally:
        talking.set()
        stranger.join()
        for other in silent:
            other.close()
    clean[2].kill()
    ends([p for r, p in enumerate(clean) if r != 2], r"rank 2\b.*was lost")


@pytest.mark.proof
def test_ranks_that_were_all_suspended_go_on(clean):
    """A job that is paused as a whole (Ctrl-Z, a scheduler) has lost nobody."""
    clean += start(2, "--ep", "2")
    wait_for_text(clean[0])
    for signum, seconds in ((signal.SIGSTOP, liveness.SILENCE + 2), (signal.SIGCONT, 3)):
        for process in clean:
            process.send_signal(signum)
        time.sleep(seconds)
    assert [process.poll() for process in clean] == [None, None]
    clean[1].kill()
    ends([clean[0]], r"rank 1 \(.* was lost")


def test_under_torchrun_the_agent_ends_the_others(clean):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    agent = subprocess.Popen(
        [*command, "-m", "dsv4_core", *ENDLESS, "--tp", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    clean.append(agent)
    wait_for_text(agent)
    children = subprocess.run(
        ["ps", "--ppid", str(agent.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    ranks = [int(pid) for pid in children.stdout.split()]
    victim = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    _, error = agent.communicate(timeout=LIMIT)
    assert agent.returncode != 0
    assert re.search(r"rank\s*:? 1\b", error)
    assert "SIGKILL" in error
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def test_another_checkpoint_is_found_before_weights_load(clean, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(golden.checkpoint_path("tiny-jargon"), other)
    shard = next(other.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    clean += start(2, "--tp", "2", by_rank={1: [str(other)]})
    ends(clean, r"rank 1 \(.*has another checkpoint than rank 0", STARTING)


def test_another_configuration_is_named(clean, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(golden.checkpoint_path("tiny-jargon"), other)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"swiglu_limit": 10.0', '"swiglu_limit": 9.0'))
    clean += start(2, "--tp", "2", by_rank={1: [str(other)]})
    ends(
        clean,
        r"rank 1 \(.*another configuration than rank 0 .*\{'swiglu_limit': 9.0\} instead of \{'swiglu_limit': 10.0\}",
        STARTING,
    )


def test_another_request_is_named(clean):
    clean += start(2, "--tp", "2", by_rank={1: ["-n", "3999"]})
    ends(
        clean,
        r"rank 1 \(.*another request than rank 0 .*\{'max_tokens': 3999\} instead of \{'max_tokens': 4000\}",
        STARTING,
    )


def test_a_rank_whose_checkpoint_is_broken_ends_the_other(clean, tmp_path):
    clean += start(2, "--tp", "2", by_rank={1: [str(tmp_path)]})
    ends([clean[1]], "config.json", STARTING)
    ends([clean[0]], r"rank 1 \(.*failed: .*config.json")


def test_a_split_that_the_model_does_not_allow_is_said_before_weights_load(clean):
    clean += start(4, "--tp", "4")
    ends(clean, r"--tp 4: o_groups = 2 is not a multiple", STARTING)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "--tp 2 --ep 1 needs 2 ranks and 1 was started; torchrun --nproc-per-node 2"),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "needs 2 ranks and 4 was started"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not"),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "WORLD_SIZE = 'two' must be a number",
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK = 3 must be in 0 .. WORLD_SIZE - 1",
        ),
    ],
)
def test_ranks_that_were_not_started_as_asked(monkeypatch, environ, message):
    from click.testing import CliRunner

    from dsv4_core.cli import root

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(root, ["generate", "--tokens", "5", "--tp", "2"])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


class Shared(dict):
    """A store in this process."""

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]


def test_ranks_that_never_start_are_named():
    with pytest.raises(RankError, match="rank 1, 2 of 3 did not start within 0 s"):
        Watch(Shared(), rank=0, ranks=3, holder=0, place="a", join=0.2)


def test_no_store_is_said(monkeypatch):
    from dsv4_core.contract import registry
    from dsv4_core.ranks import store

    monkeypatch.setattr(store, "JOIN", 1.0)
    where = Rendezvous(rank=1, ranks=2, local_rank=1, host="127.0.0.1", port=free_port(), hosted=False, attempt="0")
    with pytest.raises(RankError, match=r"rank 1 found no store of rank 0 at 127\.0\.0\.1"):
        registry.create("reference").process_group(where)


def test_a_rank_that_is_done_is_not_lost(monkeypatch):
    """Ranks finish one after the other; the silence of one that said so is not a death."""
    monkeypatch.setattr(liveness, "SILENCE", 0.3)
    monkeypatch.setattr(liveness, "BEAT", 0.05)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = Shared()
    watches = {}
    makers = [
        threading.Thread(
            target=lambda r=r: watches.update({r: Watch(store, rank=r, ranks=2, holder=None, place=str(r))})
        )
        for r in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    first = threading.Thread(target=watches[0].done)
    first.start()
    time.sleep(1.0)
    watches[1].done()
    first.join()
    assert ended == []


def test_words_of_strangers_are_not_believed():
    from dsv4_core.ranks.signed import SignedStore

    shared = Shared()
    mine, same, other = (SignedStore(shared, key) for key in (b"a" * 16, b"a" * 16, b"b" * 16))
    mine.set("dsv4/beat/1", "7")
    assert same.multi_get(["dsv4/beat/1"]) == [b"7"]
    with pytest.raises(RankError, match=r"as rank 1 is not signed with this rank's secret.*DSV4_STORE_KEY"):
        other.multi_get(["dsv4/beat/1"])
    shared["dsv4/beat/2"] = shared["dsv4/beat/1"]  # a word that was said elsewhere
    with pytest.raises(RankError, match="as rank 2 is not signed"):
        same.multi_get(["dsv4/beat/2"])
    shared["dsv4/beat/1"] = b"failed: \x1b[2J"
    with pytest.raises(RankError, match="not signed"):
        same.multi_get(["dsv4/beat/1"])


def test_secrets_that_keep_nothing_secret_are_refused(tmp_path, monkeypatch):
    from dsv4_core.ranks.signed import secret

    monkeypatch.setenv("DSV4_STORE_KEY", "short")
    with pytest.raises(ValueError, match="DSV4_STORE_KEY: a secret of 5 bytes; give at least 16"):
        secret()
    file = tmp_path / "key"
    file.write_text("k" * 20)
    file.chmod(0o644)
    monkeypatch.setenv("DSV4_STORE_KEY_FILE", str(file))
    with pytest.raises(ValueError, match="others may read it"):
        secret()
    file.chmod(0o600)
    assert secret() == b"k" * 20


def test_another_world_size_is_named():
    store = Shared()
    for key in ("size", "place", "beat"):
        store.set(f"dsv4/{key}/1", "3")
    with pytest.raises(RankError, match="rank 1 was started with WORLD_SIZE = 3, rank 0 with 2"):
        Watch(store, rank=0, ranks=2, holder=None, place="a", join=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = 99999 must be from 1 to 65535"),
        ({"WORLD_SIZE": "9" * 30}, "must be a number"),
        ({"MASTER_PORT": "\u00b2"}, "must be a number"),
    ],
)
def test_a_rendezvous_that_no_network_has(changes, message):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"} | changes
    with pytest.raises(ValueError, match=message):
        Rendezvous.from_environment(given)


def test_two_processes_of_one_rank_are_told(monkeypatch):
    from dsv4_core.contract import registry

    port = free_port()
    where = [
        Rendezvous(rank=r, ranks=3, local_rank=r, host="127.0.0.1", port=port, hosted=False, attempt="0")
        for r in (0, 1, 1)
    ]
    kept = [registry.create("reference").process_group(w) for w in where[:2]]
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    with pytest.raises(RankError, match=r"rank 1 of this run is .*, already; give every process a RANK of its own"):
        registry.create("reference").process_group(where[2])
    assert kept


def test_a_host_that_nobody_knows_is_said_at_once():
    from dsv4_core.contract import registry

    where = Rendezvous(rank=0, ranks=2, local_rank=0, host="no.such.host.invalid", port=1, hosted=False, attempt="0")
    with pytest.raises(RankError, match=r"MASTER_ADDR = 'no\.such.host.invalid' is no host"):
        registry.create("reference").process_group(where)


def test_several_hosts_need_a_secret(monkeypatch):
    from click.testing import CliRunner

    from dsv4_core.cli import root

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DSV4_STORE_KEY", raising=False)
    result = CliRunner().invoke(root, ["generate", "--tokens", "5", "--tp", "2"])
    assert "ranks of several hosts need a secret that they share" in str(result.exception)
