"""DSpark over ranks: all draft the same tokens, which are verified to be those of one process."""

import json
import shutil
import subprocess
import sys

import pytest
from launch import environment, free_port
from rewriting import cut_experts

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import create, preset
from dsv4_core.session import load

PROMPTS = ["0,3,7", "0,9,4,11,2", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = preset(
        PRESETS["tiny-dspark"], layers=3, experts=4, ratios=(0, 4, 128), max_position=None, expert_dtype="fp4"
    )
    create(path := tmp_path_factory.mktemp("ranks") / "model", config, seed=3)
    return path


@pytest.mark.parametrize(("tp", "ep", "temperature"), [(2, 1, 0.8), (1, 2, 0.0)])
def test_two_ranks_draft_alike_and_say_what_one_says(model, tp, ep, temperature):
    """float64, so that sums in another order move no choice; sampled drafts are drawn on every
    rank, by the same numbers.
    """
    check(model, tp, ep, temperature)


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2)])
def test_ranks_share_out_blocks_of_unlike_numbers_of_experts(model, tmp_path, tp, ep):
    """REAP cuts, and a drafter that was left whole: layer 1 keeps 3 experts of 4."""
    uneven = shutil.copytree(model, tmp_path / "uneven")
    cut_experts(uneven, 3, ["layers.1"])
    check(uneven, tp, ep, 0.0)


def check(model, tp, ep, temperature):
    asked = [word for ids in PROMPTS for word in ("--tokens", ids)]
    asked += ["-n", "10", "-b", "reference", "--numerics", "float64", "--temperature", str(temperature), "--seed", "4"]
    asked += ["--speculative", "5", "--tp", str(tp), "--ep", str(ep), "--json"]
    port = free_port()
    command = [sys.executable, "-m", "dsv4_core", "generate", str(model), *asked]
    ranks = [
        subprocess.Popen(command, env=environment(rank, 2, port), text=True, stdout=-1, stderr=-1) for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said[0][1] + said[1][1]
    found = json.loads(said[0][0])["result"]
    assert said[1][0] == ""
    assert found["drafts"]["proposed"] > 0
    with load(model, backend="reference", numerics="float64") as alone:
        prompts = [[int(token) for token in ids.split(",")] for ids in PROMPTS]
        plain = alone.generate(prompts, max_tokens=10, temperature=temperature, seed=4).run()
    assert [sequence["tokens"] for sequence in found["sequences"]] == plain.tokens
