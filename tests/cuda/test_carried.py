"""What a kernel makes beside its result is what the op that it stands for would make, and is taken
only for the array that it was made of. What waits for its reader is what the op alone would make.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_backend_cuda.carried import Carrying, Waiting, settle
from dsv4_backend_torch.weights import StackedExperts

from dsv4_core.contract.dtypes import ScaledArray


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
    return launches_of(lambda: getattr(be, op)(*arrays, **scalars))


def launches_of(function):
    """What it gives, and which kernels ran for it."""
    import triton.runtime.interpreter as it

    ran, plain = [], it.GridExecutor.__call__

    def call(self, *args, **named):
        ran.append(self.fn.__name__)
        return plain(self, *args, **named)

    it.GridExecutor.__call__ = call
    try:
        return function(), ran
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
    got, ran = launches(be, "act_qdq", turned, format="e4m3", block=64, channels=128)
    assert ran == ["act_qdq_kernel"]
    assert torch.equal(got, be.act_qdq(turned.clone(), format="e4m3", block=64, channels=128))


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
    assert isinstance(product, Waiting)
    assert product.later.waits
    made = be.linear(x, w, out_dtype="float32")
    made.data_ptr()
    assert not made.later.waits
    return product, made.later.room


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
    assert not product.later.waits
    assert torch.equal(got, torch.tensor(True) if name == "equal" else look(made))


def test_a_look_at_its_form_makes_nothing(be):
    product, _ = split(be)
    assert (product.shape, product.dtype, product.device.type, product.ndim) == ((3, 64), torch.float32, "cpu", 2)
    assert product.is_contiguous()
    turned = product.reshape((3, 8, 8))
    assert product.later.waits
    assert turned.shape == (3, 8, 8)
    turned.later.made()
    assert not product.later.waits


@pytest.mark.parametrize(
    "op", ["rms_norm", "rms_norm_rope", "cached_compress", "compress", "cache_write", "index_scores"]
)
def test_who_reads_a_sum_makes_it(be, op):
    """The reader's bits are those that it has of the sum, and no launch adds it up."""
    from dsv4_core.contract.dtypes import RowLayout

    product, made = split(be)
    if op.startswith("rms"):
        product, made = (p.later.room.to(torch.bfloat16) if p is None else p for p in bfloat16(be))

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
    assert product.later.waits
    run, arrays, scalars = call(made)
    assert torch.equal(got, run(*arrays, **scalars))


def bfloat16(be):
    x, w = oracle.normal(3, 4096, seed=13), oracle.normal(64, 4096, seed=14)
    product, made = (be.linear(x, w, out_dtype="bfloat16") for _ in range(2))
    made.later.made()
    return product, made.later.room


def streams(be, tokens, *, experts, dim=256):
    """A sub-layer's result, which its reader makes, of rows [tokens, dim] or of experts' rows."""
    y = oracle.normal(tokens, dim, seed=21)
    h = oracle.normal(tokens, 4, dim, seed=22)
    post, comb = (oracle.normal(tokens, *shape, seed=23, dtype=torch.float32) for shape in ((4,), (4, 4)))
    if experts:
        rows, order = oracle.normal(2 * tokens, dim, seed=24), oracle.guarded(torch.arange(2 * tokens).flip(0).int())
        offsets = oracle.guarded(torch.tensor([0, tokens, 2 * tokens - 1], dtype=torch.int32))
        shared = y if experts == "shared" else None
        y = be.combine(rows, order, offsets, shared, topk=2, out_dtype="bfloat16")
    return be.hc_post(y, h, post, comb)


@pytest.mark.parametrize("experts", ["", "routed", "shared"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_next_sub_layer_makes_its_streams(be, tokens, experts):
    weights = [oracle.normal(*shape, seed=25, dtype=torch.float32) for shape in ((24, 1024), (3,), (24,))]
    gain, scalars = oracle.normal(256, seed=26), {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}
    h, made = streams(be, tokens, experts=experts), streams(be, tokens, experts=experts)
    assert isinstance(h, Waiting)
    be.hc_head(made, *hc_head_weights(), norm_eps=1e-6, eps=1e-6)
    plain = streams(be, tokens, experts=experts)
    settle(plain)
    got, ran = launches(be, "hc_pre_norm", h, *weights, gain, **scalars)
    assert ran == ["mix_kernel", "reduce_kernel"]
    for a, b in zip(got, be.hc_pre_norm(plain.clone(), *weights, gain, **scalars), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(h.clone(), plain.clone())
    assert torch.equal(made.clone(), plain.clone())
    assert not {"y", "h", "rows"} & vars(h.later).keys()  # or every layer's streams would be kept


def hc_head_weights():
    return [oracle.normal(*shape, seed=27, dtype=torch.float32) for shape in ((4, 1024), (1,), (4,))]


@pytest.mark.parametrize("form", ["other streams", "odd channels", "many tokens", "invariant"])
def test_streams_of_another_form_are_made_first(be, form):
    """A reader that sees them otherwise, blocks across streams, steps of many tokens."""
    tokens, dim = (17 if form == "many tokens" else 2), (96 if form == "odd channels" else 256)
    be = CudaBackend(interpret=True, batch_invariant=True) if form == "invariant" else be
    h = streams(be, tokens, experts="", dim=dim)
    assert h.later.waits == (form in {"other streams", "odd channels"})
    h = h.reshape((2 * tokens, 2, dim)) if form == "other streams" else h
    hc, dim = h.shape[1:]
    mixes = hc * (hc + 2)
    weights = [oracle.normal(*shape, seed=25, dtype=torch.float32) for shape in ((mixes, hc * dim), (3,), (mixes,))]
    scalars = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 2}
    got, ran = launches(be, "hc_pre", h, *weights, **scalars)
    assert ran == (["expand_kernel"] if form in {"other streams", "odd channels"} else []) + [
        "mix_kernel",
        "reduce_kernel",
    ]
    for a, b in zip(got, be.hc_pre(h.clone(), *weights, **scalars), strict=True):
        assert torch.equal(a, b)


def attended(be, picks):
    q, kv, sink = (oracle.normal(*shape, seed=31) for shape in ((2, 3, 64), (40, 64), (3,)))
    listed = oracle.guarded(torch.arange(2 * picks).reshape(2, picks).int() % 40)
    sink = sink.float() + 4  # above all scores: every piece fades
    return be.sparse_attn(q, kv, sink, listed, softmax_scale=0.02)


@pytest.mark.parametrize("picks", [3, 300])
def test_attention_is_turned_back_by_who_adds_its_pieces(be, picks):
    positions = oracle.guarded(torch.tensor([3, 70001], dtype=torch.int32))
    freqs = oracle.normal(16, seed=32, dtype=torch.float32)
    o, made = attended(be, picks), attended(be, picks)
    settle(made)
    got, ran = launches(be, "apply_rope", o, positions, freqs, inverse=True)
    assert ran == ["sparse_attn_combine_kernel"]
    assert torch.equal(got, be.apply_rope(made.clone(), positions, freqs, inverse=True).clone())
    assert torch.equal(o.clone(), made.clone())  # and whoever wants it unturned has it
    forwards, ran = launches(be, "apply_rope", attended(be, picks), positions, freqs, inverse=False)
    assert torch.equal(forwards.clone(), be.apply_rope(made.clone(), positions, freqs, inverse=False).clone())


@pytest.mark.parametrize("inverse", [False, True])
def test_the_rotation_turns_its_rows(be, inverse):
    x = oracle.normal(3, 5, 128, seed=33)
    positions = oracle.guarded(torch.tensor([0, 9, 70001], dtype=torch.int32))
    freqs = oracle.normal(32, seed=34, dtype=torch.float32)
    turned, made = (be.apply_rope(x, positions, freqs, inverse=inverse) for _ in range(2))
    settle(made)
    got, ran = launches(be, "hadamard", turned.reshape((15, 128)))
    assert ran == ["hadamard_kernel"]
    assert torch.equal(got, be.hadamard(made.clone().reshape((15, 128))))
    got, ran = launches(be, "hadamard", turned.reshape((30, 64)))  # other rows than those that wait
    assert ran == ["rope_kernel", "hadamard_kernel"]
    assert torch.equal(got, be.hadamard(made.clone().reshape((30, 64))))


def scaled(*shape, seed):
    """An FP8 weight, with scales near 1."""
    codes = oracle.uniform_int(0, 0x60, *shape, seed=seed, dtype=torch.uint8)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return ScaledArray(codes, oracle.uniform_int(120, 126, *blocks, seed=seed + 1, dtype=torch.uint8), "e4m3")


def scaled_fp4(*shape, seed):
    """An FP4 weight, with scales near 1."""
    codes = oracle.uniform_int(0, 256, *shape[:-1], shape[-1] // 2, seed=seed, dtype=torch.uint8)
    groups = (*shape[:-1], shape[-1] // 32)
    return ScaledArray(codes, oracle.uniform_int(120, 126, *groups, seed=seed + 1, dtype=torch.uint8), "e2m1")


def mixture(be, tokens, dim, wide, width, expert, limit=10.0):
    """Two ways to all experts' rows of one input: the shared expert of ``wide`` channels waits for
    those of ``width``, and it was made before.
    """
    x = be.rms_norm(oracle.normal(tokens, dim, seed=41), oracle.normal(dim, seed=42), eps=1e-6)
    own = [scaled(*shape, seed=43 + i) for i, shape in enumerate(((wide, dim), (wide, dim), (dim, wide)))]
    shapes = (width, dim), (width, dim), (dim, width)
    stacks = [StackedExperts(expert(3, *shape, seed=46 + i)) for i, shape in enumerate(shapes)]
    weights = oracle.normal(tokens, 2, seed=49).float()
    indices = oracle.uniform_int(0, 3, tokens, 2, seed=50, dtype=torch.int32)
    shared, made = (be.ffn(x, *own, limit=10.0) for _ in range(2))
    settle(made)
    scalars = {"first_expert": 0, "limit": limit, "out_dtype": "float32"}
    return (launches(be, "moe", x, weights, indices, each, *stacks, **scalars) for each in (shared, made.clone()))


@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("other", ["", "limit", "width"])
def test_the_shared_expert_waits_for_the_others(be, tokens, other):
    """One launch for both where they are alike; the shared expert's own otherwise."""
    width, limit = 128 if other == "width" else 256, 7.0 if other == "limit" else 10.0
    (got, ran), (want, needed) = mixture(be, tokens, 256, 256, width, scaled, limit)
    assert torch.equal(got.clone(), want.clone())
    alone, both = ["scaled_matmul_kernel", "swiglu_kernel"], ["moe_matmul_kernel", "swiglu_kernel", "moe_matmul_kernel"]
    assert [k for k in needed if k in {*alone, *both}] == [*alone, "scaled_matmul_kernel"]
    if tokens > be.few_tokens:
        assert ran == needed
    elif other:
        assert ran.count("swiglu_kernel") == 2
    else:
        assert [k for k in ran if k in {*alone, *both}] == both


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("expert", [scaled, scaled_fp4])
@pytest.mark.parametrize(("dim", "wide"), [(256, 384), (1024, 128), (128, 2048)])
def test_products_beside_the_experts_have_the_bits_that_they_have_alone(be, tokens, expert, dim, wide):
    """Whole; the first in pieces for SwiGLU; the last in pieces that a launch adds up."""
    (got, ran), (want, _) = mixture(be, tokens, dim, wide, wide, expert)
    assert ran.count("moe_matmul_kernel") == 2
    assert ran.count("add_pieces_kernel") == (wide == 2048)
    assert torch.equal(got.clone(), want.clone())
    assert got.isfinite().all()


def test_a_recorded_step_gives_nothing_that_waits(be, monkeypatch):
    """Or the first who asks would make it outside of the graph, and no replay again."""
    product, _ = split(be)
    monkeypatch.setattr("dsv4_backend_cuda.backend.Recorded", lambda function, device: function)
    monkeypatch.setattr(be, "index", 0)
    be.record(lambda x: [(x,)])(product)
    assert not product.later.waits


def normed(be, tokens=3, heads=1, dim=192, weighted=True, seed=71, half=32, start=0):
    """Rows after norm and RoPE, as the graph has them, and the same made."""
    x, gain = oracle.normal(tokens, heads, dim, seed=seed, scale=3.0), oracle.normal(dim, seed=seed + 1)
    positions = oracle.uniform_int(start, start + 4000, tokens, seed=73, dtype=torch.int32)
    freqs = oracle.guarded((10000.0 ** -(torch.arange(0, 2 * half, 2).double() / (2 * half))).float())
    given = x, gain if weighted else None, positions, freqs
    made = be.rms_norm_rope(*given, eps=1e-6)
    settle(made)
    return given, made.reshape((tokens, heads * dim)) if heads == 1 else made


GRID = {"format": "e4m3", "block": 64, "channels": 128}


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("heads", [3, 64])
def test_attention_norms_its_queries_and_its_row_in_one_launch(be, heads, tokens):
    """One program each of the last head's rows and of the first rows of key/values."""
    from dsv4_core.contract.dtypes import RowLayout

    (x, _, positions, freqs), q_made = normed(be, tokens, heads, weighted=False)
    (kv_x, gain, *_), kv_made = normed(be, tokens, seed=81)
    layout = RowLayout("kv", 192, 64)
    ring = torch.zeros(8 * tokens, layout.width, dtype=torch.uint8)
    index = oracle.guarded(torch.arange(8 * tokens, dtype=torch.int32))
    picks = oracle.guarded((torch.arange(5 * tokens).reshape(tokens, 5) * 7 % (9 * tokens)).int())
    rest = ring, index, None, None, oracle.normal(heads, seed=84).float(), picks
    scalars = {"layout": layout, "softmax_scale": 0.07}

    def waiting():
        q = be.rms_norm_rope(x, None, positions, freqs, eps=1e-6)
        kv = be.rms_norm_rope(kv_x, gain, positions, freqs, eps=1e-6).reshape((tokens, 192))
        return q, kv, be.act_qdq(kv, **GRID)

    (q, kv, grid), ran = launches_of(waiting)
    assert ran == []
    got, ran = launches(be, "cached_sparse_attn", q, grid, *rest, **scalars)
    assert ran[:3] == ["norm_rope_kernel", "unpack_rows_kernel", "sparse_attn_kernel"]
    assert torch.equal(q.clone(), q_made)
    assert torch.equal(kv.clone(), kv_made)
    want_grid = be.act_qdq(kv_made.clone(), **GRID)
    assert torch.equal(grid.clone(), want_grid)
    assert torch.equal(be.act_qdq(kv, **GRID), want_grid)  # also where they are made by now
    assert torch.equal(got.clone(), be.cached_sparse_attn(q_made, want_grid, *rest, **scalars).clone())


def test_rows_of_many_tokens_come_with_their_grid(be):
    given, made = normed(be, 17)
    rows, ran = launches(be, "rms_norm_rope", *given, eps=1e-6)
    assert ran == ["norm_rope_kernel"]
    got, ran = launches(be, "act_qdq", rows.reshape((17, 192)), **GRID)
    assert ran == []
    assert torch.equal(got, be.act_qdq(made.clone(), **GRID))


@pytest.mark.parametrize("other", ["positions", "epsilon", "made"])
def test_rows_of_other_tokens_are_normed_alone(be, other):
    from dsv4_backend_cuda import bindings

    (x, _, positions, freqs), q_made = normed(be, 3, 2, weighted=False)
    (kv_x, gain, *_), kv_made = normed(be, 3, seed=81)
    q = be.rms_norm_rope(x, None, positions, freqs, eps=1e-6)
    its = positions.clone() if other == "positions" else positions
    kv = be.rms_norm_rope(kv_x, gain, its, freqs, eps=1e-3 if other == "epsilon" else 1e-6).reshape((3, 192))
    if other == "made":
        settle(kv)
    bindings._norms(q, be.act_qdq(kv, **GRID))
    assert q.later.waits
    assert torch.equal(q.clone(), q_made)
    assert torch.equal(kv.clone(), kv_made) == (other != "epsilon")


@pytest.mark.parametrize("dim", [192, 512])
def test_packing_norms_and_turns_its_rows(be, dim):
    from dsv4_core.contract.dtypes import RowLayout

    given, made = normed(be, 5, dim=dim)
    layout = RowLayout("kv", dim, 64)
    index = oracle.guarded(torch.tensor([3, -1, 0, 7, 2], dtype=torch.int32))
    caches = [torch.full((9, layout.width), 7, dtype=torch.uint8) for _ in range(2)]
    rows = be.rms_norm_rope(*given, eps=1e-6).reshape((5, dim))
    _, ran = launches(be, "cache_write", caches[0], rows, index, layout=layout)
    assert ran == ["write_kv_kernel"]
    be.cache_write(caches[1], made.clone(), index, layout=layout)
    assert torch.equal(*caches)
    assert torch.equal(rows.clone(), made)  # and whoever wants the rows has them


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("kept", [True, False])
def test_packing_norms_turns_and_rotates_its_keys(be, rows, kept):
    from dsv4_core.contract.dtypes import RowLayout

    given, made = normed(be, rows, dim=128)
    layout = RowLayout("key", 128)
    index = oracle.guarded((torch.arange(rows) * 3 % 19 - (torch.arange(rows) == 2).int() * 20).int().clamp(min=-1))
    caches = [torch.full((20, layout.width), 7, dtype=torch.uint8) for _ in range(2)]
    keys, ran = launches(be, "hadamard", be.rms_norm_rope(*given, eps=1e-6).reshape((rows, 128)))
    assert ran == []
    if not kept:
        settle(keys)
    _, ran = launches(be, "cache_write", caches[0], keys, index, layout=layout)
    assert ran == (["write_turned_key_kernel"] if kept else ["write_key_kernel"])
    rotated = be.hadamard(made.clone())
    be.cache_write(caches[1], rotated.clone(), index, layout=layout)
    assert torch.equal(*caches)
    assert torch.equal(keys.clone(), rotated.clone())


def norm_of(be, tokens, seed=61, dim=512):
    """An input of products, as the graph has it."""
    return be.rms_norm(oracle.normal(tokens, dim, seed=seed), oracle.normal(dim, seed=seed + 1), eps=1e-6)


@pytest.mark.parametrize("dim", [512, 4096])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_products_of_one_input_are_launched_by_their_first_reader(be, first, dim):
    """FP8 and BF16 ones, as many of each as a launch takes; in one piece, and in several."""
    x = norm_of(be, 3, dim=dim)
    weights = [scaled(n, dim, seed=63 + n) for n in (192, 64, 128)]
    plain = [oracle.normal(n, dim, seed=64 + i) for i, n in enumerate((96, 96, 32, 32, 16))]

    def calls(x):
        out = [be.linear(x, w, out_dtype="bfloat16") for w in weights]
        out += [be.kv_score(x, *plain[:2]), be.kv_score(x, *plain[2:4]), be.linear(x, plain[4], out_dtype="float32")]
        return out

    waiting = calls(x)
    assert all(isinstance(y, Waiting) and y.later.waits and y.later.pieces is None for y in waiting)
    want = [y.clone() for y in calls(x.clone())]
    _, ran = launches(be, "hadamard", waiting[first].reshape((-1, 64)))
    assert [k for k in ran if "matmul" in k] == [
        "input_matmul_kernel",
        "scaled_matmul_kernel",
    ]  # two FP8 ones at a time
    _, ran = launches(
        be,
        "index_scores",
        oracle.normal(1, 3, 16, 32, seed=9),
        waiting[5].reshape((1, 3, 16)),
        oracle.normal(1, 20, 32, seed=10),
        scale=0.1,
    )
    assert ran == ["index_scores_kernel"]
    assert x.products == {(True, torch.bfloat16): [], (False, torch.float32): []}
    for got, exact in zip(waiting, want, strict=True):  # in other pieces than alone
        torch.testing.assert_close(got.clone().float(), exact.float(), rtol=2**-7, atol=1e-4 * float(exact.abs().max()))


def test_who_adds_pieces_up_launches_a_product_that_waits(be):
    x, weight = norm_of(be, 3, dim=4096), oracle.normal(16, 4096, seed=64)
    waits = be.linear(x, weight, out_dtype="float32")
    operands = oracle.normal(1, 3, 16, 32, seed=9), oracle.normal(1, 20, 32, seed=10)

    def scored(y):
        return launches(be, "index_scores", operands[0], y.reshape((1, 3, 16)), operands[1], scale=0.1)

    got, ran = scored(waits)
    assert ran == ["dense_matmul_kernel", "index_scores_kernel"]
    assert torch.equal(got, scored(be.linear(x, weight, out_dtype="float32").clone())[0])


def test_what_stands_alone_is_launched_at_once(be):
    """Inputs that are no norm, steps of many tokens, and where bits may not depend on others."""
    weight = scaled(192, 512, seed=63)
    invariant = CudaBackend(interpret=True, batch_invariant=True)
    for backend, x in ((be, norm_of(be, 3).clone()), (be, norm_of(be, 17)), (invariant, norm_of(invariant, 3))):
        y, ran = launches(backend, "linear", x, weight, out_dtype="bfloat16")
        assert "scaled_matmul_kernel" in ran
        assert type(y) is torch.Tensor
