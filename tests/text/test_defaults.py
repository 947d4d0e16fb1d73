"""``generation_config.json``: what a checkpoint asks for where a request says nothing."""

import json

import pytest
from click.testing import CliRunner
from rewriting import small

from dsv4_core import cli
from dsv4_core.files.reading import FileError
from dsv4_core.session import load
from dsv4_core.text.defaults import Defaults, defaults


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small(tmp_path_factory.mktemp("defaults") / "model")


def asks(model, values):
    (model / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "temperature", "top_p", "ends"),
    [
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.95, "eos_token_id": 1}, 1.0, 0.95, {1}),
        ({"do_sample": True}, 1.0, 1.0, {1}),
        ({"temperature": 0.6}, 0.6, 1.0, {1}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.5}, 0.0, 1.0, {1}),
        ({"eos_token_id": [1, 7]}, 0.0, 1.0, {1, 7}),
        ({"transformers_version": "5.24.0", "unknown": [1]}, 0.0, 1.0, {1}),
    ],
)
def test_what_it_asks_for(model, values, temperature, top_p, ends):
    asks(model, values)
    with load(model, backend="reference", lazy=True) as session:
        found = defaults(model, session.config)
        assert found == Defaults(
            temperature, top_p, frozenset(ends), said="temperature" in values or "do_sample" in values
        )
        run = session.generate([0, 3])
        assert (run._sampling.temperature, run._sampling.top_p, run._ends) == (temperature, top_p, ends)
        own = session.generate([0, 3], temperature=0.3, top_p=0.7)
        assert (own._sampling.temperature, own._sampling.top_p) == (0.3, 0.7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"temperature": -1}', "temperature = -1 must be"),
        ('{"top_p": 0}', "top_p = 0 must be"),
        ('{"eos_token_id": "</s>"}', "eos_token_id = '</s>' must be"),
        ("[", "generation_config.json"),
    ],
)
def test_what_is_none_is_named_before_weights_load(model, text, said):
    (model / "generation_config.json").write_text(text)
    with pytest.raises(FileError, match=said):
        load(model, backend="reference", lazy=True)


def test_generate_says_so_and_can_be_told_otherwise(model):
    asks(model, {"do_sample": True, "temperature": 1.0, "top_p": 0.95})
    asked = ["generate", str(model), "--tokens", "0,3", "-n", "2", "-b", "reference"]
    said = "sampling as generation_config.json asks (temperature 1, top-p 0.95)"
    assert said in CliRunner().invoke(cli.root, asked).stderr
    assert (
        "generation_config" not in CliRunner().invoke(cli.root, [*asked, "--temperature", "0", "--top-p", "1"]).stderr
    )
