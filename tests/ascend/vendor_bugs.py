"""Faulty npu kernels, each after one that was met or could be: name -> (generation, op, contract that shows it, fault)."""

from types import SimpleNamespace

import torch

ROW_LIMIT = 65536  # stands for the row whose byte address no longer fits 32 bits


def _changed(a, **changes):
    return SimpleNamespace(**(vars(a) | changes))


def _with(**changes):
    """Run the kernel on changed arguments: each change is a value, or a function of the call's arguments."""
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
    "mx_scale_pair_swapped": ("950", "npu_quant_matmul", "linear", _with(scale=lambda a: a.scale.flip(-1))),
    "routing_not_stable": ("910B", "npu_moe_init_routing_v2", "dispatch", _unstable),
    "last_pick_dropped": ("910C", "npu_moe_token_unpermute", "combine", _with(probs=_without_the_last)),
    "up_projection_not_clamped": ("910B", "npu_clipped_swiglu", "swiglu", _up_not_clamped),
    "epsilon_ignored": ("950", "npu_rms_norm", "rms_norm", _with(epsilon=0.0)),
    "sums_in_bfloat16": ("910B", "npu_transpose_batchmatmul", "grouped_linear", _bf16_sums),
    "sign_of_head_weights_lost": ("910B", "npu_lightning_indexer", "index_topk", _with(weights=lambda a: a.weights.abs())),
}  # fmt: skip
