"""``dsv4_core.load`` and what it gives."""

import doctest
import subprocess
import sys

import numpy as np
import pytest
from dsv4_conformance.model import golden
from recorded import relative, vectors

import dsv4_core as dsv4
from dsv4_core import session
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.registry import create
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.step import Step

CHAT = [{"role": "user", "content": "What is kludge?"}]


@pytest.fixture(scope="module")
def model():
    with dsv4.load(backend="reference") as opened:
        yield opened


@pytest.mark.parametrize("module", [dsv4, session])
def test_documented_examples(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted >= 3
    assert found.failed == 0


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import dsv4_core; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name for name in done.stdout.split() if name.startswith("dsv4")} == {"dsv4_core", "dsv4_core.version"}
    assert "numpy" not in done.stdout


def test_public_names():
    assert set(dsv4.__all__) == set(dir(dsv4))
    for name in dsv4.__all__:
        assert getattr(dsv4, name) is not None
    with pytest.raises(AttributeError, match="module 'dsv4_core' has no attribute 'lod'; it has BackendError"):
        dsv4.lod  # noqa: B018
    namespace = {}
    exec("from dsv4_core import *", namespace)  # noqa: S102
    assert set(dsv4.__all__) <= namespace.keys()


def test_events_add_up_to_the_reply(model):
    events = list(model.generate(CHAT, max_tokens=12))
    reply = model.generate(CHAT, max_tokens=12).run()
    assert [event.token for event in events] == reply.tokens[0]
    assert "".join(event.text for event in events) == reply.texts[0]
    assert model.tokenizer.decode(reply.tokens[0]) == reply.texts[0]
    assert [event.finish for event in events] == [None] * 11 + ["length"]
    assert reply.finish == ["length"]
    assert reply.prefill_seconds > 0
    assert "12 generated" in reply.summary()


def test_ids_and_turns_are_the_same_prompt(model):
    ids = model.encode(CHAT)
    assert model.encode(ids) == model.encode(np.array(ids)) == ids
    replies = [model.generate(prompt, max_tokens=4).run().tokens for prompt in (ids, CHAT, np.array(ids))]
    assert replies == [replies[0]] * 3


def test_a_control_token_that_a_text_spells_is_words(model):
    begin = model.encode(CHAT)[0]
    assert begin not in model.encode("<｜begin▁of▁sentence｜>What is kludge?")


def test_several_prompts_are_one_batch():
    """Each gets what it gets alone, whichever kind it is."""
    with dsv4.load(backend="reference", batch_invariant=True) as opened:
        prompts = ["What is kludge?", [1, 2, 3], CHAT]
        together = opened.generate(prompts, max_tokens=5, temperature=0.8, seed=3).run()
        assert together.prompts == [opened.encode(prompt) for prompt in prompts]
        assert [len(tokens) for tokens in together.tokens] == [5, 5, 5]
        greedy = opened.generate(prompts, max_tokens=5).run()
        assert greedy.tokens == [opened.generate([prompt], max_tokens=5).run().tokens[0] for prompt in prompts]
        assert opened.generate(np.array([[1, 2], [3, 4]]), max_tokens=1).run().prompts == [[1, 2], [3, 4]]


def test_a_stop_text_ends_its_sequence_alone():
    with dsv4.load(backend="reference", batch_invariant=True) as model:  # the second must not see the first end
        prompts = [CHAT, [{"role": "user", "content": "What is a hacker?"}]]
        plain = model.generate(prompts, max_tokens=24).run()
        first, second = plain.texts
        stop = next(first[i : i + 4] for i in range(2, len(first) - 4) if first[i : i + 4] not in second)
        events = list(model.generate(prompts, max_tokens=24, stop=stop))
        assert "".join(event.text for event in events if event.sequence == 0) == first.split(stop)[0]
        assert "".join(event.text for event in events if event.sequence == 1) == second
        assert [event.token for event in events if event.sequence == 1] == plain.tokens[1]
        ends = {event.sequence: event.finish for event in events if event.finish}
        assert ends == {0: "stop", 1: "length"}


def test_stop_tokens_and_end_of_sentence(model):
    tokens = model.generate(CHAT, max_tokens=10).run().tokens[0]
    stopped = model.generate(CHAT, max_tokens=10, stop_tokens=[tokens[2]]).run()
    assert stopped.tokens[0] == tokens[: tokens.index(tokens[2]) + 1]
    assert stopped.finish == ["stop"]


def test_speculation_gives_the_same_tokens():
    with dsv4.load(backend="reference", numerics="float64") as opened:
        prompts = [CHAT, "What is a hacker?"]
        plain, drafted = (
            opened.generate(prompts, max_tokens=8, speculative=s, stop="zzz").run() for s in (False, True)
        )
    assert drafted.tokens == plain.tokens
    assert drafted.drafts.proposed > 0


def test_logits_after_every_token():
    want = vectors("tiny-flash", "golden")
    with dsv4.load(golden.checkpoint_path("tiny-flash"), backend="reference", numerics="float64") as opened:
        got = opened.logits(want["prompt"], chunk=64)
        assert got.shape == (*want["prompt"].shape, 256)
        assert relative(got[:, 299:], want["exact.logits"]) < 3e-6
        one = opened.logits(want["prompt"][0, :40].tolist())
    assert one.shape == (40, 256)
    assert relative(one, got[0, :40]) < 1e-9


def test_a_backend_that_is_made_already():
    made = create("reference", numerics="float32")
    with dsv4.load(backend=made) as opened:
        assert opened.backend is made
    with pytest.raises(ValueError, match="already has its numerics and options"):
        dsv4.load(backend=made, device="cpu")


def test_weights_load_when_they_are_needed(monkeypatch):
    """What is wrong with a request is said before."""
    loads = []
    monkeypatch.setattr(session, "Model", lambda *args, **kwargs: loads.append(args))
    with dsv4.load(backend="reference", lazy=True) as opened:
        for bad in ({"prompt": [2048]}, {"prompt": CHAT, "max_tokens": 5000}, {"prompt": CHAT, "temperature": -1}):
            with pytest.raises(ValueError, match=r"vocabulary|max_position_embeddings|temperature"):
                opened.generate(**bad)
    assert not loads


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "no prompt: give a text"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [[[1]]]}, "the prompt is empty"),
        ({"prompt": [1, 2048]}, r"token id 2048 at \[1\] is outside the vocabulary 0 .. 2047"),
        ({"prompt": [1.5]}, "must be an integer dtype"),
        ({"prompt": [[1], [-1]]}, "prompt 1: token id -1"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens = 0 must be 1 or more"),
        ({"prompt": [1, 2, 3], "max_tokens": 5000}, "3 tokens and max_tokens = 5000; the model has 4096.*at most 4093"),
        ({"prompt": [[1], [1] * 5000]}, "prompt 1: the prompt has 5000 tokens.*shorten it"),
        ({"prompt": "x", "top_p": 0}, r"top_p = 0 must be in \(0, 1\]"),
        ({"prompt": "x", "stop": ["a", ""]}, "an empty text would end"),
        ({"prompt": "x", "stop_tokens": [9999]}, "token id 9999"),
        ({"prompt": "x", "top_k": -1}, "top_k = -1 must be 0"),
        ({"prompt": "x", "min_p": 1.0}, "min_p = 1.0 must be in"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "role"),
    ],
)
def test_requests_that_are_refused(model, request_, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**request_)


def test_logits_of_nothing(model):
    with pytest.raises(ValueError, match=r"must be \[total\] or \[batch, total\], not empty"):
        model.logits([])
    with pytest.raises(ValueError, match="token id 9999"):
        model.logits([[1, 9999]])


def test_models_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        dsv4.load("nowhere")
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        dsv4.load(backend="gpu")
    with pytest.raises(BackendError, match="'reference' has no option 'soc'"):
        dsv4.load(backend="reference", soc=9)
    with pytest.raises(ValueError, match=r"config\.json"):
        dsv4.load(tmp_path, backend="reference")
    with pytest.raises(ValueError, match="--tp 2 --ep 1 needs 2 ranks and 1 was started"):
        dsv4.load(backend="reference", tp=2)


def test_a_model_without_tokenizer():
    with dsv4.load(golden.checkpoint_path("tiny-flash"), backend="reference") as opened:
        assert opened.tokenizer is None
        assert opened.generate([1, 2, 3], max_tokens=2).run().texts == [""]
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            opened.generate("text")
        with pytest.raises(ValueError, match=r"stop: this checkpoint has no tokenizer.json"):
            opened.generate([1], stop="x")


def test_closing_gives_up_the_weights():
    opened = dsv4.load(backend="reference")
    assert "model" in vars(opened)
    opened.close()
    assert "model" not in vars(opened)
    opened.close()


@pytest.mark.parametrize("seq", [1, 4, 300])
def test_a_step_of_no_sequence(model, seq):
    """A rank whose group has no sequence takes part in the experts' exchange with an empty step."""
    step = Step(Cache(model.backend, model.config, 0, 1000), np.zeros((0, seq), np.int64))
    assert step.tokens == 0
    assert model.model.forward(step).shape[0] == 0
