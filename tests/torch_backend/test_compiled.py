"""The C kernels of a decode step on a CPU: against float64 and against PyTorch's way, built for
every register width, and left out.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend, compiled, kept  # noqa: E402

from dsv4_core.contract.backend import BackendError  # noqa: E402
from dsv4_core.contract.dtypes import Experts, RowLayout, ScaledArray, quantise_weight  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
KINDS = [*DTYPES, "e4m3", "e2m1"]
UNIT = 2.0**-24  # of float32: half of what separates neighbours, relative


HERE = [level for level, (_, needed) in kept.LEVELS.items() if needed <= kept.cpu_flags()]


@pytest.fixture(scope="module", params=["16 bytes", *HERE, *(() if "avx512" in HERE else ("64 bytes",))])
def kernels(request, tmp_path_factory):
    """Built for each level that this CPU runs, and for registers of other widths, which the
    compiler makes of what it has.
    """
    made = tmp_path_factory.mktemp("c") / "kernels.so"
    size, _, unit = request.param.partition(" ")
    flags = ["-march=native", f"-DBYTES={size}"] if unit else kept.LEVELS[request.param][0]
    try:
        kept.compile_kernels([os.environ.get("CC", "cc"), *flags, "-Wall", "-Wextra", "-Werror", "-Wno-psabi"], made)
    except kept.NotCompiledError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(str(error))
    return compiled.Kernels(made, "test")


def test_names_of_the_library_are_its_own_alone(kernels):
    """Else a name that a library of the program has too leads there: with zlib's ``compress`` every
    process of Debian's Python ended in SIGSEGV, since that program is linked with zlib.
    """
    for name in compiled._ARGUMENTS:
        assert kernels.library.find_kernel(name.encode())
        assert not hasattr(kernels.library, name), name


def random(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(dtype)


def weight(kind, out, cols, seed=0):
    """A weight, and its values in float64."""
    plain = random(out, cols, seed=seed)
    if isinstance(kind, torch.dtype):
        return plain.to(kind), plain.to(kind).double()
    host = quantise_weight(plain.numpy(), kind)
    return TorchBackend().load(host), torch.from_numpy(host.dequantise().astype(np.float64))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "out", "cols"), [(1, 5, 32), (3, 129, 384), (16, 2, 4128), (33, 70, 160), (1, 300, 1024)]
)
def test_products(kernels, kind, x_dtype, tokens, out, cols):
    x, pairs = random(tokens, cols, dtype=x_dtype), [weight(kind, out, cols, seed) for seed in (1, 2)]
    got = kernels.products([(x, [w for w, _ in pairs])], torch.float32)
    want = torch.cat([x.double() @ values.T for _, values in pairs], 1)
    terms = torch.cat([x.double().abs() @ values.abs().T for _, values in pairs], 1)
    assert ((got - want).abs() <= cols * UNIT * terms).all()  # any order of sums
    once = kernels.products([(x, [w for w, _ in pairs])], torch.bfloat16)
    assert torch.equal(once, got.bfloat16())


@pytest.mark.parametrize("kind", [*DTYPES, "e4m3"], ids=str)
@pytest.mark.parametrize("tokens", [2, 19])
@pytest.mark.parametrize("cols", [1, 7, 33, 38, 333, 334])
def test_products_of_odd_widths(kernels, kind, cols, tokens):
    dtype = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    x, (w, values) = random(tokens, cols, dtype=dtype), weight(kind, 7, cols)
    got = kernels.products([(x, [w])], torch.float32)
    assert ((got - x.double() @ values.T).abs() <= cols * UNIT * (x.double().abs() @ values.abs().T)).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_code_and_scale(kernels, kind):
    """One channel of x is one, the others zero: what comes out is the weight, bit for bit."""
    if isinstance(kind, torch.dtype):
        bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
        values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        w = values[torch.isfinite(values)][:65024].reshape(-1, 64).to(kind).contiguous()
        want = w.float()
    else:
        codes = torch.arange(256, dtype=torch.uint8)
        if kind == "e4m3":
            codes = codes[codes % 128 != 127]
            data, scale = codes[:, None].expand(-1, 128).repeat(233, 1), torch.arange(233).repeat_interleave(254)
            scale = torch.ones((-(-len(data) // 128), 1), dtype=torch.uint8) * 127
        else:
            data = codes[:, None].expand(-1, 64).repeat(8, 1)
            scale = torch.arange(len(data) * 4).remainder(232).add(1).to(torch.uint8).view(-1, 4)
        w = ScaledArray(data.contiguous(), scale, kind)
        want = TorchBackend(numerics="float32").dequantise(w, torch.float32)
    cols = w.shape[1]
    eye = torch.eye(cols)
    got = torch.cat([kernels.products([(eye[i : i + 1], [w])], torch.float32) for i in range(cols)])
    assert torch.equal(got.T, want)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_among_fp8_codes_makes_its_row_nan(kernels, code, x_dtype):
    data = torch.zeros((3, 160), dtype=torch.uint8)
    data[1, 37], data[2, 150] = code, code
    w = ScaledArray(data, torch.full((1, 2), 127, dtype=torch.uint8), "e4m3")
    got = kernels.products([(torch.zeros((3, 160), dtype=x_dtype), [w])], torch.float32)
    assert got.isnan().tolist() == [[False, True, True]] * 3
    w = ScaledArray(data[:, :128].contiguous(), w.scale[:, :1].contiguous(), "e4m3")
    got = kernels.products([(torch.zeros((3, 128), dtype=x_dtype), [w])], torch.float32)
    assert got.isnan().tolist() == [[False, True, False]] * 3


def test_c_and_python_agree_on_how_many_tokens_are_alike():
    header = Path(compiled.__file__).parent / "c/weights.h"
    assert f"enum {{ ALIKE = {compiled.ALIKE} }};" in header.read_text()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, compiled.ALIKE), (compiled.ALIKE + 1, 40, 200)], ids=["few", "many"])
def test_bits_depend_on_neither_threads_nor_tokens(kernels, kind, sizes):
    """Of up to ALIKE tokens, and of more than those."""
    x, (w, _) = random(max(sizes), 512, dtype=torch.bfloat16), weight(kind, 700, 512)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for size in sizes:  # the last ones have a whole block of their own
                parts = [(i, min(i + size, max(sizes))) for i in range(0, max(sizes), size)]
                parts[-1] = (max(sizes) - size, max(sizes))
                y = x.new_empty((max(sizes), 700), dtype=torch.float32)
                for begin, end in parts:
                    y[begin:end] = kernels.products([(x[begin:end], [w])], torch.float32)
                found.append(y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("numerics", ["native", "float32"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
def test_experts(kernels, numerics, kind, shared):
    """Against PyTorch's way: BF16 may round once more or less, where a sum is at a tie."""
    torch_way = TorchBackend(numerics=numerics, few_tokens_by="torch")
    c_way = TorchBackend(numerics=numerics)
    c_way.compiled = kernels
    w1, w3, w2 = (
        Experts([weight(kind, *shape, seed=10 * p + e)[0] for e in range(6)])
        for p, shape in enumerate(((128, 256), (128, 256), (256, 128)))
    )
    x = torch_way.rounded(random(1, 256))
    shares, indices = random(1, 3).sigmoid(), torch.tensor([[4, 0, 5]], dtype=torch.int32)
    for held in (0, 2):  # all experts; those from 2 on
        scalars = {"first_expert": held, "limit": 10.0, "out_dtype": "float32"}
        operands = (x, shares, indices, torch_way.rounded(random(1, 256, seed=3)) if shared else None)
        split = [Experts([w[e] for e in range(6 - held)]) for w in (w1, w3, w2)]
        got, want = (b.moe(*operands, *split, **scalars) for b in (c_way, torch_way))
        share = 2**-6 if numerics == "native" else 2**-20  # of the largest result; sums are of 256 terms
        near = {"rtol": 0, "atol": share * want.abs().max().item()}
        torch.testing.assert_close(got, want, **near)


def test_limits_of_swiglu_and_nan(kernels):
    experts, one = tuple(Experts([torch.eye(32)]) for _ in range(3)), torch.zeros((1, 1), dtype=torch.int32)
    x = torch.tensor([[100.0, -100.0, 3.0, torch.nan, torch.inf, -0.5, *[0.0] * 26]])
    got = kernels.moe(x, one, None, None, experts, 0, 10.0, torch.float32, quantise=False)
    assert got.isnan().all()  # zeros of the weight times NaN and infinity
    x = torch.tensor([[100.0, -100.0, 3.0, -0.5, *[0.0] * 28]])
    got = kernels.moe(x, one, None, None, experts, 0, 10.0, torch.float32, quantise=False)
    gate, up = x.clamp(max=10), x.clamp(-10, 10)
    torch.testing.assert_close(got, gate * gate.sigmoid() * up, rtol=1e-6, atol=1e-6)


def test_gate_takes_the_lower_of_equals_and_leaves_nan(kernels):
    w = torch.eye(16).repeat(1, 1)
    x = torch.zeros(1, 16)
    x[0, [3, 7, 11]] = 2.0
    shares, indices = kernels.gate(x, w, torch.zeros(16), None, None, 2, 1.5)
    assert indices.tolist() == [[3, 7]]
    torch.testing.assert_close(shares, torch.full((1, 2), 0.75))
    table, ids = torch.tensor([[5, 5], [11, 0], [16, 1]]), torch.tensor([1], dtype=torch.int32)
    shares, indices = kernels.gate(x, w, None, table, ids, 2, 1.5)
    assert indices.tolist() == [[11, 0]]
    assert shares[0, 0] > shares[0, 1]
    x[0, 5] = torch.nan
    assert kernels.gate(x, w, torch.zeros(16), None, None, 2, 1.5) is None
    for outside in (2, 3, -1):  # an expert that there is not, an id without a line
        assert kernels.gate(x * 0, w, None, table, torch.tensor([outside], dtype=torch.int32), 2, 1.5) is None


@pytest.mark.parametrize(
    "layout", [RowLayout("kv", 192, 64), RowLayout("key", 128), RowLayout("plain", 96)], ids=lambda layout: layout.kind
)
def test_cache_rows(kernels, layout):
    """Written and read as PyTorch's way does, bit for bit; absent rows are left out and read as
    zeros.
    """
    backend = TorchBackend(numerics="float32" if layout.kind == "plain" else "native", few_tokens_by="torch")
    rows = backend.rounded(random(5, layout.dim) * torch.tensor([1.0, 1e-20, 1e4, 0.0, 3e-5])[:, None])
    index = torch.tensor([3, -1, 0, 6, 5], dtype=torch.int32)
    dtype = "float32" if layout.kind == "plain" else "uint8"
    caches = [backend.zeros((7, layout.width), dtype).fill_(9) for _ in range(2)]
    backend.cache_write(caches[0], rows, index, layout=layout)
    assert kernels.cache_write(caches[1], rows, index, layout)
    assert torch.equal(*caches)
    read = torch.tensor([6, -1, 0, 3, 3], dtype=torch.int32)
    want = backend.cache_read(caches[0], read, layout=layout)
    assert torch.equal(kernels.cache_read(caches[1], read, layout, backend.act_type), want)
    assert torch.equal(kernels.cache_read(caches[1], read, layout, torch.float32), want.float())


def test_what_is_not_for_them_is_left_to_pytorch(kernels):
    layout, cache = RowLayout("kv", 128, 64), torch.zeros((4, RowLayout("kv", 128, 64).width), dtype=torch.uint8)
    row = torch.ones((1, 128), dtype=torch.bfloat16)
    outside, inside = (torch.tensor([i], dtype=torch.int32) for i in (4, 1))
    assert not kernels.cache_write(cache, row, outside, layout)
    assert kernels.cache_read(cache, outside, layout, torch.bfloat16) is None
    assert not kernels.cache_write(cache, torch.full_like(row, torch.inf), inside, layout)
    assert kernels.cache_write(cache, row, inside, layout)
    assert kernels.act_qdq(torch.full_like(row, torch.nan), "e4m3", 64, 64) is None
    x, w = random(2, 64), random(3, 64)
    assert kernels.products([(x, [w])], torch.float32) is not None
    assert kernels.products([(x.double(), [w])], torch.float32) is None
    assert kernels.products([(random(64, 2).T, [w])], torch.float32) is None  # not contiguous
    assert kernels.products([(random(2, 63), [w])], torch.float32) is None  # another width
    assert kernels.products([(random(compiled.MANY + 1, 64), [w])], torch.float32) is None
    assert kernels.rms_norm(x, random(63), 1e-6) is None
    uneven, one = (Experts([w]),) * 3, torch.zeros((1, 1), dtype=torch.int32)
    assert kernels.moe(x[:1], one, None, None, uneven, 0, 1.0, torch.float32, quantise=False) is None
    with pytest.raises((IndexError, RuntimeError)):
        TorchBackend().cache_write(cache, row, outside, layout=layout)


BROKEN = {
    "no compiler": (
        {"CC": "no-such-compiler"},
        "no C compiler 'no-such-compiler': install one (gcc), or name it in CC",
    ),
    "one that fails": ({"CC": "false"}, "false does not build c/*.c: nothing; name another compiler in CC"),
    "nowhere to keep it": ({"XDG_CACHE_HOME": "/proc/self"}, "set XDG_CACHE_HOME to a folder that can be written"),
}
RUN = """
import numpy as np
from dsv4_core.contract import registry
backend = registry.create("torch", few_tokens_by={by!r})
x, w = np.ones((1, 64), np.float32), np.full((3, 64), 0.5, np.float32)
backend = registry.create("torch", numerics="float32", few_tokens_by={by!r})
y = backend.linear(backend.from_numpy(x), backend.load(w), out_dtype="float32")
assert (backend.to_numpy(y) == 32).all()
print(backend.describe())
print("; ".join(d.found for d in type(backend).diagnose()))
"""


@pytest.mark.parametrize("why", BROKEN)
def test_without_them_pytorch_computes_and_says_why(why):
    env, message = BROKEN[why]
    env = os.environ | env
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(by="auto")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "C kernels" not in done.stdout.splitlines()[0]
    assert "PyTorch, several times slower than C kernels: " in done.stdout
    assert message in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(by="c")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "BackendError: backend 'torch': few_tokens_by 'c': " in done.stderr
    assert message in done.stderr


def test_the_option():
    with pytest.raises(BackendError, match="few_tokens_by 'fortran' is not one of auto, c, torch"):
        TorchBackend(few_tokens_by="fortran")
    with pytest.raises(
        BackendError, match="few_tokens_by 'c': C kernels have no float64; 'auto' and 'torch' run without"
    ):
        TorchBackend(few_tokens_by="c", numerics="float64")
    with pytest.raises(BackendError, match="few_tokens_by 'c': C kernels run on a CPU, not on meta"):
        TorchBackend(few_tokens_by="c", device="meta")
    assert TorchBackend(few_tokens_by="torch").compiled is None
