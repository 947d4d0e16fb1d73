"""Faults to plant in the Triton sources and around them, each of a kind that has shipped somewhere, and the op whose cases, or the tests, that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``found`` stands once in ``kernels/<module>.py`` (or, with a slash, in that file of that package) and becomes ``planted``; ``op``'s cases at ``tier``
    (or its ``case`` alone) must fail, or, where no case of the suite can reach it, the tests of a file of this folder.
    """

    what: str
    module: str
    found: str
    planted: str
    op: str
    tier: str = "smoke"
    case: str = ""


FAULTS = {
    "unmasked_tail": Fault(
        "a missing mask: channels past the row's end are added to its sum", "norm",
        "wide = in_order(x, at, inside,", "wide = in_order(x, at, (row < rows)[:, None],", "rms_norm", "standard",
    ),
    "mean_over_block": Fault("the mean is taken over the block, not the row", "norm", "axis=1) / DIM + eps", "axis=1) / BLOCK + eps", "rms_norm", "standard"),
    "scale_rounded_down": Fault(
        "a scale's exponent is not raised where mantissa bits are set", "formats",
        "(bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)", "(bits >> 23)", "act_quant",
    ),
    "wrong_stride": Fault(
        "a token's heads are found with the block's count of heads as stride", "rope",
        "row = (token * heads + head) * DIM", "row = (token * HEADS + head) * DIM", "apply_rope",
    ),
    "rotated_forwards": Fault("the inverse rotation turns forwards", "rope", "angle = -angle", "angle = angle", "apply_rope"),
    "parity_of_four_bits": Fault("the Hadamard sign looks at the low four bits of a parity", "quant", "    odd ^= odd >> 4\n", "", "hadamard"),
    "scale_index_off_by_one": Fault(
        "the next block's scale of the output projection", "dense_matmul",
        "((K + 127) // 128) + k // 128,", "((K + 127) // 128) + (k // 128 + 1) % ((K + 127) // 128),", "grouped_linear",
    ),
    "no_rescale_of_the_sum": Fault(
        "a new maximum does not rescale the sum of weights so far", "sparse_attn", "total = total * fade + tl.sum(weight, axis=1)",
        "total = total + tl.sum(weight, axis=1)", "sparse_attn", "standard",
    ),
    "no_rescale_between_splits": Fault(
        "pieces of a list are added up without a common maximum", "sparse_attn", "total += fade * tl.load(partial_sum", "total += tl.load(partial_sum",
        "sparse_attn", "standard",
    ),
    "no_sink": Fault("the sink is left out of the denominator", "sparse_attn", "    total = tl.exp(drain - above)\n", "    total = 0.0 * drain\n", "sparse_attn"),
    "other_ranks_rows": Fault("rows of other ranks' experts are added", "moe", "mask=inside & (row < count)", "mask=inside", "combine"),
    "sorted_past_equals": Fault("copies start behind those of their own expert", "moe", "(group < mine) & (start", "(group <= mine) & (start", "dispatch"),
    "tie_to_the_higher_id": Fault(
        "of equal experts the higher id wins", "moe", "best = tl.min(tl.where(ranked == largest[:, None], e[None, :], BLOCK_E - 1), axis=1)",
        "best = tl.max(tl.where(ranked == largest[:, None], e[None, :], 0), axis=1)", "gate",
    ),
    "clamped_on_one_side": Fault("SwiGLU's up is not clamped from below", "moe", "-limit, limit, propagate_nan", "-1e30, limit, propagate_nan", "swiglu"),
    "last_of_equals_lost": Fault("one too few of the rows that tie at the k-th place is taken", "index", "<= left).to(tl.int32)", "< left).to(tl.int32)", "index_select"),
    "window_boundary": Fault("the current window's first token uses the previous window's channels", "compress", "tl.where(j >= RATIO", "tl.where(j > RATIO", "compress"),
    "not_transposed": Fault(
        "comb is used as it stands, not transposed", "mhc", "tl.load(comb + (token * HC + j) * HC + n)", "tl.load(comb + (token * HC + n) * HC + j)", "hc_post",
    ),
    "one_iteration_short": Fault("Sinkhorn stops an iteration early", "mhc", "for _ in range(iters - 1):", "for _ in range(iters - 2):", "hc_pre"),
    "fp4_scales_reversed": Fault(
        "the four scales of 128 channels are taken from the other end", "fp4_matmul", "scale_w >> (8 * group)", "scale_w >> (8 * (3 - group))", "expert_linear",
    ),
    "one_scale_for_all_blocks": Fault(
        "a row of weights uses its first block's scale throughout", "scaled_matmul",
        "(tile * BLOCK_N // 128) * blocks + block", "(tile * BLOCK_N // 128) * blocks", "linear",
    ),
    "the_first_piece_twice": Fault(
        "of a sum in pieces every program takes the first", "scaled_matmul", "begin = piece * span", "begin = 0 * span",
        "linear", "standard", "fp8_at_in=7168",
    ),
    "a_piece_forgotten": Fault(
        "the last piece of a split product is not added", "tiles", "for piece in range(1, pieces):", "for piece in range(1, pieces - 1):",
        "linear", "standard", "fp8_at_in=7168",
    ),
    "pieces_over_each_other": Fault(
        "pieces of a split product are stored one over the other", "dense_matmul",
        "y += tl.cast(piece, tl.int64) * rows * stride", "y += 0 * tl.cast(piece, tl.int64) * rows * stride", "linear", "standard", "bf16_at_in=7168",
    ),
    "second_weight_is_the_first": Fault(
        "the second of two weights in one launch is the first again", "tiles", "w, ws, y, N, stride = w2, ws2, y2, N2, stride2", "y, N, stride = y2, N2, stride2", "ffn", "smoke", "fp8",
    ),
    "position_of_the_row": Fault(
        "a head is turned by its row's number in place of its token's position", "norm_rope", "row // heads", "row // 1", "rms_norm_rope",
    ),
    "absent_slot_read": Fault(
        "a slot of -1 is read in front of the state", "compress", "stored = inside & (slot >= 0)[:, None]", "stored = inside", "cached_compress", "smoke", "absent",
    ),
    "step_counted_with_the_state": Fault(
        "this step's tokens are counted as if none were before them", "compress", "tl.where(old, slot, token - recent)", "tl.where(old, slot, token)",
        "cached_compress",
    ),
    "copy_for_token": Fault(
        "an expert's row reads the token with its copy's number", "fp4_matmul", "other=0) // TOPK)", "other=0) // 1)", "moe", "smoke", "fp4",
    ),
    "codes_in_their_own_order": Fault(
        "FP8 codes for FP4 weights are stored in their channels' order", "words",
        "return (channel & -32) | ((channel & 1) << 4) | ((channel & 31) >> 1)", "return channel", "expert_linear", "smoke", "fp4",
    ),
    "weights_of_sorted_rows": Fault(
        "a sorted row takes the routing weight at its own number", "moe", "other=0) if SORTED else row", "other=0) * 0 + row if SORTED else row",
        "moe", "smoke", "fp4",
    ),
    "pieces_of_a_context_from_its_start": Fault(
        "every piece of a long context is picked from the context's start", "index", "first = tl.program_id(1) * length", "first = 0 * length",
        "index_select", "standard", "at_rows=131073",
    ),
    "no_tile_for_the_rest": Fault(
        "an expert's rows past its last full tile are not computed", "tiles", "(stop - start + BLOCK_T - 1) // BLOCK_T", "(stop - start) // BLOCK_T", "expert_linear",
    ),
    "first_new_row_from_the_ring": Fault(
        "the step's first row is read from the cache, not from the step", "unpack", "(i >= recent) & (i < recent + tokens)", "(i > recent) & (i < recent + tokens)",
        "cached_sparse_attn",
    ),
    "row_offset_of_32_bits": Fault(
        "a row's offset into a packed cache is computed in 32 bits", "unpack", "tl.load(index).to(tl.int64)", "tl.load(index)",
        "cached_sparse_attn", "full", "past_2^31_bytes",
    ),
    "key_offset_of_32_bits": Fault(
        "a packed key's offset is computed in 32 bits", "index", "slot.to(tl.int64)[:, None] * WIDTH", "slot[:, None] * WIDTH",
        "cached_index_topk", "full", "past_2^31_bytes",
    ),
    "scales_in_the_padding": Fault(
        "the bytes between a packed row's scales and its BF16 channels are not zero", "cache",
        "tl.where(group < PLAIN // GROUP, tl.reshape(exponent, (GROUPS,)), 0)", "tl.reshape(exponent, (GROUPS,))", "cache_write",
    ),
    "swapped_halves": Fault("an even channel's FP4 code is stored in the high half of its byte", "cache", "out + byte, (even | (odd << 4))", "out + byte, (odd | (even << 4))", "cache_write"),
    "a_row_too_far": Fault(
        "rows are scattered to the slot behind theirs", "cache",
        "tl.store(target + slot * DIM + column,", "tl.store(target + (slot + 1) * DIM + column,", "cache_write",
    ),
    "sum_read_unmade": Fault(
        "torch is given a product whose pieces nobody has added up", "dsv4_backend_cuda/carried", "settle((*args, *kwargs.values()))", "pass", "test_carried.py",
    ),
    "first_piece_of_a_score": Fault(
        "a compressor's window is made of the first piece of its tokens' sums", "compress", "for piece in range(1, pieces):", "for piece in range(1, 1):",
        "test_carried.py",
    ),
    "first_piece_of_a_state": Fault(
        "a state is written of the first piece of its tokens' sums", "cache", "for piece in range(1, pieces):", "for piece in range(1, 1):", "test_carried.py",
    ),
    "any_grid_will_do": Fault(
        "rows that were rounded to another grid are handed out", "dsv4_backend_cuda/bindings", "if (format, block, channels) in known:", "if known:",
        "test_carried.py",
    ),
    "other_ranks_order": Fault(
        "a rank with some of the experts takes the order of all", "dsv4_backend_cuda/bindings", "known is not None and first_expert == 0 and known[2].shape[0] == n_experts + 1",
        "known is not None", "test_carried.py",
    ),
    "equals_in_any_order": Fault(
        "the router puts copies of one expert in the same place", "moe", "& (copy[None, :] < copy[:, None])", "& (copy[None, :] < 0)", "test_kernel_moe.py",
    ),
    "product_never_launched": Fault(
        "who reads a product that was not launched takes its room as it is", "dsv4_backend_cuda/carried", "        later.begun()\n", "", "test_carried.py",
    ),
    "rooms_changed": Fault(
        "products that are launched together stand in each other's rooms", "dsv4_backend_cuda/bindings", "zip([*scaled, *plain], parts, strict=True)", "zip([*scaled, *plain], parts[::-1], strict=True)",
        "test_carried.py",
    ),
    "over_the_first": Fault(
        "the second weight's outputs are stored over the first one's", "tiles", "= w2, ws2, y2, N2, stride2", "= w2, ws2, y, N2, stride2", "test_carried.py",
    ),
    "fourth_weight_is_the_third": Fault(
        "of five weights in one launch the fourth is the third again", "dense_matmul", "w4, ws, y4, N4, stride4)", "w3, ws, y4, N4, stride4)", "test_carried.py",
    ),
    "streams_of_the_other_side": Fault(
        "the next sub-layer makes streams with comb as it stands, not transposed", "mhc", "tl.load(comb + (token * EXPAND + j) * EXPAND + stream)",
        "tl.load(comb + (token * EXPAND + stream) * EXPAND + j)", "test_carried.py",
    ),
    "streams_of_the_first": Fault(
        "every stream that the next sub-layer makes gets the first one's share", "mhc", "tl.load(post + token * EXPAND + stream)", "tl.load(post + token * EXPAND)",
        "test_carried.py",
    ),
    "streams_of_another_form": Fault(
        "streams that wait are made as streams of the reader's form", "dsv4_backend_cuda/carried",
        "return later if (room[-1] == shape[-1] if rows else room == shape) else None", "return later", "test_carried.py",
    ),
    "streams_kept_for_ever": Fault(
        "streams keep those of the layer before, and so on to the first", "dsv4_backend_cuda/carried", "vars(self).clear()", "pass", "test_carried.py",
    ),
    "fewer_bits_of_an_invariant_batch": Fault(
        "arrays wait where bits may not depend on the number of tokens", "dsv4_backend_cuda/bindings", "if be.batch_invariant or array.shape[0]", "if array.shape[0]",
        "test_carried.py",
    ),
    "turned_on": Fault(
        "attention's rows are turned on, not back, by who adds their pieces", "sparse_attn", "token, HALF, True)", "token, HALF, False)", "test_carried.py",
    ),
    "turned_channels_do_not_fade": Fault(
        "pieces of the turned channels are added without their share", "sparse_attn", "tail += fade[:, None] *", "tail +=", "test_carried.py",
    ),
    "rotation_of_heads_as_tokens": Fault(
        "the Hadamard rotation turns a head by its row's number", "quant", "freqs, row // heads,", "freqs, row // 1,", "test_carried.py",
    ),
    "both_of_a_pair_minus": Fault(
        "the Hadamard rotation turns both channels of a pair by the first one's formula", "quant", "tl.where(((i & 1) == 0)[None, :], -across, across)", "-across",
        "test_carried.py",
    ),
    "shared_expert_weighted": Fault(
        "the shared expert's rows are weighted like copies, where one launch has both", "moe", "weighted = (row < rows) & (is_early == 0)", "weighted = row < rows",
        "test_carried.py",
    ),
    "shared_expert_in_words": Fault(
        "the shared expert's codes are stored in FP4 weights' order", "moe", "tl.where(is_early, column, paired_place(column))", "paired_place(column)",
        "test_kernel_moe.py",
    ),
    "cut_elsewhere_beside_the_experts": Fault(
        "the shared expert's sums are cut in other pieces beside the experts than alone", "moe_matmul", "K, span, 0, 1, False,", "K, span + 1, 0, 1, False,",
        "test_kernel_matmul.py",
    ),
    "first_of_the_shared_expert_twice": Fault(
        "the second of the shared expert's weights beside the experts is the first again", "moe_matmul", "shared_w2, shared_ws2, shared_y, shared_y2,\n            order",
        "shared_w, shared_ws, shared_y, shared_y2,\n            order", "test_carried.py",
    ),
    "cut_elsewhere_beside_fp8": Fault(
        "BF16 products are cut in other pieces beside FP8 ones than apart", "input_matmul", "K, span, 1, False,", "K, span + 1, 1, False,",
        "test_kernel_matmul.py",
    ),
    "limit_of_the_others": Fault(
        "the shared expert is clamped by the routed experts' limit", "dsv4_backend_cuda/bindings", "of.limit != limit or ", "", "test_carried.py",
    ),
    "made_outside_the_graph": Fault(
        "a recorded step's result waits, so that no replay makes it", "dsv4_backend_cuda/backend", "                settle(result)", "                pass",
        "test_carried.py",
    ),
    "graph_keeps_the_first_step": Fault(
        "a graph's buffers hold the first step's addresses for ever", "dsv4_backend_torch/graphs", "given.copy_(pinned, non_blocking=True)",
        "given.copy_(pinned, non_blocking=True) if self.graph is None else None", "test_graphs.py",
    ),
    "pinned_too_early": Fault(
        "pinned memory is written again while the last step's copy reads it", "dsv4_backend_torch/graphs", "if self.copied is not None:", "if False:",
        "test_graphs.py",
    ),
    "graph_of_another_shape": Fault(
        "a graph is replayed for arrays of another shape", "dsv4_backend_torch/graphs", "!= self.forms:", "!= self.forms and False:", "test_graphs.py",
    ),
    "library_without_its_tie_rule": Fault(
        "a library picks any of equal rows", "dsv4_backend_cuda/providers", "tie_break=LOWER", "tie_break=0", "test_providers.py",
    ),
    "library_reads_row_0_for_nothing": Fault(
        "a list is filled up with row 0 for a library", "dsv4_backend_cuda/providers", "value=-1)", "value=0)", "test_providers.py",
    ),
    "library_scales_of_a_half": Fault(
        "a library's float scales are made of the wrong bits", "dsv4_backend_cuda/providers", "(exponents.to(torch.int32) << 23)", "(exponents.to(torch.int32) << 22)",
        "test_providers.py",
    ),
    "library_where_it_does_not_fit": Fault(
        "a library is called with a number of heads that it does not have", "dsv4_backend_cuda/providers", "if q.shape[1] not in {64, 128}:", "if not q.shape[1]:",
        "test_providers.py",
    ),
    "the_first_rows_twice": Fault(
        "of two kinds of rows in one launch the second's programs count on from the first's", "norm_rope", "norm_and_turn(program - first, x2",
        "norm_and_turn(program, x2", "test_carried.py",
    ),
    "packed_without_its_gain": Fault(
        "rows that are normed as they are packed leave out the norm's weight", "cache", "wide = (wide * inverse * gain)", "wide = (wide * inverse)",
        "test_carried.py",
    ),
    "a_partner_with_its_own_gain": Fault(
        "a key's channel is turned with its partner under its own weight", "cache", "tl.load(weight + (i ^ 1))", "tl.load(weight + i)", "test_carried.py",
    ),
    "rows_of_other_positions": Fault(
        "rows of other positions are turned with the queries'", "norm_rope", "return same and addresses and", "return same and", "test_carried.py",
    ),
    "a_launch_like_the_last": Fault(
        "the interpreter's tape takes the last launch's program numbers for constants", "dsv4_backend_torch/playback",
        'VOLATILE = ("create_get_program_id", "create_get_num_programs")', "VOLATILE = ()", "rms_norm", "standard",
    ),
    "rows_past_their_mask": Fault(
        "rows that move whole ignore where their mask ends", "dsv4_backend_torch/memory", "turned(out)[live, :count] = windows[at]",
        "turned(out)[live] = _windows(starts[live], turned(out).shape[-1], dtype)[0][at]", "test_memory.py",
    ),
    "read_once": Fault(
        "the interpreter's tape does not read again what may have been written since", "dsv4_backend_torch/playback",
        "self.known.get(key) if name not in MEMORY else None", "self.known.get(key)", "test_playback.py",
    ),
    "between_two_places": Fault(
        "elements by index are read from the place below their address", "dsv4_backend_torch/memory",
        "if size > 1 and (pointers & np.uint64(size - 1)).any():", "if not size:", "test_memory.py",
    ),
    "rounded_before_it_is_added": Fault(
        "a product that float32 does not hold is added all the same", "dsv4_backend_torch/interpret",
        "return product + z if held.all() else None", "return product + z", "test_interpret.py",
    ),
}  # fmt: skip
