"""The law of DSpark's blocks holds on the reference, and notices backends that are wrong where a
block differs from a step.
"""

import numpy as np
import pytest
from dsv4_backend_reference import ReferenceBackend
from dsv4_conformance.laws.of_drafts import BLOCK, blocks_are_the_oracles
from dsv4_conformance.laws.small_model import Stage

EXAMPLE = {"ratios": (0, 4), "steps": [9, 1, 4, 2], "rejected": 3, "behind": 25, "seed": 0}


class CausalBlock(ReferenceBackend):
    """Hides the block's last rows from those before them, as in a step of the main model."""

    def cached_sparse_attn(
        self, q, kv, ring, ring_index, rows, row_index, attn_sink, topk_idxs, *, layout, softmax_scale
    ):
        idxs = np.array(topk_idxs)
        own = idxs[:, -BLOCK:]
        if rows is None and idxs.shape[0] == 2 * BLOCK and (own[0] == own[1]).all():
            later = np.triu(np.ones((BLOCK, BLOCK), bool), 1)
            idxs[:, -BLOCK:] = np.where(np.tile(later, (2, 1)), -1, own)
        return super().cached_sparse_attn(
            q, kv, ring, ring_index, rows, row_index, attn_sink, idxs, layout=layout, softmax_scale=softmax_scale
        )


class FirstStream(ReferenceBackend):
    """Taps one stream and not the mean of all; a factor of all four would not show, since the taps
    are normed.
    """

    def hc_head(self, h, fn, scale, base, *, norm_eps, eps):
        return h[:, 0] if eps == 0 else super().hc_head(h, fn, scale, base, norm_eps=norm_eps, eps=eps)


class OtherTable(ReferenceBackend):
    """Looks the bigram table's rows up one too early."""

    def embedding(self, ids, weight):
        return super().embedding(ids - (weight.shape[1] == 32) * (ids > 0).astype(ids.dtype), weight)


class FirstWriteStays(ReferenceBackend):
    """Leaves a row of a ring that was written once: those of rejected tokens stay."""

    def cache_write(self, cache, rows, index, *, layout):
        slots = np.array(index)
        held = (slots >= 0) & np.asarray(cache)[np.maximum(slots, 0)].any(-1)
        return super().cache_write(cache, rows, np.where(held, -1, slots).astype(np.int32), layout=layout)


class RoundedConfidence(ReferenceBackend):
    """Rounds the one output of the confidence head to float32."""

    def linear(self, x, weight, *, out_dtype):
        y = super().linear(x, weight, out_dtype=out_dtype)
        return y.astype(np.float32).astype(y.dtype) if y.shape[1] == 1 else y


def test_the_law_holds_on_the_reference():
    assert blocks_are_the_oracles(Stage.of(ReferenceBackend()), **EXAMPLE) is None


@pytest.mark.parametrize("fault", [CausalBlock, FirstStream, OtherTable, FirstWriteStays, RoundedConfidence])
def test_faults_are_noticed(fault):
    said = blocks_are_the_oracles(Stage.of(fault()), **EXAMPLE)
    assert said is not None
    assert ("confidences" if fault is RoundedConfidence else "draft logits") in said
