"""Rounding rules, bit for bit against the reference: random values, every BF16 bit pattern, ties,
zeros, subnormals, huge, inf and NaN.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch.quant import round_to_grid, signed_like, to_e4m3  # noqa: E402

from dsv4_core.contract import registry  # noqa: E402
from dsv4_core.contract.dtypes import BFLOAT16, E4M3_VALUES, RowLayout, ScaledArray, quantise_weight  # noqa: E402

REFERENCE = registry.create("reference")
TORCH = registry.create("torch", weight_cache=0)
EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
FINITE = EVERY_BF16[np.isfinite(EVERY_BF16.astype(np.float32))]


def rows(kind: str) -> np.ndarray:
    """[n, 512] in bfloat16."""
    rng = np.random.default_rng(3)
    if kind == "normal":
        return rng.standard_normal((97, 512)).astype(BFLOAT16)
    if kind == "every finite value":
        return rng.permutation(FINITE)[: 127 * 512].reshape(127, 512)
    if kind == "one magnitude a block":
        return (rng.standard_normal((256, 512)) * np.exp2(rng.integers(-120, 118, (256, 8))).repeat(64, 1)).astype(
            BFLOAT16
        )
    if kind == "ties":  # eighths of the grid's steps: a quarter of them lie halfway
        grid = rng.integers(-448 * 8, 448 * 8, (64, 512)) / 8 * np.exp2(rng.integers(-20, 20, (64, 1)))
        return grid.astype(BFLOAT16)
    if kind == "zeros":
        return np.where(rng.random((9, 512)) < 0.5, 0.0, -0.0).astype(BFLOAT16)
    if kind == "subnormals":
        return rng.integers(0, 128, (33, 512)).astype(np.uint16).view(BFLOAT16)
    if kind == "inf and nan":
        x = rng.standard_normal((8, 512)).astype(BFLOAT16)
        x[1, 3], x[3, 100], x[5, 500] = np.inf, np.nan, -np.inf
        return x
    return np.zeros((0, 512), BFLOAT16)


KINDS = (
    "normal",
    "every finite value",
    "one magnitude a block",
    "ties",
    "zeros",
    "subnormals",
    "inf and nan",
    "no rows",
)


def same_bits(got, want):
    got = TORCH.to_numpy(got)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype == BFLOAT16:  # a NaN is a NaN, whatever its payload
        nan = np.isnan(want.astype(np.float32))
        assert (np.isnan(got.astype(np.float32)) == nan).all()
        got, want = got.view(np.uint16)[~nan], want.view(np.uint16)[~nan]
    np.testing.assert_array_equal(got, want)


@pytest.fixture(params=[True, False], ids=["with float8", "without float8"])
def float8(request, monkeypatch):
    """As a torch that has the small dtypes, and as an older or a vendor's that lacks them."""
    if not request.param:
        for name in [n for n in vars(torch) if n.startswith(("float8", "float4"))]:
            monkeypatch.delattr(torch, name)


@pytest.mark.usefixtures("float8")
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("kind", KINDS)
def test_act_quant(kind):
    x = rows(kind)
    codes, scale = TORCH.act_quant(TORCH.from_numpy(x), block=128)
    want_codes, want_scale = REFERENCE.act_quant(x, block=128)
    same_bits(scale, want_scale)
    same_bits(
        torch.where((codes & 0x7F) == 0x7F, 0x7F, codes),
        np.where((want_codes & 0x7F) == 0x7F, np.uint8(0x7F), want_codes),
    )  # either NaN


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fmt", "block", "channels"), [("e4m3", 64, 448), ("e2m1", 32, 512), ("e4m3", 128, 512)])
def test_act_qdq(kind, fmt, block, channels):
    x = rows(kind)
    if fmt == "e2m1" and kind == "inf and nan":
        x = rows("normal")  # E2M1 has neither
    same_bits(
        TORCH.act_qdq(TORCH.from_numpy(x), format=fmt, block=block, channels=channels),
        REFERENCE.act_qdq(x, format=fmt, block=block, channels=channels),
    )


@pytest.mark.usefixtures("float8")
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "no rows"])
def test_a_decode_steps_rows_are_what_they_are_among_many(kind):
    """The path of a few tokens and that of many, in the batch's first, middle and last rows: same
    bits.
    """
    x = TORCH.from_numpy(rows(kind))
    layout = RowLayout("kv", 512, 64)
    every = torch.zeros((len(x) + 1, layout.width), dtype=torch.uint8)
    TORCH.cache_write(every, x, torch.arange(1, len(x) + 1, dtype=torch.int32), layout=layout)
    codes, scale = TORCH.act_quant(x, block=128)
    for part in (slice(0, 1), slice(len(x) // 2, len(x) // 2 + 3), slice(len(x) - 1, len(x))):
        few = x[part]
        for fmt, block, channels in (("e4m3", 64, 448), ("e2m1", 32, 512)):
            if kind == "inf and nan" and fmt == "e2m1":
                continue
            many = TORCH.act_qdq(x, format=fmt, block=block, channels=channels)[part]
            same_bits(TORCH.act_qdq(few, format=fmt, block=block, channels=channels), TORCH.to_numpy(many))
        for got, want in zip(TORCH.act_quant(few, block=128), (codes, scale), strict=True):
            same_bits(got, TORCH.to_numpy(want[part]))
        if kind != "inf and nan":  # no cached row holds either
            alone = torch.zeros((len(few), layout.width), dtype=torch.uint8)
            TORCH.cache_write(alone, few, torch.arange(len(few), dtype=torch.int32), layout=layout)
            same_bits(alone, TORCH.to_numpy(every[1:][part]))


@pytest.mark.parametrize("values", ["every float16", "around every tie"])
def test_torchs_cast_rounds_as_the_arithmetic_does(values):
    if not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("this torch has no E4M3: the arithmetic is all there is")
    if values == "every float16":
        x = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32))
    else:
        grid = torch.from_numpy(np.unique(E4M3_VALUES[np.isfinite(E4M3_VALUES)]))
        middle = (grid[1:] + grid[:-1]) / 2
        x = torch.cat([middle, *(middle.nextafter(torch.full_like(middle, end)) for end in (-torch.inf, torch.inf))])
    got = to_e4m3(x).to(torch.float32)
    want = round_to_grid(x.to(torch.float64), "e4m3").to(torch.float32)  # float64 is never cast
    assert torch.equal(got.nan_to_num(500), want.nan_to_num(500))
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(want)[~want.isnan()])


def test_float64_is_rounded_once():
    """A midpoint's neighbours in float64 are the midpoint itself in float32: rounding twice would
    go to even.
    """
    middle = 17 * 2.0**-4  # between 1 and 1.125
    x = np.array([[448, middle, np.nextafter(middle, 2), np.nextafter(middle, 0), *[0.0] * 124]])
    backends = [registry.create(name, numerics="float64") for name in ("reference", "torch")]
    for be in backends:
        codes = be.to_numpy(be.act_quant(be.from_numpy(x), block=128)[0])
        np.testing.assert_array_equal(E4M3_VALUES[codes[0, :4]], [448, 1, 1.125, 1])


@pytest.mark.usefixtures("float8")
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "inf and nan"])
@pytest.mark.parametrize(
    "layout",
    [RowLayout("kv", 512, 64), RowLayout("kv", 192, 64), RowLayout("key", 128), RowLayout("plain", 512)],
    ids=str,
)
def test_cache_rows(kind, layout):
    x = np.ascontiguousarray(rows(kind)[:, : layout.dim])
    n, dtype = len(x), "bfloat16" if layout.kind == "plain" else "uint8"
    index = np.random.default_rng(0).permutation(n + 5)[:n].astype(np.int32)
    index[::3] = -1
    caches = [be.zeros((n + 5, layout.width), dtype) for be in (REFERENCE, TORCH)]
    for be, cache in zip((REFERENCE, TORCH), caches, strict=True):
        be.cache_write(cache, be.from_numpy(x), be.from_numpy(index), layout=layout)
    same_bits(caches[1], caches[0])
    same_bits(
        TORCH.cache_read(caches[1], TORCH.from_numpy(index), layout=layout),
        REFERENCE.cache_read(caches[0], index, layout=layout),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("fmt", "shape"), [("e4m3", (256, 384)), ("e4m3", (200, 320)), ("e2m1", (96, 128))])
def test_dequantised_weights(dtype, fmt, shape):
    weight = quantise_weight(np.random.default_rng(1).standard_normal(shape).astype(np.float32), fmt)
    data = np.random.default_rng(2).integers(0, 256, weight.data.shape, dtype=np.uint8)
    if fmt == "e4m3":
        data[(data & 0x7F) == 0x7F] = 0  # NaN
    weight = ScaledArray(data, weight.scale, fmt)
    same_bits(TORCH.dequantise(TORCH.load(weight), getattr(torch, dtype)), weight.dequantise(dtype))


def test_a_torch_without_small_dtypes_runs_a_quantised_layer(monkeypatch):
    for name in [n for n in vars(torch) if n.startswith(("float8", "float4"))]:
        monkeypatch.delattr(torch, name)
    x = rows("normal")[:, :384]
    weight = quantise_weight(np.random.default_rng(1).standard_normal((256, 384)).astype(np.float32), "e4m3")
    got = TORCH.to_numpy(
        TORCH.linear(TORCH.from_numpy(np.ascontiguousarray(x)), TORCH.load(weight), out_dtype="float32")
    )
    np.testing.assert_allclose(got, REFERENCE.linear(x, weight, out_dtype="float32"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_restored_alike_with_and_without_copysign(dtype):
    y = torch.from_numpy(rows("zeros").astype(np.float64)).to(dtype)
    y[0] = torch.linspace(-3, 3, 512)
    rounded = y.round() + 0.0  # as after the addition that rounds: no negative zero
    want = signed_like(rounded.clone(), y, on_cpu=True)
    got = signed_like(rounded.clone(), y, on_cpu=False)
    integer = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(got.view(integer), want.view(integer))
    assert not torch.equal(rounded.view(integer), want.view(integer))
