"""What a rank asks for and what becomes resident of its files: its share, from a cut copy to the
page; from the whole model more.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.convert import Options, convert
from dsv4_core.checkpoint.create import create

CUT_EVERYWHERE = replace(
    PRESETS["flash"],
    num_hidden_layers=3,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128, 0),
    hidden_size=1024,
    num_attention_heads=8,
    n_routed_experts=8,
    moe_intermediate_size=512,
    vocab_size=4096,
)

CHILD = """
import json, sys
from pathlib import Path
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.checkpoint.rank_part import Place, ShardedSource, share
from dsv4_core.checkpoint.rank_copy import cut_for, open_copy
from dsv4_core.checkpoint.weights import Checkpoint

model, path, place = Checkpoint(sys.argv[1]), Path(sys.argv[2]), Place(*map(int, sys.argv[3:]))
config, is_cut = model.config, cut_for(path) is not None
source = ShardedSource(open_copy(path, place) if is_cut else Checkpoint(path), place, is_cut=is_cut)

def touch(weight):
    for part in (weight.data, weight.scale) if isinstance(weight, ScaledArray) else (weight,):
        part.view(f"u{part.itemsize}").sum()

for name in model.names:
    stem = name.removesuffix(".weight")
    elsewhere = ".shared_experts." in name and not place.holds_shared(config)
    if not (elsewhere or ".experts." in name or name.endswith(".scale")):
        touch(source.array(name) if stem == name else source.weight(stem))
for prefix in [*(f"layers.{i}" for i in range(config.num_hidden_layers)), "mtp.0"]:
    for projection in ("w1", "w2", "w3"):
        for expert in source.experts(f"{prefix}.ffn", projection):
            touch(expert)

pages, counted = 0, False
for line in Path("/proc/self/smaps").read_text().splitlines():
    key, *rest = line.split()
    if not key.endswith(":"):
        counted = str(path) in line and line.endswith(".safetensors")
    elif key == "Rss:" and counted:
        pages += int(rest[0]) * 1024
share = share(config, place, [model.spec(name) for name in model.names])
print(json.dumps({"asked": sum(source.read.values()), "share": share, "resident": pages}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "model"
    create(path, CUT_EVERYWHERE, seed=3)
    return path


def touched(model, path, place):
    command = [sys.executable, "-c", CHILD, model, path, *map(str, place)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are counted in /proc/self/smaps")
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (2, 2)])
def test_a_cut_copy_s_resident_pages_are_the_rank_s_share(model, tmp_path, tp, ep):
    convert(model, tmp_path / "cut", Options(tp=tp, ep=ep))
    for rank in range(tp * ep):
        copy = touched(model, tmp_path / "cut" / f"rank-{rank}-of-{tp * ep}", (tp, ep, rank))
        assert copy["asked"] == pytest.approx(copy["share"], rel=0.02), rank
        assert copy["resident"] == pytest.approx(copy["share"], rel=0.02), rank


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are counted in /proc/self/smaps")
@pytest.mark.parametrize("tp", [2, 4])
def test_from_the_whole_model_a_rank_asks_for_its_share_and_pages_come_on_top(model, tp):
    """The columns of a row that another rank holds are on the same page: what the document says,
    and why copies are cut.
    """
    whole = touched(model, model, (tp, 1, tp - 1))
    assert whole["asked"] == pytest.approx(whole["share"], rel=0.02)
    assert whole["resident"] > 1.05 * whole["share"]
