"""What runs on a device only, run on the CPU: the formulations without host synchronisation give
what the CPU's own give.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend  # noqa: E402
from dsv4_conformance.check import Session  # noqa: E402
from dsv4_conformance.model import golden  # noqa: E402
from dsv4_conformance.run import runner  # noqa: E402
from recorded import relative, vectors  # noqa: E402

from dsv4_core.checkpoint.weights import Checkpoint  # noqa: E402
from dsv4_core.contract.dtypes import Experts, RowLayout, quantise_weight  # noqa: E402
from dsv4_core.graph.evaluate import teacher_forced  # noqa: E402
from dsv4_core.graph.model import Model  # noqa: E402


class Device(TorchBackend):
    """The torch backend as it runs on a device, with the host's memory in the device's place."""

    on_cpu = False


def test_recorded_logits(recorded):
    want = vectors(recorded, "golden")
    model = Model(Checkpoint(golden.checkpoint_path(recorded)), Device(numerics="float64"))
    got = teacher_forced(model, want["prompt"], prefill=300, mtp=True)
    assert relative(got["logits"], want["exact.logits"]) < 3e-6
    assert relative(got["mtp_logits"], want["exact.mtp_logits"]) < 3e-6


@pytest.mark.parametrize("index", [[3, -1, 0, -1, 5], [-1, -1, -1, -1, -1], [-1, 2, 1, 4, 0], [4, 3, 2, 1, 0]], ids=str)
def test_cache_write(index):
    layout, rows = RowLayout("plain", 8), torch.randn(5, 8)
    caches = []
    for backend in (Device(numerics="float32"), TorchBackend(numerics="float32")):
        caches.append(torch.full((6, 8), torch.nan))
        backend.cache_write(caches[-1], rows, torch.tensor(index, dtype=torch.int32), layout=layout)
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", ["e4m3", "e2m1"])
def test_gathered_experts(fmt):
    rng = np.random.default_rng(4)
    weights = Experts([quantise_weight(rng.standard_normal((64, 128)).astype(np.float32), fmt) for _ in range(5)])
    x = torch.from_numpy(rng.standard_normal((9, 128))).bfloat16()
    offsets = torch.tensor([0, 2, 2, 5, 5, 7], dtype=torch.int32)  # the last two rows are other ranks'
    device, cpu = Device(), TorchBackend()
    got = device.expert_linear(x, device.load_experts(weights), offsets)
    want = cpu.expert_linear(x, cpu.load_experts(weights), offsets)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)
    assert not got[7:].any()


@pytest.mark.parametrize("case", ["fp4", "fp8", "bf16", "float32", "float32_rows=65"])
def test_gathered_experts_keep_what_their_weights_hold(case):
    ran = runner.run(Session(Device(), "standard"), cases=[f"expert_linear/{case}"])
    assert [(f.status, f.message) for f in ran.findings] == [("passed", "")]


def test_a_decode_step_reads_nothing_back(monkeypatch):
    """No ``item``, ``tolist``, ``nonzero`` or truth value of a tensor between a step's addresses
    and its logits.
    """
    model = Model(Checkpoint(golden.checkpoint_path("tiny-flash")), Device())
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.step import Step

    cache = Cache(model.backend, model.config, 1, 320)
    ids = vectors("tiny-flash", "golden")["prompt"][:1]
    for part in (ids[:, :130], ids[:, 130:131]):  # first use reads scales, once a weight
        step = Step(cache, part)
        model.logits(model.forward(step))
        cache.advance(step.sequences, step.ends)
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "numpy"):

        def refuse(*_args, _name=name):
            raise AssertionError(f"{_name} reads a tensor on the host")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    for position in range(131, 137):  # windows close and do not
        step = Step(cache, ids[:, position : position + 1])
        model.logits(model.forward(step))
        cache.advance(step.sequences, step.ends)


@pytest.mark.parametrize("numerics", ["native", "float32"])
def test_one_token_hyper_connections(numerics):
    rng, cpu, device = np.random.default_rng(5), TorchBackend(numerics=numerics), Device(numerics=numerics)
    h, y = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(cpu.act_type) for s in ((1, 4, 64), (1, 64)))
    fn, scale, base, weight = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((24, 256), 3, 24, 64)
    )
    scalars = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}
    got = cpu.hc_pre_norm(h, fn, scale, base, weight, **scalars)
    want = device.hc_pre_norm(h, fn, scale, base, weight, **scalars)
    near = {"rtol": 2**-7 if numerics == "native" else 1e-5, "atol": 1e-5}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **near)
    torch.testing.assert_close(cpu.hc_post(y, h, *got[1:]), device.hc_post(y, h, *got[1:]), **near)


@pytest.mark.parametrize("numerics", ["native", "float32"])
@pytest.mark.parametrize("listed", ["all in order", "some", "a row that is absent"])
def test_one_token_attention(numerics, listed):
    """A step that attends to every row it reads takes them as they lie; any other, as the general
    formulation does.
    """
    rng, cpu, device = np.random.default_rng(6), TorchBackend(numerics=numerics), Device(numerics=numerics)
    layout = RowLayout("kv", 128, 64) if numerics == "native" else RowLayout("plain", 128)
    q, kv, rows = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(cpu.act_type)
        for s in ((1, 4, 128), (1, 128), (20, 128))
    )
    sink = torch.from_numpy(rng.standard_normal(4).astype(np.float32))
    ring, old = cpu.pack(rows[:12], layout), cpu.pack(rows[12:], layout)
    ring_index, row_index = (torch.tensor(i, dtype=torch.int32) for i in ([3, 4, 5, 11, 0], [7, 2, 1]))
    picks = torch.arange(9, dtype=torch.int32)[None]
    if listed == "some":
        picks = torch.tensor([[0, 8, 3, -1, 5, 5, 2, 1, 4]], dtype=torch.int32)
    elif listed == "a row that is absent":
        ring_index[0] = -1
    else:
        cpu.sparse_attn = None  # where the others end is not needed
    operands = (q, kv, ring, ring_index, old, row_index, sink, picks)
    got, want = (b.cached_sparse_attn(*operands, layout=layout, softmax_scale=0.09) for b in (cpu, device))
    torch.testing.assert_close(got, want, rtol=2**-7 if numerics == "native" else 1e-5, atol=1e-5)
