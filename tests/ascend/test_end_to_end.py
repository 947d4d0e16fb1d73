"""Whole models on simulated CANN, each generation: recorded vectors, MTP, generation, and every
call of the capability table at the published head sizes.
"""

import dataclasses
from functools import partial

import numpy as np
import pytest
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.plan import IMPLEMENTATIONS
from dsv4_conformance.model import golden
from dsv4_conformance.model.checks import LIMIT
from recorded import relative, vectors

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.convert import Options, convert
from dsv4_core.checkpoint.create import create
from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.generate import Drafts, generate, speculate
from dsv4_core.graph.model import Model
from dsv4_core.graph.pages import Pages
from dsv4_core.graph.step import Step

NATIVE = 1.5  # times the recorded native logits' own distance from exact: two native implementations of random weights
SMALL_HEADS = {
    "sparse_attn",
    "index_topk",
    "cached_index_topk",
}  # the recorded models' heads are too small for CANN's attention and indexer


def claimed(generation):
    return {call.name for call in table().claimed(generation) if call.tier == "cann" and not call.departs}


def by_table(generation):
    """Contracts that the table serves on a generation."""
    return {
        op for call in table().calls if call.name in claimed(generation) for op in call.serves
        if not any(op in a.contracts and generation in a.generations and not a.operands for a in table().absent)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tiny-flash", "tiny-pro"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_recorded_models_prefill_decode_and_mtp(generation, name):
    """As near to the exact vectors as the recorded native logits are; the cann tier served what
    these head sizes allow.
    """
    backend = AscendBackend(simulate=generation)
    want = vectors(name, "golden")
    got = teacher_forced(
        Model(Checkpoint(golden.checkpoint_path(name)), backend), want["prompt"], prefill=300, mtp=True
    )
    for what in ("logits", "mtp_logits"):
        theirs = relative(want[f"quantized.{what}"], want[f"exact.{what}"])
        assert relative(got[what], want[f"exact.{what}"]) < NATIVE * theirs
    tiers = {(op, plan.tier) for (op, *_), plan in backend.plans.items()}
    assert {op for op, tier in tiers if tier == "cann"} >= by_table(generation) - SMALL_HEADS - {"linear"}
    assert ("linear", "cann") in tiers or generation != "950"
    assert not backend.drift


@pytest.mark.proof
@pytest.mark.parametrize("numerics", ["float32", "float64"])
@pytest.mark.parametrize("name", ["tiny-flash", "tiny-pro", "tiny-jargon"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_recorded_models_in_the_exact_modes(generation, name, numerics):
    want = vectors(name, "golden")
    model = Model(Checkpoint(golden.checkpoint_path(name)), AscendBackend(simulate=generation, numerics=numerics))
    got = teacher_forced(model, want["prompt"], prefill=300, chunk=127, mtp=True)
    for what in ("logits", "mtp_logits"):
        assert relative(got[what], want[f"exact.{what}"]) < LIMIT[numerics]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_embedded_model_generates_and_speculates_the_recorded_tokens(generation):
    """From the 17th token on no recorded choice was closer than 1.5: two native implementations
    agree on all of them.
    """
    model = Model(Checkpoint(embedded()), AscendBackend(simulate=generation))
    want = vectors("tiny-jargon", "golden")
    tokens, margins = want["quantized.greedy_tokens"][:41], want["quantized.greedy_margins"][:41].astype(float)
    first = 17
    assert margins[first:].min() > 1.5
    prompt = [*want["chat_prompt"].tolist(), *tokens[:first].tolist()]
    count = len(tokens) - first
    assert [step[0] for step in generate(model, [prompt], max_tokens=count)] == tokens[first:].tolist()
    model.backend.kernels_ran()
    drafts = Drafts()
    assert list(speculate(model, prompt, max_tokens=count, drafts=drafts)) == tokens[first:].tolist()
    assert drafts.accepted > 0
    assert set(model.backend.kernels_ran()) >= {"rms_norm", "swiglu", "init_routing", "unpermute"}


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory):
    """Checkpoints with the published head sizes, MTP, everything else small: as published, W8A8,
    and in BF16.
    """
    config = dataclasses.replace(
        PRESETS["flash"], vocab_size=256, hidden_size=256, num_hidden_layers=3, q_lora_rank=128, o_lora_rank=32,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1, index_topk=16,
        num_nextn_predict_layers=1, compress_ratios=(0, 4, 128, 0),
    )  # fmt: skip
    assert (config.head_dim, config.num_attention_heads) == (512, 64)
    assert (config.index_n_heads, config.index_head_dim) == (64, 128)
    folder = tmp_path_factory.mktemp("checkpoints")
    create(folder / "published", config, seed=1)
    convert(folder / "published", folder / "w8a8", Options(int8=True))
    convert(folder / "published", folder / "bf16", Options(bf16=True))
    # 48 keys, three blocks of the indexer; on some prompts one near-tie of experts or rows turns
    # two native implementations apart
    ids = np.random.default_rng(2).integers(2, 256, (1, 192)).astype(np.int32)
    return folder, ids


def run(path, backend, ids):
    return teacher_forced(Model(Checkpoint(path), backend), ids, prefill=190, mtp=True)


@pytest.fixture(scope="module")
def wide_exact(wide_heads):
    from dsv4_backend_torch.backend import TorchBackend

    folder, ids = wide_heads
    return {
        numerics: run(folder / "published", TorchBackend(numerics=numerics), ids) for numerics in ("native", "float32")
    }


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_call_of_the_table_runs_at_the_published_head_sizes(wide_heads, wide_exact, generation):
    """Each contract that the table claims runs in the cann tier, always; together the copies reach
    every call.
    """
    folder, ids = wide_heads
    reached = set()
    for form in ("published", "bf16", *(("w8a8",) if generation != "950" else ())):
        backend = AscendBackend(simulate=generation, expand_bytes=1 << 20)
        got = run(folder / form, backend, ids)
        reached |= set(backend.kernels_ran())
        composed = {op for (op, *_), plan in backend.plans.items() if plan.tier == "composed"}
        # plain products are aten::matmul, and so are those of weights that 910B and 910C expand
        assert (composed - {"linear"}) & set(IMPLEMENTATIONS["cann"]) == set(IMPLEMENTATIONS["cann"]) - by_table(
            generation
        )
        if form == "published":
            for what in ("logits", "mtp_logits"):
                native, exact = wide_exact["native"][what], wide_exact["float32"][what]
                assert relative(got[what], exact) < 1.1 * relative(native, exact)
    # FP8 experts are the Base checkpoints': the self-test multiplies by them
    assert reached == claimed(generation) - {"experts_mx"}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_composed_tier_is_the_same_model(wide_heads, wide_exact, generation):
    folder, ids = wide_heads
    backend = AscendBackend(simulate=generation, tier="composed")
    backend.chip.calls.clear()
    got = run(folder / "published", backend, ids)
    assert not backend.chip.calls
    native, exact = wide_exact["native"]["logits"], wide_exact["float32"]["logits"]
    assert relative(got["logits"], exact) < 1.1 * relative(native, exact)


def decoded(model, cache, ids):
    """Logits of a prompt's last tokens, fed one by one."""
    parts = []
    for begin, end in ((0, 186), *((i, i + 1) for i in range(186, 192))):
        if isinstance(cache, Pages):
            cache.place(np.array([[3, 1]]), [begin])
        step = Step(cache, ids[:, begin:end], [0])
        parts.append(model.backend.to_numpy(model.logits(model.forward(step)))[-1])
        cache.advance(step.sequences, step.ends)
    return np.stack(parts)


@pytest.mark.parametrize("paged", [False, True])
def test_keys_are_read_where_they_lie_with_the_same_result(wide_heads, paged):
    """In the cache of a sequence and in pages; ``composed`` gathers them first."""
    folder, ids = wide_heads
    found, ran = [], []
    for options in ({}, {"composed": "cached_index_topk"}):
        backend = AscendBackend(simulate="910C", **options)
        model = Model(Checkpoint(folder / "published"), backend)
        pages = partial(Pages, backend, model.config, page=128, pages=5)
        cache = pages(sequences=1, capacity=192) if paged else Cache(backend, model.config, 1, 192)
        found.append(decoded(model, cache, ids))
        ran.append({plan.tier for (op, *_), plan in backend.plans.items() if op == "cached_index_topk"})
    assert ran == [{"cann"}, {"composed"}]
    assert np.array_equal(*found)
