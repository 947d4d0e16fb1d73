"""The Triton kernels that `-O prefer=triton` asks for, in the repaired interpreter: the same bits
as PyTorch's operators where a contract leaves no choice, few launches, and each compiled as far as
that goes without CANN.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from dsv4_backend_ascend import selftest, triton
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann.call import RefusedError
from dsv4_backend_ascend.launches import count
from dsv4_backend_ascend.selftest_cases import CASES
from dsv4_backend_torch.backend import TorchBackend
from dsv4_backend_torch.weights import StackedExperts
from test_composed import TestRounding as Rounding
from test_launches import SMALL

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.dtypes import Experts, RowLayout, ScaledArray, quantise_weight

REPORT = Path(__file__).parents[2] / "reports" / "ascend" / "kernels.json"
sys.path.insert(0, str(Path(__file__).parents[2] / "backends" / "ascend" / "tools"))


@pytest.fixture(scope="module")
def portable():
    return TorchBackend(few_tokens_by="torch")


@pytest.fixture(scope="module")
def composed():
    return AscendBackend(simulate="910B")


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("triton")
    return AscendBackend(simulate="910B", prefer="triton")


class TestRounding(Rounding):
    """As PyTorch's operators are tested, to the bit."""


def act(*shape, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * scale).to(torch.bfloat16)


def wide(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [128, 1024, 1536, 7168])
def test_what_a_product_multiplies_is_made_with_the_norm(backend, channels):
    x, weight = act(3, channels), act(channels, seed=2)
    y = backend.rms_norm(x, weight, eps=1e-6)
    kept = backend.kept.result((y, "e4m3"))
    assert torch.equal(kept, backend.act_qdq(y, format="e4m3", block=128, channels=channels))
    assert backend.quantised_activation(y) is kept


def test_what_a_product_multiplies_is_made_with_the_hyper_connection_and_swiglu(backend):
    scalars = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}
    mix = (act(5, 4, 256), wide(24, 1024) * 0.1, wide(3), wide(24))
    y, *_ = backend.hc_pre_norm(*mix, act(256, seed=3), **scalars)
    for made in (y, backend.swiglu(act(5, 1280), act(5, 1280, seed=4), wide(5), limit=10.0)):
        kept = backend.kept.result((made, "e4m3"))
        assert torch.equal(kept, backend.act_qdq(made, format="e4m3", block=128, channels=made.shape[1]))


def test_what_the_indexer_multiplies_is_made_with_the_rotation(backend):
    y = backend.hadamard(act(70, 128))
    kept = backend.act_qdq(y, format="e2m1", block=32, channels=128)
    assert kept is backend.kept.result((y, "e2m1"))
    assert torch.equal(kept, backend.act_qdq(y.clone(), format="e2m1", block=32, channels=128))


@pytest.mark.parametrize(("inter", "dim"), [(128, 256), (64, 64), (96, 160), (2048, 4096)])
def test_experts_are_expanded_to_the_same_bits(backend, composed, inter, dim):
    draw = torch.Generator().manual_seed(inter)

    def stack(out, cols):
        codes = torch.randint(0, 256, (3, out, cols // 2), generator=draw, dtype=torch.uint8)
        scale = torch.randint(90, 140, (3, out, cols // 32), generator=draw, dtype=torch.uint8)
        return ScaledArray(codes, scale, "e2m1")

    stacks = [stack(inter, dim), stack(inter, dim), stack(dim, inter)]
    own = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    got = triton.expanded(backend, stacks, own)
    assert torch.equal(got, composed.expanded(stacks, own))
    for i, one in enumerate(stacks):
        assert torch.equal(
            got[i].reshape(4, -1)[:1],
            composed.dequantise(ScaledArray(one.data[2], one.scale[2], "e2m1"), torch.bfloat16).reshape(1, -1),
        )


def test_experts_without_a_whole_unit_are_left_to_pytorch(backend, composed):
    stacks = [
        ScaledArray(torch.zeros((2, 3, 16), dtype=torch.uint8), torch.full((2, 3, 1), 127, dtype=torch.uint8), "e2m1")
    ] * 3
    with pytest.raises(RefusedError, match="3 groups"):
        triton.expanded(backend, stacks, torch.tensor([1], dtype=torch.int32))
    own = torch.tensor([1], dtype=torch.int32)
    assert torch.equal(backend.expanded(stacks, own), composed.expanded(stacks, own))


@pytest.mark.parametrize("first", [0, 4])
def test_a_token_has_the_same_experts_whoever_expands_them(backend, composed, first):
    def experts(out, cols, seed):
        weights = [quantise_weight(wide(out, cols, seed=seed + i).numpy(), "e2m1") for i in range(8)]
        return Experts(weights)

    plain = [experts(128, 256, 0), experts(128, 256, 20), experts(256, 128, 40)]
    operands = (
        act(3, 256),
        wide(3, 2),
        torch.tensor([[0, 5], [4, 11], [7, 9]], dtype=torch.int32),
        act(3, 256, seed=9),
    )
    scalars = {"first_expert": first, "limit": 10.0, "out_dtype": "bfloat16"}
    got, want = (
        be.moe(*operands, *(StackedExperts(be.stacked_experts(e).stack) for e in plain), **scalars)
        for be in (backend, composed)
    )
    assert "triton:expand" in backend.kernels_ran()
    assert (got.float() - want.float()).abs().max() <= 2.0**-6 * want.float().abs().max()


def test_rows_go_to_their_slots_and_come_back(backend):
    layout = RowLayout("plain", 96)
    cache, rows = torch.zeros(9, 96), wide(4, 96)
    index = torch.tensor([8, -1, 0, 3], dtype=torch.int32)
    assert backend.cache_write(cache, rows, index, layout=layout) is cache
    assert torch.equal(cache[[8, 0, 3]], rows[[0, 2, 3]])
    assert int(cache.count_nonzero()) == 3 * 96
    read = backend.cache_read(cache, torch.tensor([3, -1, 8], dtype=torch.int32), layout=layout)
    assert torch.equal(read, torch.stack([rows[3], torch.zeros(96), rows[0]]))


def test_a_cache_with_gaps_is_left_to_pytorch(backend):
    layout = RowLayout("plain", 8)
    cache = torch.zeros(4, 16, dtype=torch.bfloat16)[:, :8]
    rows, index = torch.ones(1, 8, dtype=torch.bfloat16), torch.tensor([2], dtype=torch.int32)
    backend.cache_write(cache, rows, index, layout=layout)
    assert backend.cache_read(cache, index, layout=layout).tolist() == rows.tolist()
    assert backend.planned("cache_write", (cache, rows, index), {"layout": layout}).tier == "composed"


def test_rows_of_three_origins_are_joined(backend):
    ring, kv, cache = act(6, 64), act(3, 64, seed=1), act(50, 64, seed=2)
    near, far = torch.tensor([5, -1], dtype=torch.int32), torch.tensor([49, 0, -1], dtype=torch.int32)
    zero = torch.zeros(1, 64, dtype=torch.bfloat16)
    got = triton.joined(backend, ring, near, kv, cache, far, zeros=1)
    assert torch.equal(got, torch.cat([ring[5:], zero, kv, cache[49:], cache[:1], zero, zero]))


@pytest.mark.parametrize("cores", [1, 3, 48])
def test_results_do_not_depend_on_the_number_of_cores(composed, cores):
    pytest.importorskip("triton")
    backend = AscendBackend(simulate="910B", prefer="triton")
    backend.vector_cores = cores
    x = act(7, 1024)
    scalars = {"format": "e4m3", "block": 128, "channels": 1024}
    assert torch.equal(backend.act_qdq(x, **scalars), composed.act_qdq(x, **scalars))


def test_the_self_test_asks_the_kernels_and_finds_no_difference(backend):
    cases = [case for case in CASES if case.contract in triton.KERNELS]
    outcomes = list(selftest.run(backend, cases, small=True))
    assert [o for o in outcomes if o.found or o.ops != ("triton",)] == []
    assert {o.contract for o in outcomes} >= {
        "act_qdq",
        "cache_write",
        "cached_compress",
        "hadamard",
        "hc_pre_norm",
        "rms_norm_rope",
    }


@pytest.mark.parametrize(("tier", "most"), [("cann", 6000), ("vendor", 3000)])
@pytest.mark.parametrize("generation", ["910B", "910C"])
def test_a_step_of_flash_has_no_more_launches_than_were_asked_for(generation, tier, most):
    step = count(PRESETS["flash"], generation, tier=tier, start=5000, prefer="triton")
    assert step.launched() < most
    assert step.at("AICPU") == {}
    assert step.at("unknown") == {}


def test_a_kernel_is_one_launch_and_is_not_asked_for_by_itself():
    without, preferred = (count(SMALL, "910B", tier="cann", start=5000, prefer=name) for name in ("", "triton"))
    assert not any(pair.op.startswith("triton") for pair in without.pairs)
    assert (
        sum(n for pair, n in preferred.pairs.items() if pair.op == "triton::rows.write_kernel")
        == preferred.by_contract()["cache_write"]
    )


def test_what_is_composed_by_name_runs_no_kernel(backend):
    named = AscendBackend(simulate="910B", prefer="triton", composed="act_qdq,rms_norm_rope,moe")
    named.act_qdq(act(2, 128), format="e4m3", block=128, channels=128)
    assert not named.by_kernels("moe")
    assert named.kernels_ran() == ()


def test_other_libraries_are_refused_by_name():
    with pytest.raises(BackendError, match="prefer 'tilelang' is not triton"):
        AscendBackend(simulate="910B", prefer="tilelang")


def test_every_kernel_of_a_published_step_was_compiled():
    """As the sources are now: make the report again after a change (see the tool)."""
    import compile_kernels
    from dsv4_backend_ascend.specialised import every

    report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert report["sources"] == compile_kernels.sources(), "backends/ascend/tools/compile_kernels.py must run again"
    compiled = {
        (k["kernel"], tuple(k["types"]), tuple(map(tuple, k["constants"]))): {
            chip["reached"] for chip in k["chips"].values()
        }
        for k in report["kernels"]
    }
    for one in every():
        assert compiled[tuple(one)] == {"HIVM"}, one
