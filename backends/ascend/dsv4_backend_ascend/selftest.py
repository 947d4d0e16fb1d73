"""Self-test for hardware: every contract of the cann tier against the composed tier, on the same chip, with the same
operands.

Sizes and data are chosen for what has gone wrong on NPUs: rows and key blocks at high addresses, long contexts, sinks
of both signs, experts without rows, ties,
clamped activations. A difference names the contract, its npu ops, the case and the element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from dsv4_backend_torch.backend import TorchBackend

from dsv4_core.dtypes import BFLOAT16, Experts, Host, quantise_weight
from dsv4_core.ops import FusedOps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_backend_ascend.backend import AscendBackend
    from dsv4_core.dtypes import Format

HIGH_ROWS = (1 << 21) + 4096  # rows of 512 BF16 channels past 2^31 bytes
HIGH_KEYS = 128 * 30_000  # keys past block 29,077, where an address of 32 bits has overflowed
ULPS = 4 * 2.0**-8  # two BF16 units each way at the low end of a binade: both tiers round, and sum in their own order


@dataclass(frozen=True)
class Case:
    """One call of a contract: arrays on the device, scalars."""

    contract: str
    name: str
    arrays: tuple[Any, ...]
    scalars: dict[str, Any]
    exact: bool = False


class Outcome(NamedTuple):
    """What one case showed: ``found`` is empty where both tiers agree; ``skipped`` says why the cann tier was not
    asked.
    """

    contract: str
    case: str
    ops: tuple[str, ...]
    found: str = ""
    skipped: str = ""


class Operands:
    """Random operands, made on the host and taken over by the backend."""

    def __init__(self, backend: AscendBackend, seed: int) -> None:
        self.backend, self.rng = backend, np.random.default_rng(seed)

    def act(self, *shape: int, scale: float = 1.0) -> Any:
        """BF16 activations."""
        return self.take((self.rng.standard_normal(shape, np.float32) * scale).astype(BFLOAT16))

    def wide(self, *shape: int) -> Any:
        """Float32 values."""
        return self.take(self.rng.standard_normal(shape, np.float32))

    def take(self, array: Host) -> Any:
        """Give a host array to the backend."""
        return self.backend.from_numpy(array)

    def weight(self, out: int, cols: int, fmt: Format) -> Any:
        """A quantised weight, loaded."""
        return self.backend.load(quantise_weight(self.rng.standard_normal((out, cols), np.float32), fmt))

    def experts(self, count: int, out: int, cols: int) -> Any:
        """FP4 experts, loaded."""
        made = [quantise_weight(self.rng.standard_normal((out, cols), np.float32), "e2m1") for _ in range(count)]
        return self.backend.load_experts(Experts(made))

    def ids(self, high: int, *shape: int) -> Host:
        """int32 below ``high``."""
        return self.rng.integers(0, high, shape, dtype=np.int32)


def cases(backend: AscendBackend, *, high_rows: int, high_keys: int, seed: int = 0) -> Iterator[Case]:
    """Every case, made when it is reached."""
    o = Operands(backend, seed)
    for name, x, eps in (("tokens=33", o.act(33, 512), 1e-6), ("tiny_values", o.act(5, 512, scale=1e-3), 1e-6)):
        yield Case("rms_norm", name, (x, o.act(512)), {"eps": eps})
    yield Case("rms_norm", "no_weight", (o.act(7, 512), None), {"eps": 1e-6})
    positions = o.take(np.array([0, 1, 77, 65536, 1 << 20], np.int32))
    freqs = o.take((10000.0 ** (-np.arange(32) / 32)).astype(np.float32))
    for inverse in (False, True):
        yield Case(
            "apply_rope",
            f"position=2^20,inverse={inverse}",
            (o.act(5, 64, 512), positions, freqs),
            {"inverse": inverse},
        )
    for fmt in ("e4m3", "e2m1"):
        x = o.act(17, 512)
        x[3] *= 64  # a token far larger than the others: a scale taken over several tokens shows
        x[5] *= 2.0**-10  # and one far smaller
        yield Case("linear", f"{fmt},uneven_tokens", (x, o.weight(192, 512, fmt)), {"out_dtype": "bfloat16"})
    yield Case("grouped_linear", "groups=8", (o.act(9, 8, 512), o.act(8 * 32, 512)), {})
    offsets = o.take(np.array([0, 4, 4, 9, 11], np.int32))
    yield Case("expert_linear", "empty_expert,other_ranks_rows", (o.act(13, 256), o.experts(4, 64, 256), offsets), {})
    for name, scale in (("limit_reached", 12.0), ("small", 1.0)):
        weights = o.take(o.rng.random(19, np.float32))
        yield Case("swiglu", name, (o.act(19, 128, scale=scale), o.act(19, 128, scale=scale), weights), {"limit": 10.0})
    picks = np.stack([o.rng.permutation(8)[:2] for _ in range(23)]).astype(np.int32)
    form = {"first_expert": 0, "n_experts": 8}
    yield Case("dispatch", "ties_keep_their_order", (o.act(23, 64), o.wide(23, 2), o.take(picks)), form, exact=True)
    order = o.rng.permutation(46).astype(np.int32)
    ends = o.take(np.array([0, 20, 40], np.int32))
    yield Case(
        "combine",
        "other_ranks_rows",
        (o.act(46, 64), o.take(order), ends, o.act(23, 64)),
        {"topk": 2, "out_dtype": "bfloat16"},
    )
    yield from _attention_cases(o, high_rows, high_keys)
    h, fn, base = o.act(9, 4, 256), o.wide(24, 1024), o.wide(24)
    scale = o.take(np.array([0.9, 1.1, 0.7], np.float32))
    yield Case("hc_pre", "streams=4", (h, fn, scale, base), {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20})
    comb = o.take(o.rng.random((9, 4, 4), np.float32))
    yield Case("hc_post", "comb_not_symmetric", (o.act(9, 256), h, o.wide(9, 4), comb), {})


def _attention_cases(o: Operands, high_rows: int, high_keys: int) -> Iterator[Case]:
    scale = {"softmax_scale": 512**-0.5}
    picks = o.ids(300, 6, 130)
    picks[1, ::3] = -1
    picks[2] = -1
    sinks = o.take(np.linspace(-6, 12, 64, dtype=np.float32))
    yield Case("sparse_attn", "sinks,holes,no_row", (o.act(6, 64, 512), o.act(300, 512), sinks, o.take(picks)), scale)
    far = o.take(o.ids(8, 3, 16) + np.int32(high_rows - 8))
    kv = o.act(high_rows, 512)
    kv[: high_rows - 8] = 0
    yield Case("sparse_attn", f"row={high_rows}", (o.act(3, 64, 512), kv, sinks, far), scale)
    for name, tokens, rows in (("visible=0..n", 7, 1000), (f"key={high_keys}", 2, high_keys)):
        visible = o.take(np.linspace(0, rows, tokens, dtype=np.int32)[None])
        keys = o.act(1, rows, 128)
        if rows == high_keys:
            keys[:, :-64] *= 0.01  # the best keys are the last ones
        operands = (
            o.act(1, tokens, 64, 128),
            o.wide(1, tokens, 64),
            keys,
            visible,
            o.take(np.zeros((1, tokens), np.int32)),
        )
        yield Case("index_topk", name, operands, {"scale": 0.01, "topk": 32})


def run(
    backend: AscendBackend, *, high_rows: int = HIGH_ROWS, high_keys: int = HIGH_KEYS, seed: int = 0
) -> Iterator[Outcome]:
    """Compare the tiers on every case, one after the other."""
    for case in cases(backend, high_rows=high_rows, high_keys=high_keys, seed=seed):
        yield _compare(backend, case)


def _compare(backend: AscendBackend, case: Case) -> Outcome:
    answer = backend.planned(case.contract, case.arrays, case.scalars)
    ops = tuple(dict.fromkeys(call.op for call in answer.calls))
    if answer.tier == "composed":
        return Outcome(case.contract, case.name, (), skipped=answer.reason)
    try:
        ours = getattr(backend, case.contract)(*case.arrays, **case.scalars)
    except RuntimeError as error:  # a kernel that the installed CANN lacks, or that refuses what its document allows
        return Outcome(case.contract, case.name, ops, found=f"raised {str(error).strip().splitlines()[0]}")
    composed: Callable[..., Any] = getattr(
        TorchBackend if TorchBackend.implements(case.contract) else FusedOps, case.contract
    )
    theirs = composed(backend, *case.arrays, **case.scalars)
    if case.contract == "index_topk":
        ours, theirs = (_pick_scores(backend, case, picks) for picks in (ours, theirs))
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    found = (_difference(i, a, b, exact=case.exact) for i, (a, b) in enumerate(pairs))
    return Outcome(case.contract, case.name, ops, next(filter(None, found), ""))


def _pick_scores(backend: AscendBackend, case: Case, picks: torch.Tensor) -> torch.Tensor:
    """Scores of picks, best first: near-ties may be picked either way, a lower score may not."""
    q, weights, keys, visible, _ = case.arrays
    scores = backend.index_scores(q, weights, keys, scale=case.scalars["scale"])
    valid = (picks >= 0) & (picks < visible.unsqueeze(-1))
    chosen = scores.gather(-1, picks.clamp(min=0).long()).masked_fill(~valid, 0)
    return chosen.sort(-1, descending=True).values


def _difference(index: int, ours: torch.Tensor, theirs: torch.Tensor, *, exact: bool) -> str:
    """The element that is furthest off, in words; nothing where all are within the allowance."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"result {index}: cann {ours.dtype}{list(ours.shape)}, composed {theirs.dtype}{list(theirs.shape)}"
    a, b = (t.to("cpu", torch.float64) for t in (ours, theirs))
    if not a.numel():
        return ""
    allowed = torch.zeros_like(b) if exact else ULPS * (b.abs() + 0.01 * b.abs().amax(-1, keepdim=True))
    excess = torch.where(a.isfinite() | (a == b), (a - b).abs() - allowed, torch.inf)
    worst = int(excess.argmax())
    if float(excess.flatten()[worst]) <= 0:
        return ""
    element = [int(i) for i in np.unravel_index(worst, tuple(b.shape))]
    wrong = int((excess > 0).sum())
    values = f"cann {float(a.flatten()[worst]):.6g}, composed {float(b.flatten()[worst]):.6g}"
    return f"result {index}{element}: {values} ({wrong} of {b.numel()} differ)"
