"""Faults to plant in the sources of the Triton kernels, each of a kind that has shipped somewhere,
and the op whose cases must notice.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """``found`` stands once in ``kernels/<module>.py`` and becomes ``planted``."""

    what: str
    module: str
    found: str
    planted: str
    op: str
    tier: str = "smoke"


FAULTS = {
    "scale_rounded_down": Fault(
        "a scale is the power of two below what is needed", "rounding", "(bits + 0x7FFFFF) & 0x7F800000", "bits & 0x7F800000", "act_qdq",
    ),
    "least_exponent_of_fp8": Fault("FP4 is rounded as finely as FP8 below one", "rounding", "127 if FP4 else 121", "121", "act_qdq"),
    "rounded_to_odd_bits": Fault("one bit of FP8's mantissa is lost", "rounding", "1 if FP4 else 3", "1 if FP4 else 2", "act_qdq"),
    "all_channels_rounded": Fault(
        "channels that pass through are rounded too", "rounding", "tl.where(column < CHANNELS, tl.reshape", "tl.where(column < SPAN, tl.reshape", "act_qdq",
    ),
    "rows_of_the_first_core": Fault(
        "programs stride by one, not by their number: rows are made again", "norm",
        "for row in range(tl.program_id(0), rows, tl.num_programs(0)):\n        read", "for row in range(tl.program_id(0), 1, tl.num_programs(0)):\n        read",
        "rms_norm",
    ),
    "eps_left_out": Fault("eps is not added", "norm", "tl.sum(squares, axis=0) / DIM + eps", "tl.sum(squares, axis=0) / DIM", "rms_norm"),
    "weight_of_the_first_part": Fault(
        "each part of a row takes the first part's weights", "norm", "tl.load(weight + column, mask=inside, other=0.0)",
        "tl.load(weight + part, mask=inside, other=0.0)", "rms_norm", "standard",
    ),
    "turned_the_other_way": Fault("the partner's sign is swapped", "norm", "-after.to(tl.float32), before", "after.to(tl.float32), -before", "apply_rope"),
    "inverse_ignored": Fault("the inverse rotation turns forwards", "norm", "sin = -sin", "sin = sin", "apply_rope"),
    "angle_of_the_first_token": Fault("every token turns by the first one's angle", "norm", "row // heads, tl.int64", "row * 0, tl.int64", "rms_norm_rope"),
    "partner_with_its_neighbours_weight": Fault(
        "a channel's partner has the channel's own weight", "norm", "weight + PLAIN + j + 1,", "weight + PLAIN + j,", "rms_norm_rope",
    ),
    "one_round_of_sinkhorn": Fault("Sinkhorn ends after its second round", "mhc", "range(iters - 1)", "range(1)", "hc_pre"),
    "post_not_doubled": Fault("post is half of what it should be", "mhc", "2.0 / (1.0 + tl.exp(-mix))", "1.0 / (1.0 + tl.exp(-mix))", "hc_pre"),
    "streams_in_reverse": Fault("streams have each other's weights", "mhc", "j == n, pre", "j == HC - 1 - n, pre", "hc_pre"),
    "norm_over_the_part": Fault("the mean is taken over a part of the row", "mhc", "axis=0) / DIM + norm_eps", "axis=0) / BLOCK + norm_eps", "hc_pre_norm"),
    "differences_are_sums": Fault("a butterfly adds twice", "hadamard", "second, -pairs, pairs", "second, pairs, pairs", "hadamard"),
    "not_scaled": Fault("the rotation is not scaled", "hadamard", "(wide * factor)", "(wide)", "hadamard"),
    "slot_0_is_none": Fault("the first slot is taken for none", "rows", "if slot >= 0:", "if slot > 0:", "cache_write"),
    "absent_rows_are_row_0": Fault("-1 reads the first row", "rows", "tl.where(slot >= 0, stored, 0.0)", "stored", "cache_read"),
    "sum_not_rescaled": Fault("a higher score does not rescale the sum so far", "compress", "total * kept + share", "total + share", "compress"),
    "window_boundary": Fault("the current window's first token uses the previous one's channels", "compress", "j >= RATIO", "j > RATIO", "compress"),
    "bias_of_the_first_place": Fault("every place of a window has the first one's bias", "compress", "(j % RATIO) * WIDTH", "0 * WIDTH", "cached_compress"),
    "tie_to_the_higher": Fault(
        "of equal experts the higher wins", "gate", "tl.min(tl.where(left == best, expert, BLOCK), axis=0)",
        "tl.max(tl.where(left == best, expert, -1), axis=0)", "gate",
    ),
    "softplus_as_written": Fault(
        "the logarithm's argument loses what is small", "gate", "tl.where(less == 0.0, e, tl.log(sum_) * (e / tl.where(less == 0.0, 1.0, less)))",
        "tl.log(sum_)", "gate", "standard",
    ),
    "hash_row_of_the_token": Fault("the table is read by the token's number, not its id", "gate", "tl.load(ids + token)", "token", "gate_hash"),
    "gate_not_clamped": Fault("gate is not clamped", "experts", "tl.where(g > limit, limit, g)", "g", "swiglu"),
    "up_clamped_on_one_side": Fault("up is not clamped from below", "experts", "tl.where(u < -limit, -limit, u)", "u", "swiglu"),
    "routing_weight_of_the_first": Fault("every row has the first one's weight", "experts", "tl.load(weights + row)", "tl.load(weights)", "swiglu"),
    "sign_of_another_bit": Fault(
        "signs are taken from another bit", "experts", "return scaled | ((code & 8) << 28)", "return scaled | ((code & 4) << 29)", "moe",
    ),
    "half_is_three_quarters": Fault("E2M1's subnormal number has a mantissa", "experts", "tl.where(magnitude == 1, 126 << 23, normal)", "normal", "moe"),
    "scale_of_the_first_group": Fault(
        "scales are those of a stack's first expert", "experts", "scales + (expert * parts + part) * GROUPS", "scales + part * GROUPS", "moe",
    ),
    "shared_expert_lost": Fault("the shared expert is not added", "experts", "        if SHARED:\n", "        if SHARED and TOPK == 0:\n", "moe"),
}  # fmt: skip
