"""DSpark: against an oracle in plain NumPy that shares no code with the graph, and the laws of
speculation.
"""

import numpy as np
import pytest
from dsv4_backend_reference import ReferenceBackend

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import create, preset
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.graph.batch import Batch
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.engine import Engine, Request
from dsv4_core.graph.generate import Drafts, generate, speculate
from dsv4_core.graph.model import Model
from dsv4_core.graph.sampling import GREEDY, Sampling
from dsv4_core.graph.step import Step

CONFIG = preset(PRESETS["tiny-dspark"], layers=3, experts=4, ratios=(0, 4, 128), max_position=None, expert_dtype="fp4")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dspark") / "model"
    create(path, CONFIG, seed=3)
    return path


def load(path, numerics="float64", **options):
    return Model(Checkpoint(path), ReferenceBackend(numerics=numerics, **options))


@pytest.fixture(scope="module")
def exact(path):
    return load(path)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


class Oracle:
    """The drafter's definition, in float64, token by token."""

    def __init__(self, path):
        self.checkpoint, self.c = Checkpoint(path), CONFIG
        half = np.arange(CONFIG.qk_rope_head_dim // 2)
        self.freqs = (CONFIG.rope_theta ** (-2.0 * half / CONFIG.qk_rope_head_dim)).astype(np.float32)

    def w(self, name):
        weight = self.checkpoint.weight(name)
        return np.asarray(weight.dequantise() if isinstance(weight, ScaledArray) else weight, np.float64)

    def a(self, name):
        return np.asarray(self.checkpoint.array(name), np.float64)

    def norm(self, x, weight=None):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c.rms_norm_eps)
        return y if weight is None else y * weight

    def rope(self, x, position, sign=1):
        r = self.c.qk_rope_head_dim
        angle = (np.float32(position) * self.freqs).astype(np.float32).astype(np.float64)
        even, odd = x[..., -r::2], x[..., -r + 1 :: 2]
        out = x.copy()
        out[..., -r::2] = even * np.cos(angle) - sign * odd * np.sin(angle)
        out[..., -r + 1 :: 2] = odd * np.cos(angle) + sign * even * np.sin(angle)
        return out

    def row(self, at, x, position):
        return self.rope(self.norm(x @ self.w(f"{at}.attn.wkv").T, self.w(f"{at}.attn.kv_norm")), position)

    def context(self, stage, streams, position):
        """Of one token: its streams after each target layer [3, hc, D]."""
        u = np.concatenate([h.mean(0) for h in streams])
        x = self.norm(u @ self.w("mtp.0.main_proj").T, self.w("mtp.0.main_norm"))
        return self.row(f"mtp.{stage}", x, position)

    def mixes(self, h, prefix):
        x = h.reshape(-1)
        return (self.a(f"{prefix}_fn") @ x) / np.sqrt((x * x).mean() + self.c.rms_norm_eps)

    def hyper(self, at, half, h, sub):
        """One sub-layer between its hyper-connections, for all rows of the block at once where it
        attends.
        """
        hc, eps = self.c.hc_mult, self.c.hc_eps
        scale, base = self.a(f"{at}.hc_{half}_scale"), self.a(f"{at}.hc_{half}_base")
        pres, posts, combs = [], [], []
        for row in h:
            m = self.mixes(row, f"{at}.hc_{half}")
            sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
            pres.append(sigmoid(m[:hc] * scale[0] + base[:hc]) + eps)
            posts.append(2 * sigmoid(m[hc : 2 * hc] * scale[1] + base[hc : 2 * hc]))
            raw = np.exp(m[2 * hc :].reshape(hc, hc) * scale[2] + base[2 * hc :].reshape(hc, hc))
            comb = raw / raw.sum(1, keepdims=True) + eps
            comb = comb / (comb.sum(0, keepdims=True) + eps)
            for _ in range(self.c.hc_sinkhorn_iters - 1):
                comb = comb / (comb.sum(1, keepdims=True) + eps)
                comb = comb / (comb.sum(0, keepdims=True) + eps)
            combs.append(comb)
        x = np.stack([self.norm(p @ row, self.w(f"{at}.{half}_norm")) for p, row in zip(pres, h, strict=True)])
        y = sub(x)
        return np.stack(
            [np.outer(post, out) + comb.T @ row for post, out, comb, row in zip(posts, y, combs, h, strict=True)]
        )

    def attention(self, at, x, rows, first):
        c, d = self.c, self.c.head_dim
        keys = np.stack([*rows, *(self.row(at, v, first + i) for i, v in enumerate(x))])
        sink, out = self.a(f"{at}.attn.attn_sink"), []
        for i, v in enumerate(x):
            q = self.norm(v @ self.w(f"{at}.attn.wq_a").T, self.w(f"{at}.attn.q_norm")) @ self.w(f"{at}.attn.wq_b").T
            q = self.rope(self.norm(q.reshape(-1, d)), first + i)
            s = np.exp(q @ keys.T * d**-0.5)
            o = self.rope(s @ keys / (s.sum(1) + np.exp(sink))[:, None], first + i, sign=-1)
            groups = o.reshape(c.o_groups, -1)
            wo_a = self.w(f"{at}.attn.wo_a").reshape(c.o_groups, c.o_lora_rank, -1)
            low = np.concatenate([a @ g for a, g in zip(wo_a, groups, strict=True)])
            out.append(low @ self.w(f"{at}.attn.wo_b").T)
        return np.stack(out)

    def expert(self, at, x, weight=1.0):
        limit = self.c.swiglu_limit
        g = np.minimum(x @ self.w(f"{at}.w1").T, limit)
        u = np.clip(x @ self.w(f"{at}.w3").T, -limit, limit)
        return (g / (1 + np.exp(-g)) * u * weight) @ self.w(f"{at}.w2").T

    def moe(self, at, x):
        out = []
        for v in x:
            scores = np.sqrt(np.log1p(np.exp(v @ self.w(f"{at}.ffn.gate").T)))
            chosen = np.argsort(-(scores + self.a(f"{at}.ffn.gate.bias")), kind="stable")[: self.c.num_experts_per_tok]
            weights = scores[chosen] / scores[chosen].sum() * self.c.routed_scaling_factor
            routed = [self.expert(f"{at}.ffn.experts.{e}", v, w) for e, w in zip(chosen, weights, strict=True)]
            out.append(sum(routed) + self.expert(f"{at}.ffn.shared_experts", v))
        return np.stack(out)

    def draft(self, anchor, streams):
        """Drafts, logits and confidences; ``streams`` [3, n, hc, D] of the n tokens that were
        processed.
        """
        c, n = self.c, streams.shape[1]
        block = [anchor] + [c.dspark_noise_token_id] * (c.dspark_block_size - 1)
        h = np.repeat(self.w("embed")[block][:, None], c.hc_mult, axis=1)
        for s in range(3):
            at = f"mtp.{s}"
            rows = [self.context(s, streams[:, t], t) for t in range(max(0, n - c.sliding_window), n)]
            h = self.hyper(at, "attn", h, lambda x, at=at, rows=rows: self.attention(at, x, rows, n))
            h = self.hyper(at, "ffn", h, lambda x, at=at: self.moe(at, x))
        drafts, logits, sure, last = [], [], [], anchor
        for row in h:
            pre = self.mixes(row, "mtp.2.hc_head") * self.a("mtp.2.hc_head_scale") + self.a("mtp.2.hc_head_base")
            g = (1 / (1 + np.exp(-pre)) + c.hc_eps) @ row
            e = self.w("mtp.2.markov_head.markov_w1")[last]
            logit = self.norm(g, self.w("mtp.2.norm")) @ self.w("head").T + self.w("mtp.2.markov_head.markov_w2") @ e
            sure.append(1 / (1 + np.exp(-(self.w("mtp.2.confidence_head.proj") @ np.concatenate([g, e])))[0]))
            logits.append(logit)
            last = int(logit.argmax())
            drafts.append(last)
        return drafts, np.array(logits), np.array(sure)


class Watched(Model):
    """Keeps the streams after each target layer."""

    def block(self, block, h, step):
        h = super().block(block, h, step)
        if block.index in CONFIG.dspark_target_layer_ids:
            self.seen.append(np.asarray(h, np.float64))
        return h


@pytest.mark.parametrize("length", [1, 3, 64, 90])
@pytest.mark.parametrize(("numerics", "tolerance"), [("float64", 1e-9), ("float32", 1e-6)])
def test_logits_and_confidences_against_the_oracle(path, length, numerics, tolerance):
    """float64 differs by the mean's weights, a float32 unit; 1e-6 is float32's after three blocks,
    relative to the largest.
    """
    model = Watched(Checkpoint(path), ReferenceBackend(numerics=numerics))
    model.seen, taps = [], []
    *ids, anchor = prompt(length + 1)
    cache = Cache(model.backend, CONFIG, 1, 256)
    step = Step(cache, np.array([ids]))
    model.forward(step, taps)
    model.dspark.remember(taps, step)
    drafts, logits, sure = Oracle(path).draft(anchor, np.stack(model.seen[:3]))
    block = np.full((1, 5), CONFIG.dspark_noise_token_id)
    block[0, 0] = anchor
    g, base = model.dspark.block(block_step(cache, block, np.zeros(1, int), np.array([length])))
    for k, last in enumerate([anchor, *drafts[:-1]]):
        added, raw = model.dspark.after(np.array([last], np.int32), g[k : k + 1])
        found = np.asarray(base[k] + added[0], np.float64)
        assert np.abs(found - logits[k]).max() < max(tolerance, 1e-7) * np.abs(logits[k]).max()
        assert abs(1 / (1 + np.exp(-float(raw[0, 0]))) - sure[k]) < max(tolerance, 1e-7)
        assert int(found.argmax()) == drafts[k]


class Random:
    """Any drafter: random tokens, now and then the right ones."""

    def __init__(self, right, seed):
        self.right, self.rng = right, np.random.default_rng(seed)

    def __call__(self, batch, rows, outcome, chosen, wishes):
        lines = []
        for row, line, wish in zip(rows, chosen, wishes, strict=True):
            count = len(wish.uniform) if line and wish else 0
            at = int(outcome.step.starts[0]) + len((*row.following, *line)[: len(row.tokens)]) + 1
            true = [self.right[at + k] if at + k < len(self.right) else 0 for k in range(count)]
            wrong = self.rng.integers(0, CONFIG.vocab_size, count).tolist()
            upto = int(self.rng.integers(0, count + 1))
            lines.append([*true[:upto], *wrong[upto:]])
        return lines


def state(cache):
    """What decoding reads of a cache that holds ``length`` tokens: rows that later steps may see,
    by position.
    """
    length, c = int(cache.lengths[0]), cache.config
    found = {}
    for i, layer in enumerate(cache.layers[: c.num_hidden_layers]):
        back = [t % cache.ring_rows for t in range(max(0, length - c.sliding_window + 1), length)]
        found[i, "ring"] = np.asarray(layer.ring)[back]
        if layer.ratio:
            rows, span = length // layer.ratio, 2 * layer.ratio if layer.ratio == 4 else layer.ratio
            held = [t % cache.state_rows(layer.ratio) for t in range(max(0, length - span + 1), length)]
            found[i, "rows"] = np.asarray(layer.rows)[:rows]
            found[i, "state"] = np.asarray(layer.state)[held]
        if layer.ratio == 4:
            found[i, "keys"] = np.asarray(layer.keys)[:rows]
            found[i, "key_state"] = np.asarray(layer.key_state)[held]
    return found


def run(model, ids, tokens, *, drafts=0, sampling=GREEDY, stop=()):
    engine = Engine(model, slots=1, capacity=len(ids) + tokens + 1, drafts=drafts, reuse=False)
    engine.submit(Request(tuple(ids), tokens, sampling, frozenset(stop)))
    out = []
    while not engine.idle:
        out += [event.chosen.token for event in engine.step() if event.chosen]
    return out, engine


def check_any_drafter(model, monkeypatch, *, lengths, counts, tokens, sampling=GREEDY):
    drafted = accepted = 0
    for length in lengths:
        ids = prompt(length, length)
        plain, before = run(model, ids, tokens, sampling=sampling)
        for count in counts:
            random = Random([*ids, *plain], length)
            with monkeypatch.context() as patch:
                patch.setattr(Batch, "drafts", lambda *args, random=random: random(*args))
                found, engine = run(model, ids, tokens, drafts=count, sampling=sampling)
            assert found == plain, (length, count)
            drafted, accepted = drafted + engine.stats.drafted, accepted + engine.stats.accepted
            a, b = state(before.cache), state(engine.cache)
            short = min(int(before.cache.lengths[0]), int(engine.cache.lengths[0]))
            if int(before.cache.lengths[0]) == int(engine.cache.lengths[0]) == short:
                assert all(np.array_equal(a[key], b[key]) for key in a), (length, count)
    assert drafted > accepted > 0  # both ways of ending a step were taken


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 0.95, seed=4)])
def test_any_drafter_leaves_tokens_and_caches_as_plain_decoding_does(path, monkeypatch, sampling):
    """Bit for bit in batch-invariant mode; at every length mod 4 and mod 128 in the proof below."""
    model = load(path, "native", batch_invariant=True)
    check_any_drafter(model, monkeypatch, lengths=(1, 3, 126), counts=(2, 5), tokens=12, sampling=sampling)


@pytest.mark.proof
def test_any_drafter_at_every_length_mod_128(path, monkeypatch):
    model = load(path, "native", batch_invariant=True)
    check_any_drafter(model, monkeypatch, lengths=range(64, 192), counts=(1, 2, 3, 4, 5), tokens=8)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_dspark_decodes_the_greedy_tokens(path, count):
    model = load(path, "native", batch_invariant=True)
    ids, drafts = prompt(70), Drafts()
    plain = [step[0] for step in generate(model, [ids], max_tokens=24)]
    assert list(speculate(model, ids, max_tokens=24, count=count, drafts=drafts)) == plain
    assert drafts.proposed > 0
    assert drafts.tokens == 24
    assert drafts.tokens == drafts.steps + drafts.accepted


def test_confidence_cuts_and_sampling_stays(path):
    model, ids = load(path, "native", batch_invariant=True), prompt(9)
    sampling = Sampling(0.8, 0.9, seed=5)
    plain = [step[0] for step in generate(model, [ids], max_tokens=16, sampling=sampling)]
    proposed = []
    for confidence in (0.0, 0.3, 0.999):
        drafts = Drafts()
        found = list(speculate(model, ids, max_tokens=16, sampling=sampling, confidence=confidence, drafts=drafts))
        assert found == plain
        proposed.append(drafts.proposed)
    assert proposed[0] > proposed[1] > proposed[2]


def test_batches_draft_each_for_itself(path):
    model = load(path, "native", batch_invariant=True)
    prompts = [prompt(n, n) for n in (3, 40, 66)]
    alone = [run(model, ids, 12, drafts=5)[0] for ids in prompts]
    engine = Engine(model, slots=2, capacity=100, drafts=5)
    order = [engine.submit(Request(tuple(ids), 12)) for ids in prompts]
    out = {i: [] for i in order}
    while not engine.idle:
        for event in engine.step():
            if event.chosen:
                out[event.id].append(event.chosen.token)
    assert [out[i] for i in order] == alone


def test_too_many_drafts_and_models_without(path):
    with pytest.raises(ValueError, match="drafts = 6: the drafter of this checkpoint proposes 1 to 5"):
        next(speculate(load(path), [1], max_tokens=2, count=6))
    without = Model(Checkpoint(path), ReferenceBackend(), draft=False)
    with pytest.raises(ValueError, match="no MTP block and no DSpark drafter"):
        next(speculate(without, [1], max_tokens=2))
