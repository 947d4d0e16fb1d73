"""The engine's edges: what is refused, what a failure harms, what is reported. Its laws are the
suite's.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import load_model

from dsv4_core.contract.choosing import log_softmax
from dsv4_core.graph.batch import _rectangles
from dsv4_core.graph.cache import Cache, CacheError
from dsv4_core.graph.engine import BusyError, Engine, Request
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.generate import generate
from dsv4_core.graph.sampling import Sampling, choice, drawn, packed_bits
from dsv4_core.graph.step import Step


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-flash", "float64")


def finished(engine, *, until=lambda: False, tokens=None):
    """Run until idle; give each request's tokens, and how it ended."""
    tokens, ends = {} if tokens is None else tokens, {}
    while not engine.idle and not until():
        for event in engine.step():
            if event.chosen:
                tokens.setdefault(event.id, []).append(event.chosen.token)
            if event.finish:
                ends[event.id] = event
    return tokens, ends


def prompt(seed, length):
    return tuple(np.random.default_rng(seed).integers(2, 200, length).tolist())


def alone(model, request):
    engine = Engine(model, slots=1, capacity=512, reuse=False)
    engine.submit(request)
    return finished(engine)[0][1]


def test_what_is_refused_changes_nothing(model):
    engine = Engine(model, slots=1, capacity=20, queue=1)
    for request, error, message in (
        (Request((), 1), ValueError, "a prompt needs at least one token"),
        (Request((1, 10**6), 1), ValueError, "outside the vocabulary"),
        (Request((1,), 0), ValueError, "max_tokens = 0 must be 1 or more"),
        (Request((1,) * 15, 7), CacheError, "15 prompt tokens and 7 to generate; a sequence has room for 20"),
        (Request((1,), 1, Sampling(bias={10**6: 1.0})), ValueError, "bias: token id 1000000 is outside"),
    ):
        with pytest.raises(error, match=message):
            engine.submit(request)
    assert engine.idle
    for _ in range(2):
        engine.submit(Request((1, 2), 3))
    with pytest.raises(BusyError, match="2 requests wait, and 1 may"):
        engine.submit(Request((1, 2), 3))
    assert len(finished(engine)[0]) == 2
    engine.submit(Request((1,) * 15, 6))  # 15 + 6 - 1 rows
    assert engine.step()
    for options, message in (({"slots": 0}, "slots = 0"), ({"budget": 0}, "budget = 0"), ({"chunk": -1}, "chunk = -1")):
        with pytest.raises(ValueError, match=message):
            Engine(model, **{"slots": 1, "capacity": 20, **options})


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 1}, "min_p = 1"),
        ({"presence_penalty": 3}, "presence_penalty = 3"),
        ({"frequency_penalty": -2.5}, "frequency_penalty = -2.5"),
        ({"bias": {1: 101}}, "a bias must be in"),
        ({"logprobs": 21}, r"logprobs = 21 must be in 0 \.\. 20"),
    ],
)
def test_wishes_out_of_range(wish, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wish)


def test_cancel_waiting_and_running(model):
    other = Request(prompt(1, 30), 8)
    engine = Engine(model, slots=2, capacity=64, chunk=16)
    first, kept, waits = engine.submit(Request(prompt(2, 30), 30)), engine.submit(other), engine.submit(other)
    tokens, ends = finished(engine, until=lambda: engine.stats.steps >= 2)
    engine.cancel(waits)
    engine.cancel(first)
    engine.cancel(first)  # over: no error
    engine.cancel(99)
    assert engine.stats.free == 1
    _, ends = finished(engine, tokens=tokens)
    assert tokens[kept] == alone(model, other)
    assert {i: e.finish for i, e in ends.items()} == {first: "cancelled", waits: "cancelled", kept: "length"}
    assert engine.stats.free == 2


class Failing:
    """Stands in for ``Model.forward``: fails where a token is fed."""

    def __init__(self, model, token):
        self.forward, self.backend, self.token = model.forward, model.backend, token

    def __call__(self, step):
        if self.token in self.backend.to_numpy(step.ids).tolist():
            raise RuntimeError("the device hiccups")
        return self.forward(step)


def test_a_failure_ends_the_request_that_it_follows_and_no_other(model, monkeypatch):
    good, bad = Request(prompt(3, 20), 12), Request(prompt(4, 20), 12)
    token = alone(model, bad)[3]
    assert token not in {*good.prompt, *bad.prompt, *alone(model, good), *alone(model, bad)[:3]}
    expected = alone(model, good)
    monkeypatch.setattr(model, "forward", Failing(model, token))
    engine = Engine(model, slots=2, capacity=64)
    ids = [engine.submit(good), engine.submit(bad)]
    tokens, ends = finished(engine)
    assert tokens[ids[0]] == expected
    assert ends[ids[1]].finish == "error"
    assert str(ends[ids[1]].error) == "the device hiccups"
    assert engine.stats.free == 2
    with pytest.raises(RuntimeError, match="the device hiccups"):
        list(generate(model, [bad.prompt], max_tokens=12))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as NumPy says of NaN
@pytest.mark.parametrize("wish", [{}, {"temperature": 1.0}, {"top_k": 3}, {"logprobs": 2}])
def test_logits_that_are_no_numbers_end_their_request_and_leave_nothing(model, monkeypatch, wish):
    """A NaN in one token's embedding: its request ends with an error, its neighbour and whoever
    comes into its slot next have the tokens that they have alone.
    """
    good, bad = Request(prompt(3, 20), 12), Request((*prompt(4, 150), 201), 12, Sampling(**wish))
    expected, embedding = alone(model, good), model.embedding
    monkeypatch.setattr(
        model, "embedding", lambda ids: np.where((np.asarray(ids) == 201)[:, None], np.nan, embedding(ids))
    )
    engine = Engine(model, slots=2, capacity=256, reuse=False)
    ids = [engine.submit(request) for request in (good, bad, good, good)]
    tokens, ends = finished(engine)
    assert [tokens[i] for i in (ids[0], *ids[2:])] == [expected] * 3
    assert ends[ids[1]].finish == "error"
    assert "token 151 cannot be chosen: its logits hold NaN or infinity" in str(ends[ids[1]].error)


def test_log_probabilities_are_the_models(model):
    """Of the prompt, of what was chosen and of the likely ids: as teacher forcing gives them."""
    asked = Request(prompt(5, 50), 6, Sampling(1.0, 0.9, seed=3, logprobs=4), prompt_logprobs=3)
    engine = Engine(model, slots=1, capacity=64, chunk=16)
    engine.submit(asked)
    events = []
    while not engine.idle:
        events += engine.step()
    told, out = events[0].prompt, [e.chosen for e in events]
    text = np.array([[*asked.prompt, *(c.token for c in out)]])
    expected = log_softmax(teacher_forced(model, text, prefill=1)["logits"][0])
    assert told[0] == (None, ())
    for i, (logprob, likely) in enumerate([*told[1:], *((c.logprob, c.likely) for c in out)]):
        np.testing.assert_allclose(logprob, expected[i, text[0, i + 1]], atol=1e-9)
        assert len(likely) == (3 if i + 1 < len(told) else 4)
        assert [t for t, _ in likely] == np.argsort(-expected[i], kind="stable")[: len(likely)].tolist()
    assert all(e.prompt is None for e in events[1:])


def test_the_hosts_choice_is_the_ops(model):
    """The same rule as ``sample``, on logits without ties, for any temperature, top-p and draw."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        logits = rng.normal(size=(1, 50)) * 3
        wish = Sampling(float(rng.choice([0, 0.3, 1, 2])), float(rng.choice([0.1, 0.5, 0.9, 1])))
        uniform = np.array([rng.random()])
        op = model.backend.sample(logits, uniform, temperature=wish.temperature, top_p=wish.top_p)
        assert drawn(logits[0], choice(wish, float(uniform[0]), {})) == op[0]


def test_a_step_chooses_in_two_calls(model, monkeypatch):
    """Greedy rows in one, all others in another, whatever each of them wishes; what is told is what
    is told alone.
    """
    wishes = [
        Sampling(),
        Sampling(),
        Sampling(0.7, 0.9, seed=1),
        Sampling(1.3, seed=2, top_k=5, logprobs=2),
        Sampling(presence_penalty=1.0, bias={3: 2.0}, logprobs=20),
    ]
    asked = [Request(prompt(20 + i, 30), 6, wish) for i, wish in enumerate(wishes)]
    expected = [alone(model, request) for request in asked]
    calls = []
    for op in ("sample", "sample_each"):
        right = getattr(model.backend, op)
        monkeypatch.setattr(
            model.backend, op, lambda *a, _op=op, _right=right, **k: calls.append(_op) or _right(*a, **k)
        )
    engine = Engine(model, slots=5, capacity=64, reuse=False)
    names = [engine.submit(request) for request in asked]
    tokens, _ = finished(engine)
    assert [tokens[name] for name in names] == expected
    assert calls == ["sample", "sample_each"] * 6


class AllowsNothing:
    """A constraint that no token satisfies once two were said."""

    def __init__(self, vocab):
        self.vocab, self.said = vocab, 0

    def free(self):
        return 0

    def allowed(self):
        return packed_bits(range(self.vocab) if self.said < 2 else [], self.vocab)

    def accept(self, token):
        self.said += 1


def test_a_constraint_that_allows_nothing_ends_its_request_alone(model):
    engine = Engine(model, slots=2, capacity=64)
    stuck = engine.submit(Request(prompt(6, 20), 10, constraint=AllowsNothing(model.config.vocab_size)))
    other = engine.submit(Request(prompt(7, 20), 10))
    steps = []
    while not engine.idle:
        steps.append(engine.step())
    assert all(any(event.id == other for event in events) for events in steps)  # a token a step, the third too
    told = {name: [e for events in steps for e in events if e.id == name] for name in (stuck, other)}
    assert [e.finish for e in told[stuck]] == [None, None, "error"]
    assert "allows no token" in str(told[stuck][-1].error)
    assert [e.chosen.token for e in told[other]] == alone(model, Request(prompt(7, 20), 10))
    assert engine.stats.free == 2


def test_what_narrows_a_choice():
    logits = np.log([0.4, 0.3, 0.2, 0.1])

    def support(**wish):
        draws = (np.arange(200) + 0.5) / 200
        generated = wish.pop("generated", {})
        allowed = wish.pop("allowed", None)
        return {drawn(logits, choice(Sampling(1.0, **wish), u, generated, allowed)) for u in draws}

    assert support() == {0, 1, 2, 3}
    assert support(top_k=2) == {0, 1}
    assert support(min_p=0.5) == {0, 1, 2}
    assert support(top_p=0.65) == {0, 1}
    assert support(top_k=3, top_p=0.5) == {0, 1}  # top-k first: 4/9 is below a half
    assert support(bias={3: 100.0}) == {3}
    assert support(allowed=packed_bits([1, 3], 4)) == {1, 3}
    assert drawn(logits, choice(Sampling(presence_penalty=1.0), 0, {0: 1})) == 1
    assert drawn(logits, choice(Sampling(frequency_penalty=0.2), 0, {0: 1})) == 0
    assert drawn(logits, choice(Sampling(frequency_penalty=0.2), 0, {0: 2})) == 1
    with pytest.raises(ValueError, match="allows no token"):
        choice(Sampling(), 0, {}, packed_bits([], 4))


class OnlyEven:
    """A constraint of the tests: even ids, and what it was told."""

    def __init__(self, vocab):
        self.bits, self.told = packed_bits(range(0, vocab, 2), vocab), []

    def free(self):
        return 0

    def allowed(self):
        return self.bits

    def accept(self, token):
        self.told.append(token)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_constraint_is_asked_and_told(model, drafts):
    vocab = model.config.vocab_size
    constraint = OnlyEven(vocab)
    asked = Request(prompt(6, 20), 10, Sampling(1.0, seed=1), constraint=constraint)
    engine = Engine(model, slots=2, capacity=64, drafts=drafts)
    first, other = engine.submit(asked), engine.submit(Request(prompt(7, 20), 10))
    tokens, _ = finished(engine)
    assert tokens[first] == constraint.told
    assert not any(t % 2 for t in tokens[first])
    assert tokens[other] == alone(model, Request(prompt(7, 20), 10))
    everything = OnlyEven(vocab)
    everything.bits = packed_bits(range(vocab), vocab)
    assert alone(model, Request(prompt(7, 20), 10, constraint=everything)) == tokens[other]


def test_a_prefix_is_taken_up(model):
    """From a slot that holds it whole, and from a snapshot while its donor goes on; never a whole
    prompt.
    """
    long = prompt(8, 300)
    engine = Engine(model, slots=3, capacity=512, chunk=64)
    a, b = Request(long, 40), Request((*long[:280], *prompt(9, 30)), 5)
    first = engine.submit(a)
    tokens, _ = finished(engine, until=lambda: engine.stats.generated == 5)
    second = engine.submit(b)
    finished(engine, tokens=tokens)
    assert engine.stats.hit_tokens == 256
    assert tokens == {first: alone(model, a), second: alone(model, b)}
    more = Request((*long, *tokens[first], 7, 8), 5)
    third = engine.submit(more)
    tokens = finished(engine)[0]
    assert engine.stats.hit_tokens == 256 + 300 + 39  # all but the newest token, which was never fed
    assert tokens[third] == alone(model, more)
    again = engine.submit(a)
    assert finished(engine)[0][again] == alone(model, a)


def test_one_prompt_is_read_once_for_all_its_replies(model):
    """Who waits for a prefix that another is reading takes it up; a prompt that shares none, or a
    request for the prompt's own log-probabilities, does not wait for it.
    """
    long = prompt(8, 300)
    asked = [Request(long, 6, Sampling(1.5, seed=(3, i))) for i in range(4)]
    engine = Engine(model, slots=4, capacity=512, chunk=64)
    ids = [engine.submit(request) for request in asked]
    tokens, _ = finished(engine)
    assert engine.stats.hit_tokens == 3 * 256
    assert [tokens[i] for i in ids] == [alone(model, request) for request in asked]
    scored = Engine(model, slots=4, capacity=512, chunk=64)
    for request in (asked[0], Request(long, 2, prompt_logprobs=0), Request(prompt(9, 300), 2)):
        scored.submit(request)
    scored.step()
    assert scored.stats.running == 3
    finished(scored)
    assert scored.stats.hit_tokens == 0
    given_up = Engine(model, slots=4, capacity=512, chunk=64)
    first, second = given_up.submit(asked[0]), given_up.submit(asked[1])
    given_up.step()
    assert given_up.stats.waiting == 1
    given_up.cancel(first)
    tokens, _ = finished(given_up)
    assert tokens[second] == alone(model, asked[1])


@pytest.mark.parametrize("drafts", [False, True])
def test_prompts_that_come_together_are_read_together(model, drafts):
    """In one step, of whatever lengths they are; each is told what it is told alone."""
    lengths = [40, 31, 33, 5, 39, 6, 120]
    asked = [Request(prompt(20 + i, length), 5) for i, length in enumerate(lengths)]
    engine = Engine(model, slots=8, capacity=200, chunk=512, drafts=drafts)
    ids = [engine.submit(request) for request in asked]
    tokens, _ = finished(engine, until=lambda: engine.stats.generated >= len(asked))
    assert engine.stats.steps == 1
    finished(engine, tokens=tokens)
    assert [tokens[i] for i in ids] == [alone(model, request) for request in asked]


def test_nothing_is_padded_to_the_longest(model, monkeypatch):
    """Prompts are read beside replies that are under way, in one pass of the model over their own
    tokens, and each request has the tokens that it has alone.
    """
    requests = [Request(prompt(seed, length), 12) for seed, length in ((1, 9), (2, 70), (3, 31), (4, 150))]
    expected = [alone(model, request) for request in requests]
    engine, passes, forward = Engine(model, slots=4, capacity=200, reuse=False), [], model.forward
    monkeypatch.setattr(model, "forward", lambda step: passes.append(step.tokens) or forward(step))
    events = []
    for request in requests:
        engine.submit(request)
        events += engine.step()
    assert passes == [9, 71, 33, 153]  # each prompt, and a token of each that came before it
    while not engine.idle:
        events += engine.step()
    tokens = [[event.chosen.token for event in events if event.id == i] for i in range(1, 5)]
    assert tokens == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.sampled_from([0, 8]))
def test_rectangles(widths, padding):
    groups = _rectangles(widths, padding)
    assert sorted(i for group in groups for i in group) == list(range(len(widths)))
    for group in groups:
        assert group == sorted(group)
        assert sum(max(widths[i] for i in group) - widths[i] for i in group) <= padding
    if not padding:
        assert len(groups) == len(set(widths))


def test_a_snapshot_is_only_where_windows_are_closed(model):
    cache = Cache(model.backend, model.config, 2, 300, rewindable=0)
    with pytest.raises(CacheError, match="sequence 0 holds 0 tokens; it must be a multiple of 128"):
        cache.snapshot(0)
    step = Step(cache, np.array([prompt(1, 128)]), sequences=[0])
    model.forward(step)
    cache.advance(step.sequences, step.ends)
    taken = cache.snapshot(0)
    cache.rewind(0, 0)
    with pytest.raises(CacheError, match="sequence 0 holds 0 tokens; 128 are needed"):
        cache.restore(1, taken, donor=0)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_step_that_fails_half_way_leaves_prompts_as_they_were(model, monkeypatch, reuse):
    """A device that fails in the last layer, when the rings of the others hold a chunk's tokens
    where older ones were that the chunk reads: it is not read again onto them. Who comes after a
    failure, with the same beginning, is not told by them either.
    """
    good, bad = Request(prompt(3, 400), 20), Request((*prompt(4, 5), 201), 6)
    long = Request((*prompt(3, 260), *prompt(5, 100), 201), 6)
    expected, expected_long, block = alone(model, good), alone(model, long), model.block
    fails = True

    def failing(each, h, step):
        after = block(each, h, step)
        if fails and each.index == len(model.blocks) - 1 and 201 in np.asarray(step.ids):
            raise RuntimeError("the device hiccups")
        return after

    monkeypatch.setattr(model, "block", failing)
    engine = Engine(model, slots=3, capacity=512, chunk=150, reuse=reuse)
    first = engine.submit(good)
    assert engine.step() == []  # a chunk of it is read
    ids = [first, engine.submit(bad)]
    tokens, ends = finished(engine)
    assert (tokens[first], ends[ids[1]].finish) == (expected, "error")
    last = engine.submit(long)
    _, ends = finished(engine)
    assert ends[last].finish == "error"
    fails = False
    ids = [engine.submit(request) for request in (long, good)]
    tokens, _ = finished(engine)
    assert [tokens[i] for i in ids] == [expected_long, expected]
    assert engine.stats.free == 3
