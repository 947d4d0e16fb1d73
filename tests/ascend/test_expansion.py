"""Memory of the lossless expansion at the published sizes: the bound that the option names is
kept.
"""

import pytest
from dsv4_backend_ascend.expansion import measure

from dsv4_core.checkpoint.config import PRESETS


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("megabytes", [128, 1024])
@pytest.mark.parametrize("sequences", [1, 64])
def test_no_more_is_expanded_than_asked_for(model, megabytes, sequences):
    config = PRESETS[model]
    found = measure(config, sequences * config.num_experts_per_tok, megabytes << 20)
    expert = found.bf16 / config.n_routed_experts  # while a small group is made, its pieces are whole experts
    assert found.peak < 1.3 * (megabytes << 20) + 2 * expert
    assert found.peak < found.bf16 / 2
    assert found.packed * 3.7 < found.bf16


def test_what_is_counted_is_what_the_contract_computes():
    """The same code on real tensors: experts in several blocks give what one block gives."""
    import numpy as np
    import torch
    from dsv4_backend_ascend.backend import AscendBackend

    from dsv4_core.contract.dtypes import Experts, quantise_weight

    rng = np.random.default_rng(0)
    made = [quantise_weight(rng.standard_normal((32, 128)), "e2m1") for _ in range(6)]
    x, offsets = torch.randn(20, 128).bfloat16(), torch.tensor([0, 3, 3, 9, 14, 15, 18], dtype=torch.int32)
    results = []
    for groups in (1, 4, 6, 20):
        backend = AscendBackend(simulate="910C", expand_bytes=groups * 2 * 32 * 128)
        results.append(backend.expert_linear(x, backend.load_experts(Experts(made)), offsets))
        assert backend.kernels_ran() == ("experts_bf16",)
    assert all(torch.equal(y, results[0]) for y in results)
    assert not results[0][18:].any()
