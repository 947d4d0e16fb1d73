"""Contracts in Triton kernels of our own, which ``-O prefer=triton`` asks for: vector work that
PyTorch's operators need many launches for.

A kernel runs on a chip by Triton-Ascend, in simulation in Triton's repaired interpreter, and in a
dry run not at all. What a product with FP8 or FP4 weights multiplies is rounded by the kernel that
makes it, and kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from dsv4_backend_torch.interpret import InterpreterError, activate

from dsv4_backend_ascend import vendor
from dsv4_backend_ascend.cann import moe, norm
from dsv4_backend_ascend.cann.call import RefusedError, planning, tell
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_backend_ascend.chip import ChipBackend
    from dsv4_core.contract.dtypes import Format, RowLayout, ScaledArray

Mixed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

VECTOR_CORES = {"910B": 48, "910C": 48, "950": 72}
"""Programs of a launch where no chip is asked: vector cores of a target in the compiler."""
AT_ONCE = 1024  # elements of a unit: a few buffers of them fit a core's 192 KB
INT32 = (1 << 31) - 1
PACKAGE = "triton-ascend 3.2.0 goes with CANN 8.5.0, 3.2.1 with 9.0.0, 3.2.2 with 9.1.0"


def ready(standing: str) -> None:
    """Make kernels runnable; raise ``BackendError`` where Triton is missing or not Ascend's."""
    if standing == "planned":
        return
    if not installed(standing):
        raise BackendError(
            f"backend 'ascend': prefer=triton: no Triton{'' if standing == 'simulated' else ' for Ascend'} is installed ({PACKAGE}; "
            "simulation takes triton 3.9.0); leave prefer out"
        )
    if standing == "simulated":
        try:
            activate()
        except InterpreterError as error:
            raise BackendError(f"backend 'ascend': prefer=triton: {error}") from error


def installed(standing: str) -> bool:
    """Whether a Triton is there that runs kernels on a chip, or interprets them in simulation."""
    return find_spec("triton") is not None and (standing != "found" or find_spec("triton.backends.ascend") is not None)


def vector_cores(standing: str, generation: str) -> int:
    """Programs of a launch: one for each vector core."""
    if standing != "found":
        return VECTOR_CORES[generation]
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(torch.npu.current_device())
    return int(properties["num_vectorcore"])


def launch(
    backend: ChipBackend, kernel: str, units: int, *arguments: Any, results: Sequence[torch.Tensor], **constants: Any
) -> None:
    """Run ``module.kernel`` over ``units``; in a dry run tell of it, with its arguments and what is
    compiled in.
    """
    if planning():
        tell(f"triton::{kernel}", (arguments, constants), results)
        return
    module, _, name = kernel.partition(".")
    function = getattr(import_module(f"dsv4_backend_ascend.kernels.{module}"), name)
    function[(min(units, backend.vector_cores),)](*arguments, **constants)


def refuse(unless: bool, reason: str) -> None:
    """Raise ``RefusedError`` where a kernel does not take a call."""
    if not unless:
        raise RefusedError(f"no Triton kernel: {reason}")


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def is_power(n: int) -> bool:
    """Whether a block of this size exists in Triton."""
    return n > 0 and n & (n - 1) == 0


def plain(*arrays: torch.Tensor | None) -> None:
    """Refuse activations that are not BF16, and what 32 bits do not number."""
    for array in arrays:
        if array is not None:
            refuse(array.dtype == torch.bfloat16, f"{str(array.dtype).removeprefix('torch.')}, it takes bfloat16")
            refuse(array.numel() <= INT32, f"{array.numel()} elements, it takes up to {INT32}")


def rounds(backend: ChipBackend, channels: int) -> bool:
    """Whether products on this chip take rows of so many channels on the FP8 grid; 950 quantises by
    an operator.
    """
    return backend.generation != "950" and backend.activations == "fp8" and channels % FP8_BLOCK == 0


def beside(backend: ChipBackend, y: torch.Tensor, rounded: torch.Tensor, fmt: Format = "e4m3") -> torch.Tensor:
    """Keep a result's rounded form for whoever asks for it next."""
    backend.kept.once((y, fmt), lambda: rounded)
    return y


def act_qdq(backend: ChipBackend, x: torch.Tensor, *, format: Format, block: int, channels: int) -> torch.Tensor:
    """Contract ``act_qdq``; what ``hadamard`` rounded already is at hand."""
    plain(x)
    dim, whole = x.shape[1], channels == x.shape[1]
    refuse(is_power(block) and block <= AT_ONCE, f"groups of {block} channels")
    refuse(channels > 0 and (whole or power_of_two(dim) <= 4 * AT_ONCE), f"{channels} of {dim} channels")
    if whole and (format, block) == ("e2m1", FP4_GROUP) and (kept := backend.kept.result((x, format))) is not None:
        return kept  # type: ignore[no-any-return]
    x = x.contiguous()
    y = torch.empty_like(x)
    span = AT_ONCE if whole else dim
    launch(
        backend, "rounding.round_kernel", -(-x.numel() // span), x, y, -(-x.numel() // span), x.numel(), results=[y],
        SPAN=span, PADDED=max(block, power_of_two(span)), CHANNELS=span if whole else channels, BLOCK=block, FP4=format == "e2m1",
    )  # fmt: skip
    return y


def rms_norm(backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """Contract ``rms_norm``; rows on the FP8 grid beside it."""
    plain(x)
    refuse(x.stride(1) == 1, "channels that are not neighbours")
    rows, dim = x.shape
    rounding = weight is not None and rounds(backend, dim)
    y = x.new_empty(x.shape)
    rounded = torch.empty_like(y) if rounding else y
    launch(
        backend, "norm.norm_kernel", rows, x, x if weight is None else weight, y, rounded, rows, x.stride(0), eps, results=[y, rounded],
        DIM=dim, BLOCK=_part(dim), WEIGHTED=weight is not None, ROUND=rounding,
    )  # fmt: skip
    return beside(backend, y, rounded) if rounding else y


def _part(channels: int) -> int:
    """Channels of a row that are worked on at a time."""
    return min(AT_ONCE, max(FP8_BLOCK, power_of_two(channels)))


def _turned(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, freqs: torch.Tensor,
    *, eps: float, normed: bool, inverse: bool,
) -> torch.Tensor:  # fmt: skip
    plain(x)
    tokens, heads, dim = x.shape
    turned = 2 * freqs.shape[0]
    refuse(is_power(turned) and turned <= dim, f"{turned} channels to turn")
    refuse(dim <= 2 * AT_ONCE, f"heads of {dim} channels")
    x = x.contiguous()
    cosine, sine = norm.angles(backend, positions, freqs, inverse=False)
    y = torch.empty_like(x)
    launch(
        backend, "norm.rope_kernel", tokens * heads, x, x if weight is None else weight, cosine, sine, y, tokens * heads, heads, eps, results=[y],
        DIM=dim, BLOCK=power_of_two(dim), TURNED=turned, NORM=normed, WEIGHTED=weight is not None, INVERSE=inverse,
    )  # fmt: skip
    return y


def rms_norm_rope(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, freqs: torch.Tensor, *, eps: float
) -> torch.Tensor:  # fmt: skip
    """Contract ``rms_norm_rope``."""
    return _turned(backend, x, weight, positions, freqs, eps=eps, normed=True, inverse=False)


def apply_rope(
    backend: ChipBackend, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    """Contract ``apply_rope``."""
    return _turned(backend, x, None, positions, freqs, eps=0.0, normed=False, inverse=inverse)


def _mixed(
    backend: ChipBackend, h: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, weight: torch.Tensor | None,
    *, norm_eps: float, eps: float, iters: int,
) -> Mixed:  # fmt: skip
    plain(h)
    tokens, hc, dim = h.shape
    refuse(is_power(hc), f"{hc} streams")
    h = h.contiguous()
    mixes = torch.nn.functional.linear(h.reshape(tokens, hc * dim).float(), fn.float())
    rounding = weight is not None and rounds(backend, dim)
    y = h.new_empty((tokens, dim))
    post, comb = mixes.new_empty((tokens, hc)), mixes.new_empty((tokens, hc, hc))
    rounded = torch.empty_like(y) if rounding else y
    launch(
        backend, "mhc.mix_kernel", tokens, h, mixes, scale.float(), base.float(), h if weight is None else weight, y, post, comb, rounded,
        tokens, norm_eps, eps, iters, results=[y, post, comb, rounded],
        DIM=dim, BLOCK=_part(dim), HC=hc, NORM=weight is not None, ROUND=rounding,
    )  # fmt: skip
    return (beside(backend, y, rounded) if rounding else y), post, comb


def hc_pre(backend: ChipBackend, *arrays: torch.Tensor, norm_eps: float, eps: float, iters: int) -> Mixed:
    """Contract ``hc_pre``: a product, and all the rest in one launch."""
    return _mixed(backend, *arrays, None, norm_eps=norm_eps, eps=eps, iters=iters)  # type: ignore[arg-type]


def hc_pre_norm(
    backend: ChipBackend, h: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, weight: torch.Tensor,
    *, norm_eps: float, eps: float, iters: int,
) -> Mixed:  # fmt: skip
    """Contract ``hc_pre_norm``; the extension's operator makes the product too, where it serves."""
    scalars: dict[str, Any] = {"norm_eps": norm_eps, "eps": eps, "iters": iters}
    if not planning() or not backend.planning:
        answer = backend.planned("hc_pre", (h, fn, scale, base), scalars)
        if answer.tier == "vendor":
            y, post, comb = vendor.hc_pre(h, fn, scale, base, **scalars)
            return rms_norm(backend, y, weight, eps=norm_eps), post, comb
    return _mixed(backend, h, fn, scale, base, weight, **scalars)


def hadamard(backend: ChipBackend, x: torch.Tensor) -> torch.Tensor:
    """Contract ``hadamard``; rows on the FP4 grid beside it."""
    plain(x)
    rows, dim = x.shape
    refuse(is_power(dim) and FP4_GROUP <= dim <= AT_ONCE, f"{dim} channels")
    x = x.contiguous()
    y, rounded = torch.empty_like(x), torch.empty_like(x)
    launch(
        backend, "hadamard.hadamard_kernel", rows, x, y, rounded, rows, dim**-0.5, results=[y, rounded],
        DIM=dim, STAGES=dim.bit_length() - 1, ROUND=True,
    )  # fmt: skip
    return beside(backend, y, rounded, "e2m1")


def cache_write(
    backend: ChipBackend, cache: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, *, layout: RowLayout
) -> torch.Tensor:
    """Contract ``cache_write`` of plain rows."""
    refuse(layout.kind == "plain", f"rows packed as {layout.kind}")
    _rows_fit(cache, rows)
    launch(
        backend, "rows.write_kernel", index.shape[0], cache, rows.contiguous(), index, index.shape[0], results=[cache],
        DIM=cache.shape[1], BLOCK=power_of_two(cache.shape[1]),
    )  # fmt: skip
    return cache


def _rows_fit(cache: torch.Tensor, rows: torch.Tensor) -> None:
    refuse(cache.is_contiguous(), "a cache with gaps")
    refuse(cache.dtype == rows.dtype and cache.dtype in {torch.bfloat16, torch.float32}, f"rows of {rows.dtype}")
    refuse(cache.shape[1] <= 8 * AT_ONCE, f"rows of {cache.shape[1]} channels")


def cache_read(backend: ChipBackend, cache: torch.Tensor, index: torch.Tensor, *, layout: RowLayout) -> torch.Tensor:
    """Contract ``cache_read`` of plain rows."""
    refuse(layout.kind == "plain", f"rows packed as {layout.kind}")
    return joined(backend, cache, index, None, None, None, zeros=0)


def joined(
    backend: ChipBackend, ring: torch.Tensor, ring_index: torch.Tensor, kv: torch.Tensor | None, rows: torch.Tensor | None,
    index: torch.Tensor | None, *, zeros: int,
) -> torch.Tensor:  # fmt: skip
    """Plain rows of the ring by slot, this step's, those of the cache by slot, and rows of zeros,
    one below the other.
    """
    _rows_fit(ring, ring if kv is None else kv)
    counts = [
        ring_index.shape[0],
        0 if kv is None else kv.shape[0],
        0 if rows is None or index is None else index.shape[0],
        zeros,
    ]
    out = ring.new_empty((sum(counts), ring.shape[1]))
    launch(
        backend, "rows.join_kernel", max(counts), ring, ring_index, ring if kv is None else kv.contiguous(), ring if rows is None else rows,
        ring_index if index is None else index, out, *counts, results=[out], DIM=ring.shape[1], BLOCK=power_of_two(ring.shape[1]),
    )  # fmt: skip
    return out


def cached_compress(
    backend: ChipBackend, kv_score: torch.Tensor, state: torch.Tensor, index: torch.Tensor, ape: torch.Tensor, window_idxs: torch.Tensor,
    *, dim: int,
) -> torch.Tensor:  # fmt: skip
    """Contract ``cached_compress``."""
    return _compressed(backend, kv_score, state, index, index.shape[0], ape, window_idxs, dim=dim)


def compress(
    backend: ChipBackend, kv_score: torch.Tensor, ape: torch.Tensor, window_idxs: torch.Tensor, *, dim: int
) -> torch.Tensor:
    """Contract ``compress``: nothing is read from a cache."""
    return _compressed(backend, kv_score, kv_score, window_idxs, 0, ape, window_idxs, dim=dim)


def _compressed(
    backend: ChipBackend, kv_score: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, recent: int, ape: torch.Tensor,
    window_idxs: torch.Tensor, *, dim: int,
) -> torch.Tensor:  # fmt: skip
    refuse(all(t.dtype == torch.float32 for t in (kv_score, state, ape)), "it takes float32")
    ratio, width = ape.shape
    rows, span = window_idxs.shape
    block = min(FP8_BLOCK, power_of_two(dim))
    parts = -(-dim // block)
    y = torch.empty((rows, dim), dtype=torch.bfloat16, device=kv_score.device)
    launch(
        backend, "compress.compress_kernel", rows * parts, kv_score.contiguous(), state.contiguous(), slots, ape.contiguous(),
        window_idxs.contiguous(), y, rows * parts, recent, results=[y],
        DIM=dim, WIDTH=width, RATIO=ratio, SPAN=span, BLOCK=block, PARTS=parts,
    )  # fmt: skip
    return y


def _routed(
    backend: ChipBackend, x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None,
    ids: torch.Tensor | None, *, topk: int, route_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens, experts = x.shape[0], router.shape[0]
    refuse(experts <= AT_ONCE and topk <= experts, f"{topk} of {experts} experts")
    logits = moe.router_logits(backend, x, router)
    weights = torch.empty((tokens, topk), dtype=torch.float32, device=x.device)
    picks = torch.empty((tokens, topk), dtype=torch.int32, device=x.device)
    launch(
        backend, "gate.gate_kernel", tokens, logits, logits if bias is None else bias.float(), picks if table is None else table,
        picks if ids is None else ids, weights, picks, tokens, route_scale, results=[weights, picks],
        EXPERTS=experts, BLOCK=power_of_two(experts), TOPK=topk, PADDED=power_of_two(topk), HASH=table is not None,
    )  # fmt: skip
    return moe.routed(backend, (weights, picks), router)


def gate(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contract ``gate``: a product and a launch."""
    return _routed(backend, x, weight, bias, None, None, topk=topk, route_scale=route_scale)


def gate_hash(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor, tid2eid: torch.Tensor, ids: torch.Tensor, *, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Contract ``gate_hash``: a product and a launch."""
    return _routed(backend, x, weight, None, tid2eid.contiguous(), ids, topk=tid2eid.shape[1], route_scale=route_scale)


def swiglu(
    backend: ChipBackend, gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, *, limit: float
) -> torch.Tensor:
    """Contract ``swiglu``; rows on the FP8 grid beside it."""
    plain(gate, up)
    refuse(gate.stride(1) == up.stride(1) == 1, "channels that are not neighbours")
    rows, channels = gate.shape
    block = _part(channels)
    parts = -(-channels // block)
    rounding = rounds(backend, channels)
    y = gate.new_empty((rows, channels))
    rounded = torch.empty_like(y) if rounding else y
    launch(
        backend, "experts.gated_kernel", rows * parts, gate, up, y if weights is None else weights, y, rounded, rows * parts, parts,
        gate.stride(0), up.stride(0), channels, limit, results=[y, rounded], BLOCK=block, WEIGHTED=weights is not None, ROUND=rounding,
    )  # fmt: skip
    return beside(backend, y, rounded) if rounding else y


def expanded(backend: ChipBackend, stacks: Sequence[ScaledArray], own: torch.Tensor) -> torch.Tensor:
    """BF16 [projections, rows x out x in] of the experts that rows have, of three FP4 stacks.

    Raises ``RefusedError`` where an expert is not a whole number of units.
    """
    groups = stacks[0].scale[0].numel()
    block = 256
    while groups % block:
        block //= 2
    refuse(block >= 16 and len(stacks) == 3, f"experts of {groups} groups")
    count = own.shape[0] * (groups // block)
    out = torch.empty((3, own.shape[0] * groups * FP4_GROUP), dtype=torch.bfloat16, device=own.device)
    parts = [part for stack in stacks for part in (stack.data, stack.scale)]
    launch(
        backend, "experts.expand_kernel", count, *parts, own, out.view(torch.int32), count, groups // block, results=[out],
        GROUPS=block,
    )  # fmt: skip
    return out


def combined(
    backend: ChipBackend, rows: torch.Tensor, shared: torch.Tensor | None, topk: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """Sum of each token's rows [tokens x topk, dim], and the shared expert's."""
    plain(rows)
    tokens, dim = rows.shape[0] // topk, rows.shape[1]
    parts = -(-dim // AT_ONCE)
    y = torch.empty((tokens, dim), dtype=out_dtype, device=rows.device)
    launch(
        backend, "experts.combine_kernel", tokens * parts, rows.contiguous(), y if shared is None else shared.contiguous(), y, tokens * parts,
        parts, dim, results=[y], TOPK=topk, SHARED=shared is not None, BLOCK=AT_ONCE,
    )  # fmt: skip
    return y


KERNELS: Mapping[str, Callable[..., Any]] = {
    "act_qdq": act_qdq,
    "rms_norm": rms_norm,
    "rms_norm_rope": rms_norm_rope,
    "apply_rope": apply_rope,
    "hc_pre": hc_pre,
    "hc_pre_norm": hc_pre_norm,
    "hadamard": hadamard,
    "cache_write": cache_write,
    "cache_read": cache_read,
    "compress": compress,
    "cached_compress": cached_compress,
    "gate": gate,
    "gate_hash": gate_hash,
    "swiglu": swiglu,
}
"""Contracts that have a kernel; ``moe`` and ``cached_sparse_attn`` use others on their way."""
