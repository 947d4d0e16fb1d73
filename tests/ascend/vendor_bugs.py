"""Faulty npu kernels, each after one that was met or could be: name -> (generation, op, contract
that shows it, fault).
"""

from types import SimpleNamespace

import torch
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.capability import table
from dsv4_backend_ascend.formats import mark

ROW_LIMIT = 65536  # stands for the row whose byte address no longer fits 32 bits


def _changed(a, **changes):
    return SimpleNamespace(**(vars(a) | changes))


def _with(**changes):
    """Run the kernel on changed arguments: each change is a value, or a function of the call's
    arguments.
    """
    return lambda kernel: lambda a: kernel(_changed(a, **{k: v(a) if callable(v) else v for k, v in changes.items()}))


def _half_rotary(_kernel):
    def run(a):
        first, second = a.input.chunk(2, -1)
        return a.input * a.r1 + torch.cat([-second, first], -1) * a.r2

    return run


def _pre_ignored(kernel):
    return lambda a: (a.x.float().mean(1).to(a.x.dtype), *kernel(a)[1:])


def _lost_expert(kernel):
    def run(a):
        (y,) = kernel(a)
        y[: int(a.group_list[0])] = 0
        return [y]

    return run


def _last_rows_scaled(kernel):
    def run(a):
        out, *rest = kernel(a)
        return (out * 7, *rest)  # the exponentials' sum was not divided by

    return run


def _unstable(kernel):
    def run(a):
        rows, order, ends, scale = kernel(a)
        start = 0
        for end in ends.tolist():
            rows[start:end], order[start:end] = rows[start:end].flip(0), order[start:end].flip(0)
            start = end
        return rows, order, ends, scale

    return run


def _per_tensor_scale(kernel):
    def run(a):
        _, scale = kernel(a)
        top = scale.amax()
        value = 2.0 ** (float(top) - 127)
        return (a.input.float() / value).clamp(-448, 448).to(torch.float8_e4m3fn), torch.full_like(scale, int(top))

    return run


def _last_channels_unseen(kernel):
    """Scales of blocks of 160 as if they had 128 channels, as most are called with."""

    def run(a):
        return kernel(_changed(a, input=torch.cat([a.input[..., :128], torch.zeros_like(a.input[..., 128:])], -1)))

    return run


def _up_not_clamped(_kernel):
    def run(a):
        gate, up = a.x.chunk(2, -1)
        gate = gate.clamp(max=a.limit)
        return gate * torch.sigmoid(gate) * up

    return run


def _bf16_sums(_kernel):
    def run(a):
        x = a.input.permute(a.perm_x1)
        parts = torch.stack([x[..., i : i + 16] @ a.weight[:, i : i + 16] for i in range(0, x.shape[-1], 16)])
        total = parts[0]
        for part in parts[1:]:
            total = (total + part).bfloat16()
        return total.transpose(0, 1).contiguous()

    return run


def _wrapped(a):
    return torch.where(a.sparse_indices >= ROW_LIMIT, a.sparse_indices - ROW_LIMIT, a.sparse_indices)


def _summed_again(a):
    return a.group_list.cumsum(0).clamp(max=a.x[0].shape[0])


def _without_the_last(a):
    return torch.cat([a.probs[:, :-1], 0 * a.probs[:, -1:]], 1)


def _weights_of_all(_kernel):
    def run(a):
        scores = torch.nn.functional.softplus(a.x.float()).sqrt()
        biased = scores if a.bias is None else scores + a.bias
        picks = (
            biased.argsort(dim=-1, descending=True, stable=True)[:, : a.k]
            if a.tid2eid is None
            else a.tid2eid[a.input_ids.long()].long()
        )
        weights = (
            scores.gather(1, picks) / scores.sum(-1, keepdim=True) * a.routed_scaling_factor
        )  # as its own page writes it
        return weights, picks.to(torch.int32), scores

    return run


def _biased_weights(_kernel):
    def run(a):
        biased = torch.nn.functional.softplus(a.x.float()).sqrt() + a.bias
        chosen, picks = biased.sort(dim=-1, descending=True, stable=True)
        chosen = chosen[:, : a.k]
        return chosen / chosen.sum(-1, keepdim=True) * a.routed_scaling_factor, picks[:, : a.k].to(torch.int32), biased

    return run


def _cut_off(kernel):
    def run(a):
        _, scale = kernel(a)
        return (a.input.float() / scale.unsqueeze(-1).clamp(min=1e-30)).trunc().to(torch.int8), scale

    return run


def _gate_clamped_below(_kernel):
    def run(a):
        gate, up = a.x.chunk(2, -1)
        gate, up = gate.clamp(-a.limit, a.limit) * 1.0, up.clamp(-a.limit, a.limit)
        return gate * torch.sigmoid(gate * 1.1) * up

    return run


def _no_relu(_kernel):
    def run(a):
        batch, seq = a.query.shape[:2]
        picks = torch.full((batch, seq, 1, a.sparse_count), -1, dtype=torch.int32)
        for b in range(batch):
            length = int(a.actual_seq_lengths_key[b])
            keys = a.key[a.block_table[b].long()].reshape(-1, a.key.shape[-1])[:length].float()
            scores = (a.weights[b].float().unsqueeze(-1) * (a.query[b].float() @ keys.T)).sum(1)
            best = scores.argsort(dim=-1, descending=True, stable=True)[:, : a.sparse_count]
            picks[b, :, 0, : best.shape[1]] = best.to(torch.int32)
        return picks, a.query.new_empty([0])

    return run


def _ends_without_the_last(kernel):
    def run(a):
        rows, order, ends, scale = kernel(a)
        return rows, order, (ends - 1).clamp(min=0), scale

    return run


def _mixing_transposed(kernel):
    def run(a):
        x, post, res, *rest = kernel(a)
        n = a.hcMult
        return (x, post, res.unflatten(-1, (n, n)).transpose(-1, -2).flatten(-2), *rest)

    return run


def _post_not_doubled(kernel):
    def run(a):
        x, post, *rest = kernel(a)
        return (x, post / 2, *rest)

    return run


def _whole_row_turned(kernel):
    def run(a):
        width = a.x.shape[-1]
        kernel(a)
        if a.partial_slice[0]:
            a.x[..., : a.partial_slice[0]] = a.x[..., : a.partial_slice[0]].roll(1, -1) if width else a.x

    return run


def _next_group(a):
    return a.antiquant_scale and [a.antiquant_scale[0].roll(1, 1)]


def _whole_blocks(a):
    return (a.actual_seq_lengths_key + 127) // 128 * 128


def _in_order(a):
    return torch.arange(a.block_table.shape[1], dtype=torch.int32).expand_as(a.block_table)


def _of_the_first(a):
    return a.block_table[:1].expand_as(a.block_table)


def faulty(generation, op):
    """A backend that calls the op."""
    call = next(call for call in table().calls if call.op == op)
    return AscendBackend(simulate=generation, tier=call.tier, gating="fused" if call.departs else "exact")


BUGS = {
    "pre_mix_ignored": ("950", "npu_mhc_pre", "hc_pre", _pre_ignored),
    "sinkhorn_stops_after_one_round": ("950", "npu_mhc_sinkhorn", "hc_pre", _with(num_iters=1)),
    "comb_not_transposed": ("950", "npu_mhc_post", "hc_post", _with(h_res=lambda a: a.h_res.transpose(1, 2))),
    "row_address_overflows": ("910B", "npu_sparse_flash_attention", "sparse_attn", _with(sparse_indices=_wrapped)),
    "key_block_address_overflows": ("910C", "npu_lightning_indexer", "index_topk", _with(block_table=lambda a: a.block_table % 100)),
    "sink_dropped": ("910B", "npu_sparse_flash_attention", "sparse_attn", _with(query_rope=lambda a: torch.zeros_like(a.query_rope))),
    "softmax_not_normalised": ("950", "npu_sparse_flash_attention", "sparse_attn", _last_rows_scaled),
    "half_for_interleaved_rotary": ("910B", "npu_rotary_mul", "apply_rope", _half_rotary),
    "one_experts_rows_lost": ("910B", "npu_grouped_matmul", "expert_linear", _lost_expert),
    "group_list_read_as_counts": ("950", "npu_grouped_matmul", "expert_linear", _with(group_list=_summed_again)),
    "scale_per_tensor": ("950", "npu_dynamic_mx_quant", "linear", _per_tensor_scale),
    "mx_block_cut_at_128_channels": ("950", "npu_dynamic_mx_quant", "linear", _last_channels_unseen),
    "mx_scale_pair_swapped": ("950", "npu_quant_matmul", "linear", _with(scale=lambda a: a.scale.flip(-1))),
    "routing_not_stable": ("910B", "npu_moe_init_routing_v2", "dispatch", _unstable),
    "last_pick_dropped": ("910C", "npu_moe_token_unpermute", "combine", _with(probs=_without_the_last)),
    "up_projection_not_clamped": ("910B", "npu_clipped_swiglu", "swiglu", _up_not_clamped),
    "epsilon_ignored": ("950", "npu_rms_norm", "rms_norm", _with(epsilon=0.0)),
    "sums_in_bfloat16": ("910B", "npu_transpose_batchmatmul", "grouped_linear", _bf16_sums),
    "gate_normalised_by_all_experts": ("950", "npu_moe_gating_top_k", "gate", _weights_of_all),
    "hash_gate_normalised_by_all_experts": ("950", "npu_moe_gating_top_k", "gate_hash", _weights_of_all),
    "gate_weights_biased": ("950", "npu_moe_gating_top_k", "gate", _biased_weights),
    "gate_sigmoid_for_sqrt_softplus": ("950", "npu_moe_gating_top_k", "gate", lambda k: lambda a: (a.x.sigmoid().gather(1, k(a)[1].long()), *k(a)[1:])),
    "tiles_not_made": ("950", "npu_format_cast", "expert_linear", lambda _: lambda a: mark(a.input.clone(), 29)),
    "tiles_of_other_columns": ("950", "npu_format_cast", "expert_linear", _with(input=lambda a: a.input.roll(32, -1))),
    "fp4_scales_of_the_next_group": ("950", "npu_grouped_matmul", "expert_linear", _with(antiquant_scale=_next_group)),
    "fp4_nibbles_swapped": ("950", "npu_format_cast", "expert_linear", _with(input=lambda a: (a.input << 4) | (a.input >> 4))),
    "hyper_connection_output_lost": ("910B", "npu_mhc_post", "hc_post", _with(h_post=lambda a: torch.zeros_like(a.h_post))),
    "gain_ignored": ("910C", "npu_rms_norm", "rms_norm", _with(gamma=lambda a: torch.ones_like(a.gamma))),
    "view_read_in_memory_order": ("910B", "npu_rms_norm", "hc_pre", _with(input=lambda a: a.input if a.input.is_contiguous() else a.input.transpose(1, 2))),
    "root_of_the_first_token": ("910C", "npu_rms_norm", "hc_pre", lambda k: lambda a: (k(a)[0], k(a)[1][:1].expand_as(k(a)[1]))),
    "norm_in_bfloat16": ("910B", "npu_rms_norm", "hc_pre", lambda k: lambda a: tuple(r.bfloat16().float() for r in k(a))),
    "rotation_turns_the_other_way": ("910C", "npu_rotary_mul", "apply_rope", _with(r2=lambda a: -a.r2)),
    "token_scale_of_the_first": ("910B", "npu_quant_matmul", "linear", _with(pertoken_scale=lambda a: a.pertoken_scale[:1].expand_as(a.pertoken_scale))),
    "int8_cut_off_for_rounded": ("910C", "npu_dynamic_quant", "linear", _cut_off),
    "swiglu_of_another_alpha": ("950", "npu_clipped_swiglu", "swiglu", _gate_clamped_below),
    "offsets_one_short": ("910C", "npu_moe_init_routing_v2", "dispatch", _ends_without_the_last),
    "negative_hits_counted": ("910C", "npu_lightning_indexer", "index_topk", _no_relu),
    "keys_past_the_length_seen": ("910B", "npu_lightning_indexer", "index_topk", _with(actual_seq_lengths_key=_whole_blocks)),
    "no_pick_read_as_row_0": ("910C", "npu_sparse_flash_attention", "sparse_attn", _with(sparse_indices=lambda a: a.sparse_indices.clamp(min=0))),
    "batches_in_another_order": ("950", "npu_transpose_batchmatmul", "grouped_linear", _with(weight=lambda a: a.weight.flip(0))),
    "extension_mixing_not_transposed": ("910B", "mhc_pre_sinkhorn", "hc_pre", _mixing_transposed),
    "extension_sinkhorn_of_two_rounds": ("910C", "mhc_pre_sinkhorn", "hc_pre", _with(numIters=2)),
    "extension_norm_left_out": ("950", "mhc_pre_sinkhorn", "hc_pre", _with(normEps=1e3)),
    "extension_post_not_doubled": ("910B", "mhc_pre_sinkhorn", "hc_pre", _post_not_doubled),
    "extension_turns_the_whole_row": ("950", "inplace_partial_rotary_mul", "apply_rope", _whole_row_turned),
    "extension_turns_the_other_way": ("910B", "inplace_partial_rotary_mul", "apply_rope", _with(r2=lambda a: -a.r2)),
    "vllm_gate_normalised_by_all_experts": ("910B", "moe_gating_top_k_hash", "gate", _weights_of_all),
    "vllm_gate_weights_biased": ("910C", "moe_gating_top_k_hash", "gate", _biased_weights),
    "vllm_gate_factor_left_out": ("910B", "moe_gating_top_k_hash", "gate", _with(routed_scaling_factor=1.0)),
    "vllm_hash_of_the_next_token": ("910C", "moe_gating_top_k_hash", "gate_hash", _with(input_ids=lambda a: a.input_ids.roll(1, 0))),
    "key_blocks_in_order_whatever_the_table_says": ("910B", "npu_lightning_indexer", "cached_index_topk", _with(block_table=_in_order)),
    "key_blocks_of_the_first_sequence": ("910C", "npu_lightning_indexer", "cached_index_topk", _with(block_table=_of_the_first)),
    "sign_of_head_weights_lost": ("910B", "npu_lightning_indexer", "index_topk", _with(weights=lambda a: a.weights.abs())),
}  # fmt: skip
