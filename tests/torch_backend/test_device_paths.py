"""What runs on a device only, run on the CPU: the formulations without host synchronisation give what the CPU's own give."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend  # noqa: E402
from dsv4_conformance import golden  # noqa: E402
from recorded import relative, vectors  # noqa: E402

from dsv4_core.dtypes import Experts, RowLayout, quantise_weight  # noqa: E402
from dsv4_core.evaluate import teacher_forced  # noqa: E402
from dsv4_core.model import Model  # noqa: E402
from dsv4_core.weights import Checkpoint  # noqa: E402


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


def test_a_decode_step_reads_nothing_back(monkeypatch):
    """No ``item``, ``tolist``, ``nonzero`` or truth value of a tensor between a step's addresses and its logits."""
    model = Model(Checkpoint(golden.checkpoint_path("tiny-flash")), Device())
    from dsv4_core.cache import Cache
    from dsv4_core.step import Step

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
