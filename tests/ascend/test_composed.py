"""What the composed tier does in other ways than the portable backend: the same bits, and fewer
launches.
"""

import numpy as np
import pytest
import torch
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.kept import OF_INDICES, Kept
from dsv4_backend_ascend.rounding import GRIDS, power_of_two
from dsv4_backend_torch.backend import TorchBackend

from dsv4_core.contract.dtypes import FORMAT_MAX, Experts, RowLayout, quantise_weight

PLAIN = RowLayout("plain", 16)


@pytest.fixture(scope="module")
def portable():
    return TorchBackend(few_tokens_by="torch")


@pytest.fixture(scope="module")
def backend():
    return AscendBackend(simulate="910B", tier="composed")


@pytest.mark.parametrize(("fmt", "block"), [("e4m3", 64), ("e4m3", 128), ("e2m1", 32)])
class TestRounding:
    def same(self, backend, portable, x, fmt, block):
        got, want = (b.act_qdq(x, format=fmt, block=block, channels=block) for b in (backend, portable))
        assert torch.equal(got, want)  # -0 is 0

    @pytest.mark.parametrize("largest", [1.0, 1.5, 1.5078125, 1.75, 1.7578125, 1.9921875, 6.0, 448.0])
    def test_every_number_below_the_largest_of_a_block(self, backend, portable, fmt, block, largest):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        every = every[every.abs() <= largest]
        rows = every[: every.numel() // (block - 1) * (block - 1)].reshape(-1, block - 1)
        self.same(backend, portable, torch.cat([rows, rows.new_full((rows.shape[0], 1), largest)], 1), fmt, block)

    @pytest.mark.parametrize("exponent", [-126, -120, -60, -20, 0, 60, 119])
    def test_blocks_of_every_size(self, backend, portable, fmt, block, exponent):
        torch.manual_seed(exponent)
        wide = torch.randn(64, block) * 2.0 ** torch.randint(-12, 1, (64, block)) * 2.0**exponent
        wide[0], wide[1, ::2] = 0.0, -0.0
        self.same(backend, portable, wide.bfloat16(), fmt, block)

    def test_what_a_product_multiplies_is_equal(self, backend, portable, fmt, block):
        x = (torch.randn(5, 256) * 2.0 ** torch.randint(-20, 5, (5, 256))).bfloat16()
        x[0], x[1, :128] = 0.0, 0.0
        x[2] *= 2.0**-30
        x[3, :3] = torch.tensor([3.38e38, -(2.0**127), 1.0])
        assert torch.equal(backend.quantised_activation(x), portable.quantised_activation(x))

    def test_every_magnitude_asks_for_its_scale(self, fmt, block):
        """However a device takes a part off a magnitude: rounded before, or once."""
        every = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        grid = GRIDS[fmt]
        every = every.clamp(min=grid.floor)
        want = 2.0 ** np.ceil(np.log2(every.double().numpy() / FORMAT_MAX[fmt])) * (
            FORMAT_MAX[fmt] / {"e4m3": 3.5, "e2m1": 3.0}[fmt]
        )
        for left in (every.sub(every, alpha=grid.part), every - every * grid.part):
            assert np.array_equal(power_of_two(left.clone()).double().numpy(), want)

    def test_a_block_with_an_infinity_is_not_numbers(self, backend, fmt, block):
        x = torch.ones(1, block, dtype=torch.bfloat16)
        x[0, 3] = torch.inf
        assert backend.act_qdq(x, format=fmt, block=block, channels=block).isnan().all()


@pytest.mark.parametrize("index", [[3], [-1], [5, -1, 0], [-1, -1], [-1, 2, -1, 7]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_rows_are_written_and_read_as_the_portable_backend_does(backend, portable, index, dtype):
    cache, rows, where = torch.randn(9, 16).to(dtype), torch.randn(len(index), 16).to(dtype), torch.tensor(index).int()
    caches = [cache.clone(), cache.clone()]
    for each, held in zip((backend, portable), caches, strict=True):
        each.cache_write(held, rows, where, layout=PLAIN)
    assert torch.equal(*caches)
    got, want = (b.cache_read(cache, where, layout=PLAIN) for b in (backend, portable))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("ratio", "halves"), [(4, 2), (8, 1)])
def test_windows_are_compressed_as_the_portable_backend_does(backend, portable, ratio, halves):
    torch.manual_seed(0)
    dim, span = 8, ratio * halves
    pool, ape = torch.randn(20, 2 * halves * dim), torch.randn(ratio, halves * dim)
    window = torch.randint(-6, 20, (5, span), dtype=torch.int32).clamp(min=-1)
    window[2] = -1
    pool[window[0, 0].clamp(min=0) - 1] = torch.nan  # of a row that some window may not hold
    got, want = (b.compress(pool, ape, window, dim=dim) for b in (backend, portable))
    assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("tier", ["composed", "cann"])
@pytest.mark.parametrize(("tokens", "first", "here"), [(1, 0, 6), (3, 0, 6), (2, 2, 4)])
def test_gathered_experts_are_the_sorted_ones(tier, tokens, first, here):
    """One, several, and another rank's experts among the picks; NaN of a token stays its own."""
    rng = np.random.default_rng(tokens)
    dim, inter, topk = 256, 128, 2
    stacks = [
        Experts([quantise_weight(rng.standard_normal(shape), "e2m1") for _ in range(here)])
        for shape in ((inter, dim), (inter, dim), (dim, inter))
    ]
    torch.manual_seed(tokens)
    x, shared = torch.randn(tokens, dim).bfloat16(), torch.randn(tokens, dim).bfloat16()
    if tokens > 1:
        x[1, 3] = torch.nan
    indices = torch.stack([torch.randperm(6)[:topk] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, topk)
    results = []
    for expand_bytes in (1 << 24, 1):  # gathered; too little room for that: sorted
        backend = AscendBackend(simulate="910B", tier=tier, expand_bytes=expand_bytes)
        experts = [backend.load_experts(stack) for stack in stacks]
        form = {"first_expert": first, "limit": 10.0, "out_dtype": "bfloat16"}
        results.append(backend.moe(x, weights, indices, shared, *experts, **form))
        assert ("init_routing" in backend.kernels_ran()) == (expand_bytes == 1 and tier == "cann")
    gathered, in_order = (r.float() for r in results)
    torch.testing.assert_close(
        gathered, in_order, rtol=2**-6, atol=2**-6 * float(in_order.nan_to_num().abs().max()), equal_nan=True
    )


class TestKept:
    def test_equal_tensors_that_are_not_one_are_told_apart(self):
        kept, a, b = Kept(), torch.zeros(2), torch.zeros(2)
        assert kept.of((a, "x"), lambda: 1) == kept.of((a, "x"), lambda: 2) == 1
        assert kept.of((b, "x"), lambda: 3) == 3
        assert kept.of((a, "y"), lambda: 4) == 4

    def test_a_step_is_forgotten_and_what_never_changes_is_not(self):
        kept, a = Kept(), torch.zeros(2)
        kept.of((a,), lambda: 1)
        one = kept.always("one", None, lambda: torch.ones(1))
        kept.forget()
        assert kept.known((a,)) is None
        assert kept.always("one", None, lambda: torch.zeros(1)) is one

    def test_no_more_is_kept_than_said(self):
        kept = Kept()
        for i in range(3 * OF_INDICES):
            kept.of((i,), lambda: torch.zeros(1))
        assert len(kept.of_indices) == OF_INDICES
        large = kept.always("large", None, lambda: torch.zeros(1 << 19))
        assert kept.always("large", None, lambda: torch.ones(1 << 19)) is not large
