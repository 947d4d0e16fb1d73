"""Speculation: tokens keep the model's distribution whatever drafts, and a drafter is loaded when
it is asked for.
"""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from dsv4_backend_reference import ReferenceBackend

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import create, preset
from dsv4_core.checkpoint.spellings import ConfigError
from dsv4_core.checkpoint.tensors import INDEX
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.graph.engine import Engine, Request
from dsv4_core.graph.model import ALONE
from dsv4_core.graph.sampling import Chosen, Sampling
from dsv4_core.session import load

CONFIG = preset(PRESETS["tiny-dspark"], layers=3, experts=4, ratios=(0, 4, 128), max_position=None, expert_dtype="fp4")


class Table:
    """A model of 8 tokens whose next token depends on the last alone, P[last], and a drafter that
    says Q[last] instead.

    It stands for a model and its DSpark in the engine; the confidence of a draft is a number of the
    token before it.
    """

    VOCAB, BLOCK = 8, 4

    def __init__(self, p, q, sure):
        config = replace(CONFIG, vocab_size=self.VOCAB, dspark_noise_token_id=0, dspark_block_size=self.BLOCK)
        self.config, self.backend, self.parallel = config, ReferenceBackend(numerics="float64"), ALONE
        self.p, self.q, self.sure, self.dspark, self.drafts = np.log(p), np.log(q), sure, self, self.BLOCK
        self.mtp_block = self.embed = self.lm_head = self.head = None
        self.blocks = []

    def forward(self, step, taps=None):
        return np.asarray(step.ids)

    def logits(self, ids):
        return self.p[ids]

    def remember(self, taps, step):
        pass

    def block(self, step):
        return np.zeros((step.tokens, 1)), np.zeros((step.tokens, self.VOCAB))

    def after(self, ids, g):
        return self.q[np.asarray(ids)], self.sure[np.asarray(ids)][:, None]


def transitions(model, sampling, *, requests=1000, tokens=6, confidence=0.0):
    """How often each token followed each, over requests of which each has its seed; the second:
    drafted and accepted.
    """
    counts = np.zeros((model.VOCAB, model.VOCAB))
    engine = Engine(model, slots=50, capacity=32, drafts=model.BLOCK, confidence=confidence, reuse=False)
    for seed in range(requests):
        engine.submit(Request((seed % model.VOCAB,), tokens, replace(sampling, seed=seed)))
    last = {i + 1: i % model.VOCAB for i in range(requests)}
    while not engine.idle:
        for event in engine.step():
            counts[last[event.id], event.chosen.token] += 1
            last[event.id] = event.chosen.token
    return counts, engine.stats


def apart(counts, p):
    """Chi-square of the counts, and the most that it may be: the chance of more is below e^-14
    (Laurent and Massart, 2000).
    """
    total = counts.sum(1, keepdims=True)
    freedom = int((p > 0).sum() - (total > 0).sum())
    assert not counts[p == 0].any()
    wanted = np.where(p > 0, total * p, 1)
    return float(((counts - total * p) ** 2 / wanted).sum()), freedom + 2 * math.sqrt(freedom * 14) + 2 * 14


def small_distributions(agreement):
    rng = np.random.default_rng(7)
    p, other = (rng.dirichlet(np.ones(8), 8) * 0.9 + 0.1 / 8 for _ in range(2))
    return p, agreement * p + (1 - agreement) * other, rng.normal(0, 2, 8)


@pytest.mark.parametrize(
    ("sampling", "agreement", "confidence"),
    [(Sampling(1.0), 0.7, 0.0), (Sampling(1.0, top_p=0.8), 0.7, 0.5), (Sampling(1.0, top_k=5), 0.0, 0.0)],
)
def test_sampled_tokens_have_the_models_distribution_whatever_the_drafter_says(sampling, agreement, confidence):
    p, q, sure = small_distributions(agreement)
    counts, stats = transitions(Table(p, q, sure), sampling, confidence=confidence)
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, 1)
    kept = ranked.cumsum(1) - ranked < sampling.top_p
    if sampling.top_k:
        kept &= np.arange(8) < sampling.top_k
    allowed = np.zeros_like(p)
    np.put_along_axis(allowed, order, np.where(kept, ranked, 0), 1)
    allowed /= allowed.sum(1, keepdims=True)
    found, most = apart(counts, allowed)
    assert found < most
    assert stats.drafted > stats.accepted > 0


def test_the_bound_notices_a_rule_that_is_wrong(monkeypatch):
    """Drafts that are always kept: the text is the drafter's, and the same bound says so."""
    p, q, sure = small_distributions(0.7)

    def kept(self, run, row, seen, choose=Engine._choose):
        line = choose(self, run, row, seen)
        if run.out and len(line) <= len(row.tokens) - 1:
            line[-1] = Chosen(row.tokens[len(line)])
        return line

    monkeypatch.setattr(Engine, "_choose", kept)
    found, most = apart(transitions(Table(p, q, sure), Sampling(1.0))[0], p)
    assert found > most


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same main model with DSpark, with MTP, and a directory that holds nothing but the shards
    of DSpark.
    """
    at = tmp_path_factory.mktemp("models")
    create(at / "dspark", CONFIG, seed=3, shard_size=1 << 20)
    create(at / "mtp", CONFIG.drafting("mtp", 1), seed=3)
    shutil.copytree(at / "dspark", at / "alone")
    index = json.loads((at / "alone" / INDEX).read_text())["weight_map"]
    keep = {file for name, file in index.items() if name.startswith("mtp.")}
    for file in set(index.values()) - keep:
        (at / "alone" / file).unlink()
    return at


def test_what_drafts_is_loaded_when_it_is_asked_for(models):
    with load(models / "dspark", backend="reference") as session:
        plain = session.generate([0, 3, 7], max_tokens=6).run()
        assert session.model.dspark is None
        assert not [name for name in session.ranks.source.read if name.startswith("mtp.")]
        drafted = session.generate([0, 3, 7], max_tokens=6, speculative=2).run()
        assert session.model.dspark is not None
        assert [name for name in session.ranks.source.read if name.startswith("mtp.")]
        assert drafted.drafts.proposed > 0 == plain.drafts.proposed


def test_a_drafter_of_another_directory_drafts_as_its_own_does(models):
    """The shards of the drafter are enough; so the June and August releases' drafters need no
    second main model.
    """
    found = []
    for model, drafter in (("dspark", None), ("mtp", models / "alone")):
        with load(models / model, drafter=drafter, backend="reference") as session:
            assert session.most_drafts == 5
            run = session.generate([0, 3, 7], max_tokens=12, speculative=True).run()
            found.append((run.tokens, run.drafts))
    assert found[0] == found[1]
    with load(models / "dspark", drafter=models / "mtp", backend="reference") as session:
        assert session.config.draft == "mtp"
        assert session.generate([0, 3, 7], max_tokens=12, speculative=True).run().tokens == found[0][0]


def test_drafters_that_cannot_draft_are_refused_before_weights_load(models, tmp_path):
    create(tmp_path / "other", replace(CONFIG, moe_intermediate_size=256), seed=0)
    with pytest.raises(
        ConfigError, match=r"drafts for another model: .* moe_intermediate_size = 256, .* has 128; use the"
    ):
        Checkpoint(models / "dspark", drafter=tmp_path / "other")
    create(tmp_path / "none", CONFIG.drafting(""), seed=0)
    with pytest.raises(ConfigError, match=r"no tensor under mtp\. is there, so that nothing drafts"):
        Checkpoint(models / "dspark", drafter=tmp_path / "none")
    with load(tmp_path / "none", backend="reference", lazy=True) as session:
        with pytest.raises(ValueError, match="has no MTP block and no DSpark drafter"):
            session.load_drafter()
        with pytest.raises(ValueError, match="this checkpoint has neither"):
            session.generate([1], speculative=True)


def test_the_drafter_that_ships_drafts_for_the_embedded_model():
    """Trained: of the first tokens of an answer it proposes some that stand, and changes none."""
    asked = "What is foo?"
    with load(backend="reference", batch_invariant=True) as plain:
        expected = plain.generate(asked, max_tokens=16).run().tokens
    with load(backend="reference", drafter="embedded", batch_invariant=True) as session:
        assert session.most_drafts == 5
        run = session.generate(asked, max_tokens=16, speculative=5).run()
    assert run.tokens == expected
    assert run.drafts.tokens / run.drafts.steps > 1.3
