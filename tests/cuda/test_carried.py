"""What a kernel makes beside its result is what the op that it stands for would make, and is taken
only for the array that it was made of.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_backend_cuda.carried import Carrying, InPieces


@pytest.fixture(scope="module")
def be():
    return CudaBackend(interpret=True)


def rows_of(be, n=5):
    x, gain = oracle.normal(n, 1, 192, seed=1), oracle.normal(192, seed=2)
    positions = oracle.uniform_int(0, 4000, n, seed=3, dtype=torch.int32)
    freqs = oracle.guarded((10000.0 ** -(torch.arange(0, 64, 2).double() / 64)).float())
    return be.rms_norm_rope(x, gain, positions, freqs, eps=1e-6)


def launches(be, op, *arrays, **scalars):
    """The result, and which kernels ran for it."""
    import triton.runtime.interpreter as it

    ran, plain = [], it.GridExecutor.__call__

    def call(self, *args, **named):
        ran.append(self.fn.__name__)
        return plain(self, *args, **named)

    it.GridExecutor.__call__ = call
    try:
        return getattr(be, op)(*arrays, **scalars), ran
    finally:
        it.GridExecutor.__call__ = plain


@pytest.mark.parametrize("how", ["whole", "inference"])
def test_rows_on_a_grid_come_with_the_norm(be, how):
    with torch.inference_mode(how == "inference"):
        rows = rows_of(be).reshape((5, 192))
        plain = rows.clone()
        assert type(plain) is torch.Tensor
        scalars = {"format": "e4m3", "block": 64, "channels": 128}
        got, ran = launches(be, "act_qdq", rows, **scalars)
        want, needed = launches(be, "act_qdq", plain, **scalars)
    assert (ran, needed) == ([], ["act_qdq_kernel"])
    assert torch.equal(got, want)


def test_another_grid_and_another_array_are_computed(be):
    rows = rows_of(be)
    flat = rows.reshape((5, 192))
    for array, scalars in (
        (flat, {"format": "e4m3", "block": 64, "channels": 192}),
        (flat, {"format": "e4m3", "block": 32, "channels": 128}),
        (flat, {"format": "e2m1", "block": 64, "channels": 128}),
        (flat[1:], {"format": "e4m3", "block": 64, "channels": 128}),
        (flat + 1, {"format": "e4m3", "block": 64, "channels": 128}),
        (rows.reshape((15, 64)), {"format": "e4m3", "block": 64, "channels": 64}),
    ):
        got, ran = launches(be, "act_qdq", array, **scalars)
        assert ran == ["act_qdq_kernel"]
        assert torch.equal(got, be.act_qdq(array.clone(), **scalars))


def test_the_rotation_brings_its_grid(be):
    x = oracle.normal(9, 128, seed=5)
    turned = be.hadamard(x)
    got, ran = launches(be, "act_qdq", turned, format="e2m1", block=32, channels=128)
    assert ran == []
    assert torch.equal(got, be.act_qdq(turned.clone(), format="e2m1", block=32, channels=128))


def test_a_rank_with_some_experts_sorts_for_itself(be):
    from dsv4_backend_cuda import bindings
    from dsv4_backend_cuda.kernels import moe

    logits = oracle.normal(3, 16, seed=6, dtype=torch.float32)
    _, indices = bindings._routed(moe.route(logits[None], oracle.guarded(torch.zeros(16)), topk=2, route_scale=1.0))
    assert isinstance(indices, Carrying)
    for first, count, fresh in ((0, 16, False), (8, 8, True), (0, 8, True)):
        known = bindings._sorted(indices, first_expert=first, n_experts=count)
        assert (known is not indices.order) == fresh
        for got, want in zip(known, moe.sort(indices.clone(), first_expert=first, n_experts=count), strict=True):
            assert torch.equal(got, want)


def split(be, seed=7):
    """A product whose sum waits, and the sum."""
    x, w = oracle.normal(3, 4096, seed=seed), oracle.normal(64, 4096, seed=seed + 1)
    product = be.linear(x, w, out_dtype="float32")
    assert isinstance(product, InPieces)
    assert product.awaited.waits
    made = be.linear(x, w, out_dtype="float32")
    made.data_ptr()
    assert not made.awaited.waits
    return product, made.awaited.room


TORCH = {
    "clone": lambda t: t.clone(), "sliced": lambda t: t[:2], "viewed": lambda t: t.view(-1), "numpy": lambda t: torch.from_numpy(t.numpy()),
    "added": lambda t: t + 0, "bytes": lambda t: t.reshape(-1).view(torch.uint8), "stacked": lambda t: torch.cat([t, t]),
    "listed": lambda t: torch.tensor(t.tolist()), "copied": lambda t: torch.zeros_like(t).copy_(t), "contiguous": lambda t: t.contiguous(),
    "cast": lambda t: t.to(torch.float64), "iterated": lambda t: torch.stack(list(t)), "taken": lambda t: t.reshape(3, 8, 8).sum(1),
    "equal": lambda t: torch.tensor(torch.equal(t, t)),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_torch_is_given_the_sum(be, name):
    product, made = split(be)
    look = TORCH[name]
    got = look(product)
    assert not product.awaited.waits
    assert torch.equal(got, torch.tensor(True) if name == "equal" else look(made))


def test_a_look_at_its_form_makes_nothing(be):
    product, _ = split(be)
    assert (product.shape, product.dtype, product.device.type, product.ndim) == ((3, 64), torch.float32, "cpu", 2)
    assert product.is_contiguous()
    turned = product.reshape((3, 8, 8))
    assert product.awaited.waits
    assert turned.shape == (3, 8, 8)
    turned.awaited.made()
    assert not product.awaited.waits


@pytest.mark.parametrize(
    "op", ["rms_norm", "rms_norm_rope", "cached_compress", "compress", "cache_write", "index_scores"]
)
def test_who_reads_a_sum_makes_it(be, op):
    """The reader's bits are those that it has of the sum, and no launch adds it up."""
    from dsv4_core.contract.dtypes import RowLayout

    product, made = split(be)
    if op.startswith("rms"):
        product, made = (p.awaited.room.to(torch.bfloat16) if p is None else p for p in bfloat16(be))

    def call(rows):
        if op == "rms_norm":
            return (be.rms_norm, (rows, oracle.normal(64, seed=9)), {"eps": 1e-6})
        if op == "rms_norm_rope":
            freqs = oracle.normal(8, seed=9, dtype=torch.float32)
            at = oracle.uniform_int(0, 9, 3, seed=9, dtype=torch.int32)
            return (be.rms_norm_rope, (rows.reshape((3, 1, 64)), oracle.normal(64, seed=9), at, freqs), {"eps": 1e-6})
        ape = oracle.normal(2, 32, seed=9, dtype=torch.float32)
        windows = oracle.guarded(torch.tensor([[-1, 0], [1, 2]], dtype=torch.int32))
        if op == "compress":
            return (be.compress, (rows, ape, windows), {"dim": 32})
        if op == "cached_compress":
            state = oracle.normal(4, 64, seed=11, dtype=torch.float32)
            slots = oracle.guarded(torch.tensor([3, -1], dtype=torch.int32))
            windows = oracle.guarded(torch.tensor([[0, 1], [2, 4]], dtype=torch.int32))
            return (be.cached_compress, (rows, state, slots, ape, windows), {"dim": 32})
        if op == "cache_write":
            where = oracle.guarded(torch.tensor([4, -1, 0], dtype=torch.int32))
            return (be.cache_write, (torch.zeros(5, 64), rows, where), {"layout": RowLayout("plain", 64)})
        q, keys = oracle.normal(1, 3, 64, 32, seed=9), oracle.normal(1, 20, 32, seed=10)
        return (be.index_scores, (q, rows.reshape((1, 3, 64)), keys), {"scale": 0.1})

    run, arrays, scalars = call(product)
    got, ran = launches(be, run.__name__, *arrays, **scalars)
    assert "add_pieces_kernel" not in ran
    assert product.awaited.waits
    run, arrays, scalars = call(made)
    assert torch.equal(got, run(*arrays, **scalars))


def bfloat16(be):
    x, w = oracle.normal(3, 4096, seed=13), oracle.normal(64, 4096, seed=14)
    product, made = (be.linear(x, w, out_dtype="bfloat16") for _ in range(2))
    made.awaited.made()
    return product, made.awaited.room
