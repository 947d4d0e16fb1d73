"""Kernels of other libraries, for the ops that they have: chosen with ``-O
prefer=flash_mla,deep_gemm,flashinfer``, and imported then alone.

Each call is written down with its published signature, where it fits, and how the contract's
operands become its own. A call that does not fit is ours, op by op. ``difference`` holds one
against the kernel that it stands for, on the same GPU; the suite runs that as a check of the
backend's, beside the op's own cases, which judge the library like any other implementation.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from dsv4_core.contract.dtypes import FP8_BLOCK, ScaledArray, dtype_name
from dsv4_core.contract.spec import BackendError

STREAMS = 4  # of flashinfer's hyper-connections
LOWER = 1  # flashinfer's TopKTieBreak.SMALL: of equal scores the lower row
PICKS = 128  # FlashMLA walks a token's list in blocks; -1 is nothing to it, as here
FLOAT_SCALES = "float_scales"
"""Attribute of a weight's scale bytes: the same as float32, made at the first product. Weights are
never written again.
"""


def sparse_attn(
    function: Any, be: Any, q: Tensor, kv: Tensor, attn_sink: Tensor, topk_idxs: Tensor, *, softmax_scale: float
) -> Tensor:
    """``ops/attention.py: sparse_attn`` by ``flash_mla_sparse_fwd``."""
    del be
    picks = torch.nn.functional.pad(topk_idxs, (0, -topk_idxs.shape[1] % PICKS), value=-1)
    return function(  # type: ignore[no-any-return]
        q.contiguous(),
        kv.contiguous()[:, None],
        picks[:, None],
        softmax_scale,
        d_v=q.shape[2],
        attn_sink=attn_sink.contiguous(),
    )[0]


def cached_sparse_attn(
    function: Any, be: Any, q: Tensor, kv: Tensor, ring: Tensor, ring_index: Tensor, rows: Tensor | None, row_index: Tensor | None,
    attn_sink: Tensor, topk_idxs: Tensor, *, layout: Any, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """``cached_sparse_attn``: rows are widened by our kernel, attended to by the library."""
    from dsv4_backend_cuda.kernels.unpack import unpack_rows

    kv, ring, ring_index, topk_idxs = (t.contiguous() for t in (kv, ring, ring_index, topk_idxs))
    rows, row_index = (None if t is None else t.contiguous() for t in (rows, row_index))
    table, picks = unpack_rows(kv, ring, ring_index, rows, row_index, topk_idxs, rope_dim=layout.rope_dim)
    return sparse_attn(function, be, q, table, attn_sink, picks, softmax_scale=softmax_scale)


def linear(function: Any, be: Any, x: Tensor, weight: ScaledArray, *, out_dtype: str) -> Tensor:
    """``ops/matmul.py: linear`` for FP8 weights by ``fp8_gemm_nt``: its scales are float32."""
    codes, scales = be.act_quant(x, block=FP8_BLOCK)
    if not hasattr(weight.scale, FLOAT_SCALES):
        setattr(weight.scale, FLOAT_SCALES, float_scales(weight.scale))
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=getattr(torch, out_dtype), device=x.device)
    e4m3 = torch.float8_e4m3fn
    function((codes.view(e4m3), float_scales(scales)), (weight.data.view(e4m3), getattr(weight.scale, FLOAT_SCALES)), y)
    return y


def float_scales(exponents: Tensor) -> Tensor:
    """2^(byte - 127) as float32, of bytes that are neither 0 nor 255."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def index_select(function: Any, be: Any, scores: Tensor, visible: Tensor, offset: Tensor, *, topk: int) -> Tensor:
    """``ops/attention.py: index_select`` by ``top_k_ragged_transform``, a row of scores a token."""
    del be
    batch, seq, rows = scores.shape
    flat, starts, lengths = scores.reshape(batch * seq, rows), offset.reshape(-1), visible.reshape(-1)
    picks = function(
        flat.contiguous(), starts.contiguous(), lengths.contiguous(), topk, deterministic=True, tie_break=LOWER
    )
    return picks.reshape(batch, seq, topk)  # type: ignore[no-any-return]


def cached_index_topk(function: Any, be: Any, *arrays: Any, **scalars: Any) -> Tensor:
    """``cached_index_topk``: keys are scored by our kernel, rows picked by the library."""
    from dsv4_backend_cuda import bindings

    def select(scores: Tensor, visible: Tensor, offset: Tensor, *, topk: int) -> Tensor:
        return index_select(function, be, scores, visible, offset, topk=topk)

    return bindings.cached_index_topk(be, *arrays, **scalars, select=select)


def hc_post(function: Any, be: Any, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``ops/mhc.py: hc_post`` by ``mhc_post``, which reads ``comb`` transposed too."""
    del be
    return function(y.contiguous(), h.contiguous(), post.contiguous(), comb.contiguous())  # type: ignore[no-any-return]


def fits_index_select(*arrays: Any, topk: int, **scalars: Any) -> str:
    """Why ``top_k_ragged_transform`` cannot, or nothing."""
    del scalars
    return "" if topk and all(arrays[-1].shape) else "no row is to be picked"


def fits_cached_index_topk(*arrays: Any, layout: Any, **scalars: Any) -> str:
    """The same over cached keys, which our kernel reads where they are packed."""
    return (
        fits_index_select(*arrays, **scalars)
        if layout.kind == "key"
        else f"rows of layout {layout.kind!r} are not packed"
    )


def fits_hc_post(y: Any, h: Any, post: Any, comb: Any) -> str:
    """Why ``mhc_post`` cannot, or nothing."""
    del y, post, comb
    if h.shape[1] != STREAMS:
        return f"{h.shape[1]} streams are not {STREAMS}"
    return "" if h.shape[0] else "no token is given"


def fits_sparse_attn(*arrays: Any, **scalars: Any) -> str:
    """Why ``flash_mla_sparse_fwd`` cannot, or nothing; queries come first and picks last."""
    del scalars
    q, picks = arrays[0], arrays[-1]
    if q.shape[1] not in {64, 128}:
        return f"{q.shape[1]} heads are not 64 or 128"
    if q.shape[2] != 512:
        return f"{q.shape[2]} channels are not 512"
    return "" if picks.shape[1] and q.shape[0] else "no row is listed"


def fits_cached_sparse_attn(*arrays: Any, layout: Any, **scalars: Any) -> str:
    """The same over cached rows, which our kernel widens where they are packed."""
    return (
        fits_sparse_attn(*arrays, **scalars)
        if layout.kind == "kv"
        else f"rows of layout {layout.kind!r} are not packed"
    )


def fits_linear(x: Any, weight: Any, *, out_dtype: str) -> str:
    """Why ``fp8_gemm_nt`` cannot, or nothing."""
    del out_dtype
    if not dtype_name(weight).startswith("float8"):
        return f"the weight is {dtype_name(weight)}, not FP8"
    return (
        ""
        if x.shape[0] and x.shape[1] % FP8_BLOCK == 0
        else f"{x.shape[1]} input channels are no multiple of {FP8_BLOCK}"
    )


@dataclass(frozen=True)
class Call:
    """A function of a library. ``signature``: its published parameters. ``fits``: operands as the
    contract has them -> why it cannot, or nothing.
    """

    library: str
    function: str
    signature: str
    architectures: tuple[int, ...]
    fits: Callable[..., str]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Library:
    """``source``: where its signatures were read."""

    package: str
    source: str
    install: str


LIBRARIES = {
    "flash_mla": Library(
        "flash_mla", "deepseek-ai/FlashMLA at 9241ae3", "build it from https://github.com/deepseek-ai/FlashMLA"
    ),
    "deep_gemm": Library(
        "deep_gemm",
        "deepseek-ai/DeepGEMM at 54e2261",
        "pip install sgl-deep-gemm, or build https://github.com/deepseek-ai/DeepGEMM",
    ),
    "flashinfer": Library(
        "flashinfer",
        "flashinfer-ai/flashinfer at ed0e27f (topk.py) and 185cd95 (mhc.py)",
        "pip install flashinfer-python",
    ),
}
_SPARSE = "flash_mla_sparse_fwd", "(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None)"
_GEMM = "(a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False)"
_TOP_K = (
    "top_k_ragged_transform",
    "(input, offsets, lengths, k, deterministic=False, tie_break=TopKTieBreak.NONE, dsa_graph_safe=False, row_starts=None)",
)
_POST = "mhc.mhc_post", "(x, residual, post_layer_mix, comb_res_mix)"
CALLS: dict[str, Call] = {
    "sparse_attn": Call("flash_mla", *_SPARSE, (90, 100), fits_sparse_attn, sparse_attn),
    "cached_sparse_attn": Call("flash_mla", *_SPARSE, (90, 100), fits_cached_sparse_attn, cached_sparse_attn),
    "linear": Call("deep_gemm", "fp8_gemm_nt", _GEMM, (90, 100), fits_linear, linear),
    "index_select": Call("flashinfer", *_TOP_K, (80, 89, 90, 100, 120), fits_index_select, index_select),
    "cached_index_topk": Call("flashinfer", *_TOP_K, (80, 89, 90, 100, 120), fits_cached_index_topk, cached_index_topk),
    "hc_post": Call("flashinfer", *_POST, (90, 100), fits_hc_post, hc_post),
}
"""By op."""


@dataclass(frozen=True)
class Provider:
    """A call whose library is there. ``name``: library, version and function, as reports have
    it.
    """

    call: Call
    name: str
    function: Any

    def run(self, be: Any, *arrays: Any, **scalars: Any) -> Any:
        """Carry out the op."""
        return self.call.run(self.function, be, *arrays, **scalars)


def named(prefer: str) -> tuple[str, ...]:
    """The libraries of ``-O prefer=``; raise ``BackendError`` for one that is not known."""
    names = tuple(filter(None, prefer.replace(" ", "").split(",")))
    if unknown := [n for n in names if n not in LIBRARIES]:
        raise BackendError(
            f"backend 'cuda': prefer: {unknown[0]!r} is none of {', '.join(LIBRARIES)}; leave it out for our own kernels"
        )
    return names


def load(prefer: str, arch: int) -> Mapping[str, Provider]:
    """Import the libraries named and give what they do, by op; raise ``BackendError`` where one is
    absent, has nothing for this architecture, or has changed its functions.
    """
    found: dict[str, Provider] = {}
    for name in named(prefer):
        library = LIBRARIES[name]
        if find_spec(library.package) is None:
            raise BackendError(
                f"backend 'cuda': prefer={name}: no package {library.package} is installed; {library.install}, or leave it out"
            )
        calls = {op: c for op, c in CALLS.items() if c.library == name and arch in c.architectures}
        if not calls:
            has = sorted({a for c in CALLS.values() if c.library == name for a in c.architectures})
            raise BackendError(
                f"backend 'cuda': prefer={name}: it has kernels for {', '.join(f'sm_{a}' for a in has)}, this GPU is sm_{arch}; leave it out"
            )
        try:
            module = importlib.import_module(library.package)
        except Exception as error:
            raise BackendError(
                f"backend 'cuda': prefer={name}: importing {library.package} failed: {type(error).__name__}: {error}; leave it out"
            ) from error
        for op, call in calls.items():
            function = _named(module, call.function)
            if function is None or (why := changed(function, call.signature)):
                raise BackendError(
                    f"backend 'cuda': prefer={name}: {call.function} {why if function is not None else 'is gone'}; it is called as published in "
                    f"{library.source}. Install that version, or leave it out"
                )
            found[op] = Provider(call, f"{name} {_version(library.package)}: {call.function}", function)
    return found


def _named(module: Any, path: str) -> Any:
    """A function by its dotted name in a library; None where it is gone."""
    *within, name = path.split(".")
    try:
        for part in within:
            module = getattr(module, part, None) or importlib.import_module(f"{module.__name__}.{part}")
    except ImportError:
        return None
    return getattr(module, name, None)


def changed(function: Any, signature: str) -> str:
    """How a function's parameters differ from the published ones in what a call of ours relies on;
    nothing where they cannot be read: of compiled functions and of wrappers that take whatever they
    are given.
    """
    try:
        got = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ""
    want, anything = parameters(signature), {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if anything & {p.kind for p in got.values()}:
        return ""
    if list(got)[: len(want)] != list(want):
        return f"takes ({', '.join(got)}), not ({', '.join(want)})"
    extra = [n for n, p in list(got.items())[len(want) :] if p.default is p.empty]
    return f"wants {extra[0]!r} too" if extra else ""


def parameters(signature: str) -> dict[str, str | None]:
    """Names in a written signature, in order, with their defaults."""
    return {name: default or None for name, default in re.findall(r"(\w+)(?:=([^,)]+))?[,)]", signature)}


def _version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "of unknown version"


def difference(be: Any, op: str) -> str:
    """What a provider computes otherwise than our kernels on the same GPU, in words; nothing where
    they agree.

    Picks are the same rows. Bounds: a unit of BF16 for the two results' rounding; for attention
    half a unit of every probability on each side (``sum p |v|`` is taken in float64); for sums in
    float32 a part in 10^4 of the largest result.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(torch.bfloat16).to(be.device)

    if op == "linear":
        codes = torch.randint(0, 0x78, (384, 512), generator=draw, dtype=torch.uint8)
        scale = torch.randint(116, 124, (3, 4), generator=draw, dtype=torch.uint8)
        arrays: tuple[Any, ...] = (normal(33, 512), ScaledArray(codes.to(be.device), scale.to(be.device), "e4m3"))
        scalars: dict[str, Any] = {"out_dtype": "bfloat16"}
        spread: Any = 0.0
    elif op == "hc_post":
        weights = torch.rand((17, 20), generator=draw).to(be.device)
        arrays = (normal(17, 512), normal(17, STREAMS, 512), weights[:, :4], weights[:, 4:].reshape(17, 4, 4))
        scalars, spread = {}, 0.0
    elif op in {"index_select", "cached_index_topk"}:
        scores = torch.randint(-40, 40, (2, 9, 700), generator=draw).float().to(be.device)  # many are equal
        visible = torch.randint(0, 701, (2, 9), generator=draw, dtype=torch.int32).to(be.device)
        picked = [
            torch.sort(run(be, scores, visible, visible + 5, topk=64)).values
            for run in (be.providers["index_select"].run, be.kernels["index_select"])
        ]
        wrong = int((picked[0] != picked[1]).any(-1).sum())
        return f"{be.providers[op].name} picks other rows than our kernel for {wrong} of 18 tokens" if wrong else ""
    else:
        op = "sparse_attn"  # the cached one is our unpacking before it
        picks = torch.randint(-1, 300, (17, 150), generator=draw, dtype=torch.int32)
        sink = (3 + torch.randn(64, generator=draw)).to(be.device)  # of the size of the lists' own sums
        arrays = (normal(17, 64, 512), normal(300, 512), sink, picks.to(be.device))
        scalars = {"softmax_scale": 512**-0.5}
        rows = arrays[1].double()[arrays[3].clamp(min=0)]
        scores = torch.einsum("thd,tnd->thn", arrays[0].double(), rows) * 512**-0.5
        scores = scores.masked_fill((arrays[3] < 0)[:, None], -torch.inf)
        shares = torch.softmax(torch.cat([scores, sink.double()[None, :, None].expand(17, -1, 1)], 2), 2)[..., :-1]
        spread = torch.einsum("thn,tnd->thd", shares, rows.abs()).float()
    provider = be.providers[op]
    theirs = provider.run(be, *arrays, **scalars).float()
    ours = be.kernels[op](be, *arrays, **scalars).float()
    allowed = 2.0**-7 * ours.abs() + 2.0**-8 * spread + 1e-4 * ours.abs().max()
    worst = float(((theirs - ours).abs() / allowed).max())
    return "" if worst <= 1 else f"{provider.name} is {worst:.1f} times the allowed distance from our kernel"
