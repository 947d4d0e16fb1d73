"""Which rank holds what: parts that are cut and joined again, rules for what may be cut, and what a
backend is asked at a place.
"""

from dataclasses import replace

import numpy as np
import pytest
from dsv4_conformance.model import golden
from recorded import RECORDED

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.layout import tensor_specs
from dsv4_core.checkpoint.rank_part import Place, ShardedSource, share
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.planning.rank_trace import trace_rank

SPLITS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1)]


def values(weight):
    return weight.dequantise() if isinstance(weight, ScaledArray) else np.float32(weight)


def sources(name, tp, ep):
    checkpoint = Checkpoint(golden.checkpoint_path(name))
    return checkpoint, [ShardedSource(checkpoint, Place(tp, ep, r)) for r in range(tp * ep)]


@pytest.mark.parametrize(("tp", "ep"), SPLITS)
def test_parts_of_a_group_are_the_whole(tp, ep):
    checkpoint, ranks = sources("tiny-pro", tp, ep)
    layer = {"attn.wq_b": 0, "attn.wo_a": 0, "ffn.shared_experts.w1": 0, "ffn.shared_experts.w2": 1, "attn.wo_b": 1}
    axes = {f"layers.2.{name}": axis for name, axis in layer.items()} | {"embed": 0, "head": 0, "layers.2.attn.wkv": 0}
    for stem, axis in axes.items():
        whole = values(checkpoint.weight(stem))
        parts = [values(rank.weight(stem)) for rank in ranks[:tp]]
        if parts[0].shape == whole.shape:
            assert all(np.array_equal(part, whole) for part in parts)
        else:
            assert np.array_equal(np.concatenate(parts, axis), whole), stem
    sinks = [rank.array("layers.0.attn.attn_sink") for rank in ranks[:tp]]
    assert np.array_equal(np.concatenate(sinks), checkpoint.array("layers.0.attn.attn_sink"))


@pytest.mark.parametrize(("tp", "ep"), SPLITS)
def test_every_expert_is_held_once_and_sorted_by_the_rank_it_is_sent_to(tp, ep):
    for count in (tp * ep, 10, 256, 384):
        places = [Place(tp, ep, r) for r in range(tp * ep)]
        held = [e for place in places for e in range(count)[place.experts(count)]]
        assert sorted(held) == list(range(count))
        sizes = [len(range(count)[place.experts(count)]) for place in places]
        assert max(sizes) - min(sizes) <= 1
        for t in range(tp):
            run = [e for p in places if p.t == t for e in range(count)[p.experts(count)]]
            assert run == list(range(run[0], run[-1] + 1))


def test_every_sequence_has_one_group_and_a_lone_one_the_first():
    for ep in (1, 2, 3, 4):
        for batch in range(7):
            held = [b for e in range(ep) for b in range(batch)[Place(1, ep, e).sequences(batch)]]
            assert held == list(range(batch))
    assert range(1)[Place(1, 4, 0).sequences(1)] == range(1)


@pytest.mark.parametrize("name", RECORDED)
def test_shares_add_up(name):
    checkpoint, ranks = sources(name, 2, 2)
    specs = [checkpoint.spec(n) for n in checkpoint.names]
    assert share(checkpoint.config, Place(), specs) == checkpoint.nbytes
    experts = sum(s.end - s.begin for n in checkpoint.names if ".experts." in n for s in [checkpoint.stored(n)])
    held = sum(share(checkpoint.config, r.place, [s for s in specs if ".experts." in s.name]) for r in ranks)
    assert held == experts


@pytest.mark.parametrize(("preset", "tp"), [("flash", 8), ("pro", 16)])
def test_published_models_are_cut_everywhere(preset, tp):
    """At their sizes output projection and shared expert are cut, and no rank reads the same scale
    block partly.
    """
    config, place = PRESETS[preset], Place(tp, 2, 3)
    place.check(config)
    assert place.cuts_output(config)
    specs = tensor_specs(config)
    for name in ("attn.wq_b", "attn.wo_a", "attn.wo_b", "ffn.shared_experts.w1", "ffn.shared_experts.w2"):
        part = place.part(specs[f"layers.3.{name}.weight"], config)
        whole = np.prod(specs[f"layers.3.{name}.weight"].shape)
        left_to_another = "shared" in name and not place.cuts_shared(config)  # Pro's 3072 channels between 16
        assert np.prod(part) == (0 if left_to_another else whole / tp), name


@pytest.mark.parametrize(
    ("change", "tp", "ep", "message"),
    [
        ({}, 4, 1, "--tp 4: o_groups = 2 is not a multiple of it"),
        ({}, 1, 16, "n_routed_experts = 8 is less than 16 ranks"),
        ({"head_dim": 192, "num_attention_heads": 2}, 2, 1, "wq_b would be cut every 192 rows"),
    ],
)
def test_what_cannot_be_cut_is_said_before_weights_load(change, tp, ep, message):
    class Untouchable:
        config = replace(PRESETS["tiny"], **change)

    with pytest.raises(ValueError, match=message):
        ShardedSource(Untouchable(), Place(tp, ep))


@pytest.mark.parametrize("place", [Place(2, 1, 1), Place(1, 2, 1), Place(2, 2, 3)])
def test_a_backend_is_asked_about_the_shapes_of_its_place(place):
    calls = trace_rank(PRESETS["tiny"], registry.create("reference"), place, seq=150, start=0, expert_format="e2m1")
    config = PRESETS["tiny"]
    seen = {call.op: call.operands for call in calls}
    assert seen["sparse_attn"]["q"].shape[1] == config.num_attention_heads // place.tp
    assert seen["embedding"]["weight"].shape[0] == config.vocab_size // place.tp
    assert seen["moe" if "moe" in seen else "expert_linear"]
    assert ("act_quant" in seen) == (place.ep > 1)


def test_identities_tell_checkpoints_apart(tmp_path):
    from dsv4_core.checkpoint import create

    config = replace(PRESETS["tiny"], num_hidden_layers=1, compress_ratios=(0, 0))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        create.create(tmp_path / name, config, seed=seed)
    a, b, c = (Checkpoint(tmp_path / name).identity() for name in "abc")
    assert a == b != c
