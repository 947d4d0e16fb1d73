"""Where a model is looked for."""

import shutil

import pytest

from dsv4_core.checkpoint.locate import find_model, hub_cache
from dsv4_core.checkpoint.weights import Checkpoint, embedded

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out: snapshots of links to blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "models--someone--tiny"
    (kept / "blobs").mkdir(parents=True)
    snapshot = kept / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(embedded().iterdir())):
        shutil.copy(file, kept / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    return kept


def test_directories_and_the_embedded_checkpoint(tmp_path):
    assert find_model(None) == embedded()
    assert find_model(tmp_path) == find_model(str(tmp_path)) == tmp_path


def test_a_snapshot_of_the_local_hub_cache(cache):
    found = find_model("someone/tiny")
    assert found == cache / "snapshots" / COMMIT
    assert Checkpoint(found).config == Checkpoint(embedded()).config  # a snapshot's files are links
    assert find_model(f"someone/tiny@{COMMIT}") == find_model("someone/tiny@main") == found


def test_revisions(cache):
    (cache / "snapshots" / OTHER).mkdir()
    assert find_model("someone/tiny").name == COMMIT  # as refs/main says
    assert find_model(f"someone/tiny@{OTHER}").name == OTHER
    with pytest.raises(
        ValueError, match=r"has no revision 'v2', but 0123.*fedc.*hf download someone/tiny --revision v2"
    ):
        find_model("someone/tiny@v2")
    (cache / "refs" / "main").unlink()
    with pytest.raises(ValueError, match="has no revision 'main'"):
        find_model("someone/tiny")
    shutil.rmtree(cache / "snapshots" / OTHER)
    assert find_model("someone/tiny").name == COMMIT  # the only one there is


def test_a_directory_comes_before_a_name(cache, tmp_path, monkeypatch):
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(find_model("someone/tiny")) == "someone/tiny"


def test_what_is_not_there_says_how_to_get_it(cache, tmp_path):
    with pytest.raises(
        ValueError, match=r"deepseek-ai/DeepSeek-V4-Flash: no such directory.*hf download deepseek-ai/DeepSeek-V4"
    ):
        find_model("deepseek-ai/DeepSeek-V4-Flash")
    with pytest.raises(ValueError, match=r"nowhere: no such directory; name one that holds config\.json"):
        find_model("nowhere")
    with pytest.raises(ValueError, match="'flash' is a preset: `dsv4 init DIR --preset flash --seed 0` makes one"):
        find_model("flash")
    with pytest.raises(ValueError, match="a/b/c: no such directory"):
        find_model("a/b/c")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="a single file; give its directory"):
        find_model(file)


@pytest.mark.parametrize(
    ("environment", "where"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/b"}, "/old"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_s_own_tools_have_it(environment, where):
    assert str(hub_cache(environment)) == where
