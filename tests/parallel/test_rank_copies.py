"""Copies that hold one rank's parts: the same parts as cut from the whole, and refused at any other
place.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance.model import golden

from dsv4_core.checkpoint.convert import Options, convert
from dsv4_core.checkpoint.findings import CheckpointError
from dsv4_core.checkpoint.manifest import MANIFEST
from dsv4_core.checkpoint.rank_copy import cut_for, open_copy, origin, own_directory
from dsv4_core.checkpoint.rank_part import Place, ShardedSource
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli import root
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.files.reading import FileError


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "copies"
    convert(golden.checkpoint_path("tiny-pro"), out, Options(tp=2, ep=2))
    return out


def same(a, b):
    if isinstance(a, ScaledArray):
        return a.format == b.format and np.array_equal(a.data, b.data) and np.array_equal(a.scale, b.scale)
    return np.array_equal(a, b)


def test_a_copy_gives_what_is_cut_from_the_whole(copies):
    whole = Checkpoint(golden.checkpoint_path("tiny-pro"))
    for rank in range(4):
        place = Place(2, 2, rank)
        directory = own_directory(copies, rank, 4)
        assert cut_for(directory) == place
        copy = ShardedSource(open_copy(directory, place), place, is_cut=True)
        cut = ShardedSource(whole, place)
        for name in whole.names:
            stem = name.removesuffix(".weight")
            if ".experts." in name or name.endswith(".scale") or (".shared_experts." in name and place.t):
                continue
            pair = [s.weight(stem) if stem != name else s.array(name) for s in (cut, copy)]
            assert same(*pair), (rank, name)
        for projection in ("w1", "w2", "w3"):
            pair = [s.experts("layers.1.ffn", projection) for s in (cut, copy)]
            assert pair[0].shape == pair[1].shape
            assert pair[0].dtype == pair[1].dtype
            assert all(same(a, b) for a, b in zip(*pair, strict=True))


def test_a_copy_is_refused_at_another_place(copies):
    with pytest.raises(CheckpointError, match="was cut for --tp 2 --ep 2, rank 1; this is --tp 1 --ep 4, rank 1"):
        open_copy(copies / "rank-1-of-4", Place(1, 4, 1))
    with pytest.raises(ValueError, match="was cut for 4 ranks, and 2 was started"):
        own_directory(copies, 0, 2)


def test_a_damaged_copy_is_refused(copies, tmp_path):
    import shutil

    shutil.copytree(copies / "rank-3-of-4", tmp_path / "copy")
    next((tmp_path / "copy").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_copy(tmp_path / "copy", Place(2, 2, 3))


def test_a_manifest_of_no_rank_is_refused(copies, tmp_path):
    file = tmp_path / MANIFEST
    made = json.loads((copies / "rank-3-of-4" / MANIFEST).read_text())
    made["options"]["rank"] = 4
    file.write_text(json.dumps(made))
    with pytest.raises(FileError, match="rank 4 is none of tp 2 x ep 2; remove this copy"):
        cut_for(tmp_path)


def test_copies_of_one_conversion_have_one_origin(copies):
    assert len({origin(copies / f"rank-{r}-of-4") for r in range(4)}) == 1


def test_ranks_generate_from_their_copies(tmp_path):
    pytest.importorskip("torch.distributed")
    from launch import environment, free_port

    request = ["--tokens", "5,6,7", "-n", "6", "-b", "reference", "--numerics", "float64"]
    convert(golden.checkpoint_path("tiny-flash"), tmp_path / "cut", Options(tp=2, ep=1))
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dsv4_core", "generate", tmp_path / "cut", *request, "--tp", "2", "--stats"],
            env=environment(r, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    whole = [sys.executable, "-m", "dsv4_core", "generate", golden.checkpoint_path("tiny-flash"), *request]
    assert said[0][0] == subprocess.run(whole, capture_output=True, text=True, check=True).stdout
    assert "rank 1: weights: " in said[0][1]


def test_a_copy_is_inspected_as_the_part_that_it_is(copies):
    directory = next(copies.glob("rank-1-of-*"))
    result = CliRunner().invoke(root, ["inspect", str(directory)])
    assert result.exit_code == 0, result.output
    assert "a part of a model" in result.output
    assert "sound: names" in result.output


def test_a_damaged_copy_is_listed_as_damaged(copies, tmp_path):
    directory = shutil.copytree(next(copies.glob("rank-1-of-*")), tmp_path / "copy")
    next(directory.glob("*.safetensors")).unlink()
    result = CliRunner().invoke(root, ["inspect", str(directory), "--json"])
    assert result.exit_code == 1
    assert "missing: [" in result.output
    assert "convert it again" in result.output
