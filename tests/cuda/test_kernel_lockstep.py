"""Programs that run together compute, bit for bit, what they compute one after another."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from dsv4_backend_cuda.kernels import index, mhc, sparse_attn
from dsv4_backend_torch import lockstep

PROGRAMS = 37


@triton.jit
def wayward_kernel(counts, total, kinds, spread, BLOCK: tl.constexpr):
    """Adds in place, then parts ways: loops of different lengths, from different beginnings, and
    three branches.
    """
    pid = tl.program_id(0)
    tl.store(total + pid, tl.load(total + pid) + 1)  # twice, if a store before the ways part were not taken back
    count = tl.load(counts + pid)
    at = tl.arange(0, BLOCK)
    for start in range(pid, pid + count, BLOCK):
        tl.store(total + pid, tl.load(total + pid) + tl.sum(tl.where(start + at < pid + count, start + at, 0), axis=0))
    if pid % 3 == 0:
        tl.store(kinds + pid, 10)
    elif pid % 3 == 1 and count > 4:
        tl.store(kinds + pid, 20)
    else:
        tl.store(kinds + pid, 30)
    turned = tl.gather(at * pid, (at + 1) % BLOCK, axis=0)
    tl.store(spread + pid * BLOCK + at, tl.histogram((at * pid) % BLOCK, BLOCK) + tl.cumsum(at, axis=0) + turned)


def alone(monkeypatch):
    """One program at a time, as the interpreter has it."""
    monkeypatch.setattr(lockstep, "ELEMENTS", 1)
    monkeypatch.setattr(lockstep, "FIRST", 1)


@pytest.mark.parametrize("together", [True, False])
def test_programs_that_part_ways(together, monkeypatch):
    if not together:
        alone(monkeypatch)
    counts = torch.arange(PROGRAMS, dtype=torch.int32) * 7 % 23
    total, kinds = torch.full((PROGRAMS,), 100, dtype=torch.int32), torch.zeros(PROGRAMS, dtype=torch.int32)
    spread = torch.zeros(PROGRAMS, 8, dtype=torch.int32)
    wayward_kernel[(PROGRAMS,)](counts, total, kinds, spread, BLOCK=8)
    for pid, count in enumerate(counts.tolist()):
        assert total[pid] == 101 + sum(range(pid, pid + count))
        assert kinds[pid] == (10 if pid % 3 == 0 else 20 if pid % 3 == 1 and count > 4 else 30)
        hits = torch.bincount(torch.arange(8) * pid % 8, minlength=8)
        turned = torch.arange(8).roll(-1) * pid
        assert torch.equal(spread[pid], (hits + torch.arange(8).cumsum(0) + turned).int())


@triton.jit
def xor_kernel(x, y, N: tl.constexpr):
    tl.store(y, tl.xor_sum(tl.load(x + tl.arange(0, N)), axis=0))


@triton.jit
def atomic_kernel(x):
    tl.atomic_add(x, 1)


def test_atomics_are_refused():
    with pytest.raises(Exception, match="atomics: programs in lockstep"):
        atomic_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(Exception, match="programs in lockstep know sum"):
        xor_kernel[(1,)](torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), N=8)


def results() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    picks = torch.randint(-1, 90, (13, 70), generator=g, dtype=torch.int32)
    attention = [
        sparse_attn.sparse_attn(normal(13, 16, 64), normal(90, 64), normal(16, dtype=torch.float32), picks, softmax_scale=0.1, split=split)
        for split in (False, True)
    ]  # fmt: skip
    scores = normal(1, 13, 300, dtype=torch.float32)
    visible = torch.randint(0, 301, (1, 13), generator=g, dtype=torch.int32)
    chosen = index.index_select(scores, visible, torch.zeros_like(visible), topk=32)
    mixed = mhc.hc_pre(
        normal(13, 4, 256), normal(24, 1024, dtype=torch.float32), torch.ones(3), torch.zeros(24), norm_eps=1e-6, eps=1e-6, iters=20
    )  # fmt: skip
    return [*attention, chosen, *mixed]


def test_kernels_give_the_same_bits(monkeypatch):
    together = results()
    alone(monkeypatch)
    for a, b in zip(together, results(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
