"""Other libraries' kernels: what is called is what was published, with the contract's operands;
nothing is imported unless chosen.

The stand-ins below have the published signatures and compute, in float64 torch, what the libraries'
own words promise. None of the libraries runs here.
"""

from __future__ import annotations

import subprocess
import sys
import types

import oracle
import pytest
import torch
from dsv4_backend_cuda import device, prove, providers
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_backend_cuda.providers import CALLS, LIBRARIES

from dsv4_core.contract.dtypes import RowLayout, ScaledArray
from dsv4_core.contract.spec import BackendError


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    assert q.dtype == kv.dtype == torch.bfloat16
    assert (indices.dtype, attn_sink.dtype) == (torch.int32, torch.float32)
    assert kv.shape[1] == indices.shape[1] == 1
    assert indices.shape[2] % 128 == 0
    assert q.shape[1] in {64, 128}
    assert q.shape[2] == d_v == 512
    assert topk_length is None
    picks = indices[:, 0].long()
    rows = kv[:, 0].double()[picks.clamp(min=0)]
    scores = torch.einsum("thd,tnd->thn", q.double(), rows) * sm_scale
    scores = scores.masked_fill((picks < 0)[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("thn,tnd->thd", torch.exp(scores - lse[..., None]).nan_to_num(), rows)
    out = out * torch.sigmoid(lse - attn_sink)[..., None]
    return out.bfloat16(), scores.amax(-1).float(), lse.float()


def fp8_gemm_nt(
    a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False
):
    assert (c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast) == (None, None, None, None, "nk", False)
    (x, xs), (w, ws) = a, b
    assert x.dtype == w.dtype == torch.float8_e4m3fn
    assert xs.dtype == ws.dtype == torch.float32
    (m, k), (n, _) = x.shape, w.shape
    assert xs.shape == (m, k // 128)
    assert ws.shape == (-(-n // 128), k // 128)
    wide = w.double() * ws.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    d.copy_((x.double() * xs.double().repeat_interleave(128, 1)) @ wide.T)


def top_k_ragged_transform(
    input, offsets, lengths, k, deterministic=False, tie_break=0, dsa_graph_safe=False, row_starts=None
):
    assert input.dtype == torch.float32
    assert offsets.dtype == lengths.dtype == torch.int32
    assert offsets.shape == lengths.shape == input.shape[:1]
    assert (deterministic, tie_break, dsa_graph_safe, row_starts) == (True, 1, False, None)
    out = torch.full((len(input), k), -1, dtype=torch.int32)
    for row, (scores, start, length) in enumerate(zip(input, offsets, lengths, strict=True)):
        order = torch.sort(scores[:length], descending=True, stable=True).indices[:k]
        out[row, : len(order)] = order.flip(0).int() + start  # in no order that anybody promised
    return out


def mhc_post(x, residual, post_layer_mix, comb_res_mix):
    assert x.dtype == residual.dtype == torch.bfloat16
    assert post_layer_mix.dtype == comb_res_mix.dtype == torch.float32
    assert residual.shape[-2] == 4
    assert (x.shape[-1], *comb_res_mix.shape[-2:]) == (residual.shape[-1], 4, 4)
    kept = torch.einsum("toh,ton->tnh", residual.double(), comb_res_mix.double())
    return (x.double()[:, None] * post_layer_mix.double()[..., None] + kept).bfloat16()


@pytest.fixture
def installed(monkeypatch):
    """All libraries, on a pretended sm_90 whose arrays are the CPU's; our kernels are
    interpreted.
    """
    made = {
        "flash_mla": types.SimpleNamespace(flash_mla_sparse_fwd=flash_mla_sparse_fwd),
        "deep_gemm": types.SimpleNamespace(fp8_gemm_nt=fp8_gemm_nt),
        "flashinfer": types.SimpleNamespace(
            __name__="flashinfer",
            top_k_ragged_transform=top_k_ragged_transform,
            mhc=types.SimpleNamespace(mhc_post=mhc_post),
        ),
    }
    monkeypatch.setattr(providers, "find_spec", made.get)
    monkeypatch.setattr(providers.importlib, "import_module", lambda name: made[name])
    monkeypatch.setattr(device, "require_gpu", lambda _: 90)
    return made


def test_nothing_is_imported_unless_it_is_chosen(tmp_path):
    for name in LIBRARIES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    code = "from dsv4_backend_cuda.backend import CudaBackend; CudaBackend(interpret=True).diagnose()"
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"], check=True)


@pytest.mark.usefixtures("installed")
def test_what_is_chosen_runs_where_it_fits():
    be = CudaBackend(device="cpu", prefer="flash_mla, deep_gemm")
    for check in be.device_checks():
        assert check.run() == "", check
    assert {(c.op, c.case) for c in be.device_checks()} == {
        ("sparse_attn", "as_flash_mla"), ("cached_sparse_attn", "as_flash_mla"), ("linear", "as_deep_gemm"),
    }  # fmt: skip
    q, kv = oracle.normal(3, 64, 512, seed=1), oracle.normal(90, 512, seed=2)
    picks = oracle.uniform_int(-1, 90, 3, 70, seed=3, dtype=torch.int32)
    sink = oracle.normal(64, seed=4, dtype=torch.float32)
    be.kernels_ran()
    be.sparse_attn(q, kv, sink, picks, softmax_scale=0.04)
    be.sparse_attn(q[:, :16], kv, sink[:16], picks, softmax_scale=0.04)  # 16 heads: ours
    assert be.kernels_ran() == (
        "flash_mla of unknown version: flash_mla_sparse_fwd", "sparse_attn", "sparse_attn_combine",
    )  # fmt: skip
    x = oracle.normal(5, 256, seed=5)
    fp8 = ScaledArray(oracle.fp8_codes(192, 256, seed=6), oracle.uniform_int(118, 122, 2, 2, seed=7), "e4m3")
    fp4 = ScaledArray(
        oracle.uniform_int(0, 256, 192, 128, seed=8), oracle.uniform_int(118, 122, 192, 8, seed=9), "e2m1"
    )
    for weight, first in ((fp8, "act_quant"), (fp4, "act_quant")):
        be.linear(x, weight, out_dtype="bfloat16")
        ran = be.kernels_ran()
        assert ("deep_gemm of unknown version: fp8_gemm_nt" in ran) == (weight is fp8)
        assert first in ran
    assert (
        be.supports("linear", x=x, weight=fp8, out_dtype="bfloat16").by == "deep_gemm of unknown version: fp8_gemm_nt"
    )
    assert be.supports("linear", x=x, weight=fp4, out_dtype="bfloat16").by.startswith("triton: ")


@pytest.mark.usefixtures("installed")
def test_flashinfer_picks_rows_and_mixes_streams():
    be = CudaBackend(device="cpu", prefer="flashinfer")
    checks = be.device_checks()
    assert [(c.op, c.case) for c in checks] == [
        (op, "as_flashinfer") for op in ("index_select", "cached_index_topk", "hc_post")
    ]
    assert [c.run() for c in checks] == ["", "", ""]
    name, mhc = (f"flashinfer of unknown version: {f}" for f in ("top_k_ragged_transform", "mhc.mhc_post"))
    layout = RowLayout("key", 128)
    cache = torch.zeros(64, layout.width, dtype=torch.uint8)
    slots = torch.arange(64, dtype=torch.int32)
    be.cache_write(cache, oracle.normal(64, 128, seed=21), slots, layout=layout)
    q, weights = oracle.normal(2, 3, 64, 128, seed=22), oracle.normal(2, 3, 64, seed=23, dtype=torch.float32)
    visible = oracle.uniform_int(0, 33, 2, 3, seed=24, dtype=torch.int32)
    arrays, scalars = (q, weights, cache, slots, visible, visible + 7), {"layout": layout, "scale": 0.1, "topk": 8}
    be.kernels_ran()
    theirs = be.cached_index_topk(*arrays, **scalars)
    assert be.kernels_ran() == (name,)
    ours = be.kernels["cached_index_topk"](be, *arrays, **scalars)
    assert torch.equal(theirs.sort().values, ours.sort().values)
    y, h, mix = oracle.normal(3, 64, seed=25), oracle.normal(3, 4, 64, seed=26), oracle.normal(3, 20, seed=27)
    mix = mix.float()
    be.hc_post(y, h, mix[:, :4], mix[:, 4:].reshape(3, 4, 4))
    be.hc_post(y, h[:, :2], mix[:, :2], mix[:, :4].reshape(3, 2, 2))  # two streams: ours
    assert be.kernels_ran() == (mhc, "hc_expand")
    assert be.supports("hc_post", y=y, h=h, post=mix[:, :4], comb=mix[:, 4:].reshape(3, 4, 4)).by == mhc


@pytest.mark.usefixtures("installed")
def test_cached_rows_are_widened_by_us():
    be = CudaBackend(device="cpu", prefer="flash_mla")
    layout = RowLayout("kv", 512, 64)
    rows = oracle.normal(20, 512, seed=11)
    ring = torch.zeros(24, layout.width, dtype=torch.uint8)
    be.cache_write(ring, rows, torch.arange(20, dtype=torch.int32), layout=layout)
    q, kv = oracle.normal(2, 64, 512, seed=12), oracle.normal(2, 512, seed=13)
    arrays = (q, kv, ring, torch.arange(20, dtype=torch.int32), None, None, torch.zeros(64),
              oracle.uniform_int(-1, 22, 2, 19, seed=14, dtype=torch.int32))  # fmt: skip
    be.kernels_ran()
    theirs = be.cached_sparse_attn(*arrays, layout=layout, softmax_scale=0.04)
    assert be.kernels_ran() == ("flash_mla of unknown version: flash_mla_sparse_fwd",)
    ours = be.kernels["cached_sparse_attn"](be, *arrays, layout=layout, softmax_scale=0.04)
    torch.testing.assert_close(
        theirs.float(), ours.float(), rtol=2.0**-7, atol=2.0**-9 * 4
    )  # our probabilities are BF16


def test_a_library_that_computes_otherwise_is_found(installed):
    def without_sink(*arrays, **how):
        return flash_mla_sparse_fwd(*arrays, **(how | {"attn_sink": how["attn_sink"] * 0}))

    def forgets_a_scale(a, b, d, **how):
        fp8_gemm_nt((a[0], a[1] * 0 + a[1][:, :1]), b, d, **how)

    def higher_of_equals(input, offsets, lengths, k, **how):
        return top_k_ragged_transform(input + torch.arange(input.shape[1]) * 1e-4, offsets, lengths, k, **how)

    def not_transposed(x, residual, post_layer_mix, comb_res_mix):
        return mhc_post(x, residual, post_layer_mix, comb_res_mix.transpose(1, 2))

    installed["flashinfer"].top_k_ragged_transform = higher_of_equals
    installed["flashinfer"].mhc.mhc_post = not_transposed
    installed["flash_mla"].flash_mla_sparse_fwd = without_sink
    installed["deep_gemm"].fp8_gemm_nt = forgets_a_scale
    be = CudaBackend(device="cpu", prefer="flash_mla,deep_gemm,flashinfer")
    said = {c.op: c.run() for c in be.device_checks()}
    assert len(said) == len(CALLS)
    for op, words in said.items():
        picks = op in {"index_select", "cached_index_topk"}
        assert ("picks other rows" if picks else "times the allowed distance") in words, said


@pytest.mark.parametrize(
    ("op", "stand_in"),
    [
        ("sparse_attn", flash_mla_sparse_fwd), ("linear", fp8_gemm_nt), ("index_select", top_k_ragged_transform), ("hc_post", mhc_post),
    ],
)  # fmt: skip
def test_stand_ins_have_the_published_signatures(op, stand_in):
    """Else the tests above would prove nothing of the call."""
    assert providers.changed(stand_in, CALLS[op].signature) == ""
    assert list(providers.parameters(CALLS[op].signature)) == list(
        stand_in.__code__.co_varnames[: stand_in.__code__.co_argcount]
    )


def test_what_cannot_be_preferred_is_refused_with_the_reason(installed, monkeypatch):
    def refused(match, **options):
        with pytest.raises(BackendError, match=match):
            CudaBackend(**{"device": "cpu", "prefer": "flash_mla", **options})

    refused("'flashmla' is none of flash_mla, deep_gemm, flashinfer", prefer="flashmla")
    refused("libraries run on a GPU, and here kernels are interpreted", interpret=True)
    refused("libraries promise no order of sums", batch_invariant=True)
    installed["flash_mla"].flash_mla_sparse_fwd = lambda q, kv, picks, sm_scale: None
    refused(r"flash_mla_sparse_fwd takes \(q, kv, picks, sm_scale\), not .*published in deepseek-ai/FlashMLA at")
    del installed["flash_mla"].flash_mla_sparse_fwd
    refused("flash_mla_sparse_fwd is gone")
    del installed["flash_mla"]
    refused("no package flash_mla is installed; build it from https")
    monkeypatch.setattr(device, "require_gpu", lambda _: 80)
    refused("it has kernels for sm_90, sm_100, this GPU is sm_80", prefer="deep_gemm")
    monkeypatch.setattr(providers, "find_spec", lambda _: True)
    monkeypatch.setattr(device, "require_gpu", lambda _: 90)
    monkeypatch.setattr(providers.importlib, "import_module", lambda _: 1 / 0)
    refused("importing deep_gemm failed: ZeroDivisionError", prefer="deep_gemm")


def test_libraries_that_are_not_there_are_left_out_of_a_proof(tmp_path):
    p = prove.Prover(tmp_path, dry=False)
    p.stage("libraries", prove.libraries)
    assert [(r.name, r.state, r.why) for r in p.stages["libraries"].ran.values()] == [
        ("flash_mla", "left out", "flash_mla is not installed"), ("deep_gemm", "left out", "deep_gemm is not installed"),
        ("flashinfer", "left out", "flashinfer is not installed"),
    ]  # fmt: skip


def test_the_process_group_is_told_its_gpu(monkeypatch):
    """NCCL guesses otherwise; gloo is told nothing."""
    from datetime import timedelta

    from dsv4_core.ranks.store import StoredRanks

    given = []
    distributed = types.SimpleNamespace(
        PrefixStore=lambda *_: None,
        is_initialized=lambda: False,
        init_process_group=lambda *a, **k: given.append((a, k)),
    )
    for library, on in (("nccl", torch.device("cuda", 1)), ("gloo", None)):
        ranks = StoredRanks.__new__(StoredRanks)
        vars(ranks).update(distributed=distributed, library=library, attempt="a", rank=1, ranks=2, _own=None)
        if on is not None:
            ranks.device_id = on
        ranks.connect()
    common = {"store": None, "rank": 1, "world_size": 2, "timeout": timedelta(minutes=30)}
    assert given == [(("nccl",), {**common, "device_id": torch.device("cuda", 1)}), (("gloo",), common)]


def test_a_backend_on_a_gpu_names_it_to_the_group(monkeypatch):
    from dsv4_backend_torch import process_group

    monkeypatch.setattr(process_group.StoredRanks, "__init__", lambda *_: None)
    for name, want in (("cuda:1", torch.device("cuda:1")), ("cpu", None)):
        backend = types.SimpleNamespace(device=torch.device(name))
        assert process_group.TorchProcessGroup(backend, None).device_id == want
