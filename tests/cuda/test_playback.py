"""A tape carries out what its kernel's source would: the same bits, also where another way is
taken, and nothing from memory that an operand decides.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from dsv4_backend_torch import lockstep, playback
from test_kernel_lockstep import results, wayward_kernel


@pytest.fixture(autouse=True)
def _fresh():
    playback.forget()


@pytest.fixture
def by_source(monkeypatch):
    """Every launch is interpreted."""

    def switch():
        def untaped(*_):
            found = playback.Tape(0)
            found.unknown = True
            return found

        monkeypatch.setattr(lockstep, "tape_of", untaped)

    return switch


def only_played(monkeypatch):
    def source(*_):
        raise AssertionError("interpreted, and every way was taken before")

    monkeypatch.setattr(lockstep, "Recording", source)


def test_kernels_give_the_same_bits(monkeypatch, by_source):
    first = results()
    with monkeypatch.context() as patch:
        only_played(patch)
        played = results()
    by_source()
    for a, b, c in zip(first, played, results(), strict=True):
        assert torch.equal(a.view(torch.uint8), c.view(torch.uint8))
        assert torch.equal(b.view(torch.uint8), c.view(torch.uint8))


def wayward(counts):
    many = len(counts)
    total, kinds = torch.full((many,), 100, dtype=torch.int32), torch.zeros(many, dtype=torch.int32)
    spread = torch.zeros(many, 8, dtype=torch.int32)
    wayward_kernel[(many,)](torch.tensor(counts, dtype=torch.int32), total, kinds, spread, BLOCK=8)
    return total, kinds, spread


@pytest.mark.parametrize("then", [[3] * 5, [30] * 5, [0, 40, 3, 17, 9], [3]])
def test_a_way_that_was_not_taken_before(then, by_source):
    """Loops of other lengths, other branches, more and fewer programs; what was stored before the
    ways part is taken back.
    """
    wayward([3] * 5)
    got = [wayward(then), wayward([3] * 5), wayward(then)]
    by_source()
    for result, want in zip(got, [wayward(then), wayward([3] * 5), wayward(then)], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


@triton.jit
def scaled_kernel(x, y, count, by, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(y + at, value * by + count, mask=at < N - 1)


def scaled(x, count, by, n=32):
    y = torch.full((n,), -1.0)
    scaled_kernel[(1,)](x, y, count, by, N=n)
    want = torch.where(torch.arange(n) < count, x[:n].float(), 0.0) * by + count
    want[-1] = -1
    assert torch.equal(y, want)


def test_operands_are_read_anew():
    """Pointers, integers, floating-point scalars, types and constants: whatever a launch gives."""
    x = torch.arange(64, dtype=torch.float32)
    for count in (5, 31, 0):
        for by in (1.0, -2.5):
            scaled(x, count, by)
            scaled(x + 7, count, by)
            scaled(x, count, by, n=64)
            scaled(x.bfloat16(), count, by)


def test_a_value_of_unknown_origin_is_not_kept(monkeypatch):
    from triton.runtime import interpreter as it

    plain = it.InterpreterBuilder.create_masked_load

    def copied(self, *args):
        out = plain(self, *args)
        return it.TensorHandle(out.data.copy(), out.dtype)

    monkeypatch.setattr(it.InterpreterBuilder, "create_masked_load", copied)
    x = torch.arange(32, dtype=torch.float32)
    scaled(x, 9, 2.0)
    scaled(x * 3, 9, 2.0)
    assert all(t.unknown for t in playback._tapes.values())


def test_what_constants_give_is_computed_once():
    x = torch.arange(64, dtype=torch.float32)
    scaled(x, 5, 2.0)
    (found,) = playback._tapes.values()
    ranges = [v for v in found.values if v is not None and v.shape == (1, 32)]
    assert ranges, "arange and what follows from it"
    assert found.start.choice is None
    assert sum(s.store for s in found.start.steps) == 1


@triton.jit
def repeating_kernel(x, y, step, N: tl.constexpr, TURNS: tl.constexpr):
    total = tl.zeros((N,), tl.float32)
    for k in tl.static_range(TURNS):
        column = tl.arange(0, N) * step
        total += tl.load(x + column + k)
        tl.store(x + column + k, total)
        total += tl.load(x + column + k)
    tl.store(y + tl.arange(0, N), total)


def test_what_was_computed_before_is_not_computed_again():
    """Addresses that every turn of a loop makes anew are made once; memory is read each time."""
    for step in (1, 3, 3):
        x, y = torch.arange(100, dtype=torch.float32), torch.empty(8)
        want, total = x.clone(), torch.zeros(8)
        at = torch.arange(8) * step
        for k in range(4):
            total = total + want[at + k]
            want[at + k] = total
            total = total + want[at + k]
        repeating_kernel[(1,)](x, y, step, N=8, TURNS=4)
        assert torch.equal(x, want)
        assert torch.equal(y, total)
    (found,) = [t for key, t in playback._tapes.items() if key[0].__name__ == "repeating_kernel"]
    assert sum(s.function.__name__ == "multiply" for s in found.start.steps) == 1
    assert sum(s.store for s in found.start.steps) == 5
