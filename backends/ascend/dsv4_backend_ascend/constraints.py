"""What the documents ask of a call, checked by us: torch-npu's shape functions let most violations
through.

Each function takes the generation and the bound arguments of one npu op and yields the rules that
they break, in words. Tensors need a ``dtype`` and a ``shape`` only, so that a plan can be checked
before any array exists. Sources: the documents named in ``data/capabilities.toml``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from dsv4_backend_ascend.capability import Generation
from dsv4_backend_ascend.formats import NZ, TILE_ROWS, format_of

Rule = Callable[[Generation, SimpleNamespace], Iterator[str]]

FP4_ALIGNED = 64  # elements of 32 bytes: what aclnnGroupedMatmulWeightNz aligns both axes of an E2M1 weight to
HEADS_IN_BATCH = 1000  # npu_rotary_mul in interleave mode: exclusive bound of batch times heads
LAST_AXIS_LIMIT = 65536  # matrix products: exclusive bound of an inner axis
TOKENS_ALL = (1 << 63) - 1  # pre_tokens and next_tokens: the only value supported
INT8, FLOAT16, FLOAT32, BFLOAT16, E4M3, E4M3_NPU, E8M0, E2M1 = 1, 5, 6, 15, 24, 292, 293, 296
"""torch-npu's numbers for dtypes, where an op takes a dtype as ``int`` (its
``_meta_registrations.py``).
"""


def dtype_of(tensor: Any) -> str:
    """Dtype name of a tensor or an operand."""
    return str(tensor.dtype).removeprefix("torch.")


def transposed(tensor: Any) -> bool:
    """Whether the last two axes are a transposed view; unknown (False) where there are no strides
    yet or an axis has one element.
    """
    if not hasattr(tensor, "stride") or min(tensor.shape[-2:]) == 1:
        return False
    return bool(tensor.stride(-2) < tensor.stride(-1))


def contiguous(tensor: Any) -> bool:
    """Whether a tensor is contiguous; an operand without storage will be."""
    return not hasattr(tensor, "is_contiguous") or bool(tensor.is_contiguous())


def rms_norm(_generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Dtype pairs and the shape of gamma."""
    x, gamma = dtype_of(a.input), dtype_of(a.gamma)
    if (x, gamma) not in {
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
    }:
        yield f"input is {x} with gamma {gamma}; gamma is float32 or of the input's dtype"
    if tuple(a.gamma.shape) != tuple(a.input.shape)[len(a.input.shape) - len(a.gamma.shape) :]:
        yield f"gamma has shape {tuple(a.gamma.shape)}; it is the input's last axes, {tuple(a.input.shape)}"


def rotary_mul(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Interleave mode on A2 and A3."""
    shape = tuple(a.input.shape)
    if generation == "950":
        yield "interleave mode is not documented for 950"
    if a.rotary_mode != "interleave" or a.rotate is not None:
        yield (
            f"rotary_mode={a.rotary_mode!r} with rotate={'given' if a.rotate is not None else None}; "
            "this backend calls interleave without rotate"
        )
    if len(shape) != 3:
        yield f"input has {len(shape)} axes; this backend calls it as tokens, heads, channels (TND)"
        return
    if not (shape[2] < 896 and shape[2] % 2 == 0):
        yield f"{shape[2]} channels; fewer than 896 and even"
    if shape[1] >= HEADS_IN_BATCH:
        yield f"{shape[1]} heads; fewer than {HEADS_IN_BATCH}"
    for name in ("r1", "r2"):
        table = getattr(a, name)
        if tuple(table.shape) != (shape[0], 1, shape[2]):
            yield f"{name} has shape {tuple(table.shape)}; tokens, 1, channels: {(shape[0], 1, shape[2])}"
        if dtype_of(table) != dtype_of(a.input):
            yield f"{name} is {dtype_of(table)}; the input's {dtype_of(a.input)}"


def transpose_batchmatmul(_generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Permutations, alignment and size limits."""
    x, weight, perm = a.input, a.weight, list(a.perm_x1 or [0, 1, 2])
    if dtype_of(x) != dtype_of(weight) or dtype_of(x) not in {"bfloat16", "float16"}:
        yield f"input is {dtype_of(x)}, weight {dtype_of(weight)}; both bfloat16 or float16 (float32 may be computed as HF32)"
    if len(x.shape) != 3 or len(weight.shape) != 3:
        yield f"input and weight have {len(x.shape)} and {len(weight.shape)} axes; three each"
        return
    if a.bias is not None or a.scale is not None:
        yield "bias is not supported, and scale gives int8"
    if perm not in ([0, 1, 2], [1, 0, 2]):
        yield f"perm_x1={perm}; [0, 1, 2] or [1, 0, 2]"
        return
    if list(a.perm_x2 or [0, 1, 2]) != [0, 1, 2] or list(a.perm_y or [1, 0, 2]) != [1, 0, 2]:
        yield f"perm_x2={a.perm_x2}, perm_y={a.perm_y}; [0, 1, 2] and [1, 0, 2]"
    batch, k, n = weight.shape
    if (x.shape[perm[0]], x.shape[2]) != (batch, k):
        yield f"input has shape {tuple(x.shape)} under {perm}; the weight has batch {batch} and k {k}"
    if k % 16 or n % 16:
        yield f"k={k}, n={n}; both multiples of 16"
    if perm == [1, 0, 2] and k * batch >= LAST_AXIS_LIMIT:
        yield f"k * batch = {k * batch} with a transposed input; below {LAST_AXIS_LIMIT}"
    if max(k, n, batch) >= LAST_AXIS_LIMIT:
        yield f"batch={batch}, k={k}, n={n}; each below {LAST_AXIS_LIMIT}"
    if a.batch_split_factor != 1:
        yield f"batch_split_factor={a.batch_split_factor}; this backend leaves it at 1"


def dynamic_quant(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Per token, to int8."""
    if generation == "950":
        yield "this backend calls it on A2 and A3"
    if dtype_of(a.input) not in {"float16", "bfloat16"}:
        yield f"input is {dtype_of(a.input)}; float16 or bfloat16"
    if len(a.input.shape) < 2:
        yield f"input has {len(a.input.shape)} axes; more than one"
    if a.smooth_scales is not None or a.group_index is not None:
        yield "smooth_scales and group_index are not used by this backend"
    if a.dst_type not in {None, INT8} or a.quant_mode != "pertoken":
        yield f"dst_type={a.dst_type}, quant_mode={a.quant_mode!r}; int8 ({INT8}) per token"


def dynamic_mx_quant(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """To E4M3 with E8M0 scales, 950 only."""
    if generation != "950":
        yield f"documented for Ascend 950 only, not {generation}"
    if dtype_of(a.input) not in {"float16", "bfloat16"}:
        yield f"input is {dtype_of(a.input)}; float16 or bfloat16"
    if a.dst_type not in {E4M3, E4M3_NPU} or a.round_mode != "rint":
        yield f"dst_type={a.dst_type}, round_mode={a.round_mode!r}; E4M3 ({E4M3} or {E4M3_NPU}) rounds by rint"
    if a.scale_alg not in {0, 1}:
        yield f"scale_alg={a.scale_alg}; 0 or 1 for E4M3"
    if not 0 < a.block_size <= 1024 or a.block_size % 32:
        yield f"block_size={a.block_size}; a multiple of 32 up to 1024"
    if a.axis not in {-1, len(a.input.shape) - 1}:
        yield f"axis={a.axis}; this backend quantises along the last"
    if a.dst_type_max or a.max_low_bound:
        yield f"dst_type_max={a.dst_type_max}, max_low_bound={a.max_low_bound}; this backend leaves both at 0"


def quant_matmul(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """int8 per token and channel on A2 and A3; MX on 950."""
    if len(a.x1.shape) != 2 or len(a.x2.shape) != 2:
        yield f"x1 and x2 have {len(a.x1.shape)} and {len(a.x2.shape)} axes; this backend multiplies matrices"
        return
    if a.offset is not None or a.bias is not None or a.y_scale is not None:
        yield "offset, bias and y_scale are not used by this backend"
    if a.pertoken_scale is None:
        yield "pertoken_scale is missing; activations are quantised per token"
        return
    if max(a.x1.shape[1], a.x2.shape[1]) >= LAST_AXIS_LIMIT:
        yield f"inner axes {a.x1.shape[1]} and {a.x2.shape[1]}; at most {LAST_AXIS_LIMIT - 1}"
    yield from _quant_matmul_int8(generation, a) if dtype_of(a.x1) == "int8" else _quant_matmul_mx(generation, a)


def _quant_matmul_int8(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    (m, k), n = a.x1.shape, a.x2.shape[1]
    if generation == "950":
        yield "this backend multiplies int8 on A2 and A3"
    if dtype_of(a.x2) != "int8" or a.x2.shape[0] != k:
        yield f"x2 is {dtype_of(a.x2)} with k={a.x2.shape[0]}; int8 with k={k}"
    if dtype_of(a.scale) not in {"float32", "bfloat16"} or tuple(a.scale.shape) not in {(n,), (1,)}:
        yield f"scale is {dtype_of(a.scale)}{tuple(a.scale.shape)}; float32 or bfloat16, ({n},) or (1,)"
    if dtype_of(a.pertoken_scale) != "float32" or tuple(a.pertoken_scale.shape) != (m,):
        yield f"pertoken_scale is {dtype_of(a.pertoken_scale)}{tuple(a.pertoken_scale.shape)}; float32 ({m},)"
    if a.output_dtype != BFLOAT16:
        yield f"output_dtype={a.output_dtype}; bfloat16 ({BFLOAT16})"
    if a.group_sizes:
        yield f"group_sizes={a.group_sizes}; none for scales per token and channel"


def _quant_matmul_mx(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    (m, k), n = a.x1.shape, a.x2.shape[1]
    fp4 = a.x2_dtype == E2M1
    if generation != "950":
        yield f"{dtype_of(a.x1)} operands are documented for Ascend 950 only, not {generation}"
    if dtype_of(a.x1) != "float8_e4m3fn" or dtype_of(a.x2) != ("uint8" if fp4 else "float8_e4m3fn"):
        yield f"x1 is {dtype_of(a.x1)}, x2 {dtype_of(a.x2)}; float8_e4m3fn, and uint8 pairs where x2_dtype is E2M1 ({E2M1})"
    if a.x2.shape[0] != (k // 2 if fp4 else k) or (fp4 and k % 8):
        yield f"x2 has {a.x2.shape[0]} rows for k={k}; {'k/2 pairs, k a multiple of 8' if fp4 else 'k'}"
    if fp4 and hasattr(a.x2, "stride") and not transposed(a.x2) and min(a.x2.shape) > 1:
        yield "x2 holds E2M1 pairs and is not transposed; they are packed along k"
    if (a.scale_dtype, a.pertoken_scale_dtype) != (E8M0, E8M0):
        yield f"scale_dtype={a.scale_dtype}, pertoken_scale_dtype={a.pertoken_scale_dtype}; E8M0 ({E8M0}) both"
    groups = -(-k // 64)
    if tuple(a.scale.shape) != (groups, n, 2):
        yield f"scale has shape {tuple(a.scale.shape)}; k/64, n, 2: {(groups, n, 2)}"
    if tuple(a.pertoken_scale.shape) != (m, groups, 2):
        yield f"pertoken_scale has shape {tuple(a.pertoken_scale.shape)}; m, k/64, 2: {(m, groups, 2)}"
    if list(a.group_sizes or []) != ([0, 0, 32] if fp4 else [1, 1, 32]):
        yield f"group_sizes={a.group_sizes}; {[0, 0, 32] if fp4 else [1, 1, 32]}"
    if a.output_dtype not in {BFLOAT16, FLOAT16, FLOAT32} or (fp4 and a.output_dtype == FLOAT32):
        yield f"output_dtype={a.output_dtype}; bfloat16 ({BFLOAT16}), float16, or float32 for FP8 weights"


def grouped_matmul(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """One tensor each, grouped by rows."""
    if len(a.x) != 1 or len(a.weight) != 1 or len(a.x[0].shape) != 2 or len(a.weight[0].shape) != 3:
        yield "x and weight are lists of one tensor here, [m, k] and [experts, k, n]"
        return
    x, weight = a.x[0], a.weight[0]
    (m, k), (experts, _, n) = x.shape, weight.shape
    if a.group_type != 0 or a.split_item not in {2, 3} or a.group_list is None:
        yield f"group_type={a.group_type}, split_item={a.split_item}; 0 (rows) and 2 or 3 (one result), with a group_list"
        return
    if a.group_list_type not in {0, 1}:
        yield f"group_list_type={a.group_list_type}; 0 (running totals) or 1 (counts)"
    if dtype_of(a.group_list) != "int64" or tuple(a.group_list.shape) != (experts,):
        yield f"group_list is {dtype_of(a.group_list)}{tuple(a.group_list.shape)}; int64 ({experts},), one entry a group"
    if experts > 1024:
        yield f"{experts} groups; at most 1024"
    if max(k, n) >= LAST_AXIS_LIMIT:
        yield f"k={k}, n={n}; both below {LAST_AXIS_LIMIT}"
    if a.act_type or a.bias or a.offset or a.antiquant_offset or a.tuning_config:
        yield "act_type, bias, offset, antiquant_offset and tuning_config are not used by this backend"
    kind = dtype_of(x)
    if kind == "bfloat16":
        if dtype_of(weight) != "bfloat16" or weight.shape[1] != k or a.scale or a.antiquant_scale or a.per_token_scale:
            yield f"x is bfloat16 with weight {dtype_of(weight)}[{experts}, {weight.shape[1]}, {n}]; bfloat16 with k={k} and no scales"
        if a.output_dtype not in {None, BFLOAT16}:
            yield f"output_dtype={a.output_dtype}; bfloat16 ({BFLOAT16}) or None"
    elif kind == "int8":
        yield from _grouped_matmul_int8(generation, a, m, k, n, experts)
    elif kind == "float8_e4m3fn":
        yield from _grouped_matmul_mx(generation, a, m, k, n, experts)
    else:
        yield f"x is {kind}; bfloat16, int8 (A2, A3) or float8_e4m3fn (950)"


def _grouped_matmul_int8(
    generation: Generation, a: SimpleNamespace, m: int, k: int, n: int, experts: int
) -> Iterator[str]:
    if generation == "950":
        yield "this backend multiplies int8 on A2 and A3"
    if dtype_of(a.weight[0]) != "int8" or a.weight[0].shape[1] != k:
        yield f"weight is {dtype_of(a.weight[0])} with k={a.weight[0].shape[1]}; int8 with k={k}"
    if not a.scale or dtype_of(a.scale[0]) != "bfloat16" or tuple(a.scale[0].shape) != (experts, n):
        yield f"scale is missing or not bfloat16 ({experts}, {n}); BF16 results need BF16 scales"
    if (
        not a.per_token_scale
        or dtype_of(a.per_token_scale[0]) != "float32"
        or tuple(a.per_token_scale[0].shape) != (m,)
    ):
        yield f"per_token_scale is missing or not float32 ({m},)"
    if a.output_dtype != BFLOAT16:
        yield f"output_dtype={a.output_dtype}; bfloat16 ({BFLOAT16})"


def _grouped_matmul_mx(
    generation: Generation, a: SimpleNamespace, m: int, k: int, n: int, experts: int
) -> Iterator[str]:
    fp4 = a.weight_dtype == E2M1
    weight, groups = a.weight[0], -(-k // 64)
    if generation != "950":
        yield f"float8_e4m3fn operands are documented for Ascend 950 only, not {generation}"
    if dtype_of(weight) != ("uint8" if fp4 else "float8_e4m3fn") or weight.shape[1] != (k // 2 if fp4 else k):
        yield (
            f"weight is {dtype_of(weight)} with {weight.shape[1]} rows for k={k}; "
            f"float8_e4m3fn, or uint8 pairs where weight_dtype is E2M1 ({E2M1})"
        )
    if fp4 and (k % FP4_ALIGNED or n % FP4_ALIGNED):
        yield f"E2M1 weight with k={k}, n={n}; both multiples of {FP4_ALIGNED}, 32 bytes"
    if fp4 and not transposed(weight):
        yield "E2M1 weight is not transposed; it is a transposed view of [experts, n, k / 2]"
    if fp4 and format_of(weight) != NZ:
        yield f"E2M1 weight is in format {format_of(weight)}; NZ ({NZ}): of grouped products only that of NZ weights takes FP8 x FP4"
    scales, name = (a.antiquant_scale, "antiquant_scale") if fp4 else (a.scale, "scale")
    shape = (experts, groups, n, 2)
    if not scales or tuple(scales[0].shape) != shape or dtype_of(scales[0]) not in {"uint8", "int8", "float8_e8m0fnu"}:
        yield f"{name} is missing or not bytes of shape {shape}"
    if not a.per_token_scale or tuple(a.per_token_scale[0].shape) != (m, groups, 2):
        yield f"per_token_scale is missing or not of shape {(m, groups, 2)}"
    if a.per_token_scale_dtype != E8M0 or (not fp4 and a.scale_dtype != E8M0):
        yield f"scale_dtype={a.scale_dtype}, per_token_scale_dtype={a.per_token_scale_dtype}; E8M0 ({E8M0})"
    if a.output_dtype not in {BFLOAT16, FLOAT16}:
        yield f"output_dtype={a.output_dtype}; bfloat16 ({BFLOAT16}) or float16"


def format_cast(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """E2M1 pairs to NZ, 950 only."""
    if generation != "950":
        yield f"this backend casts FP4 weights on Ascend 950 only, not {generation}"
    if a.acl_format != NZ or a.customize_dtype != E4M3 or a.input_dtype != E2M1 or dtype_of(a.input) != "uint8":
        yield (
            f"{dtype_of(a.input)} to format {a.acl_format}, customize_dtype={a.customize_dtype}, input_dtype={a.input_dtype}; "
            f"uint8 to {NZ}, E4M3 ({E4M3}), E2M1 ({E2M1})"
        )
    rows, width = a.input.shape[-2:]
    if rows % FP4_ALIGNED or rows % TILE_ROWS or 2 * width % FP4_ALIGNED:
        yield f"{rows} x {2 * width}; both multiples of {FP4_ALIGNED}, 32 bytes"
    if not contiguous(a.input):
        yield "input is not contiguous"


def moe_gating_top_k(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """sqrt(softplus), 950 only."""
    if generation != "950":
        yield f"norm_type={a.norm_type} on {generation}; this backend calls 2, sqrt(softplus), which is for 950 only"
    yield from _gating(a)


def moe_gating_top_k_hash(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """vLLM's, which this backend calls on A2 and A3."""
    if generation == "950":
        yield "this backend calls torch-npu's own on Ascend 950"
    if a.renorm or a.group_select_mode not in {0, 1}:
        yield f"renorm={a.renorm}, group_select_mode={a.group_select_mode}; 0, and 0 or 1"
    yield from _gating(a)


def _gating(a: SimpleNamespace) -> Iterator[str]:
    """sqrt(softplus) of one group."""
    if a.norm_type != 2 or a.eps <= 0:
        yield f"norm_type={a.norm_type}, eps={a.eps}; this backend calls 2, sqrt(softplus), and eps is more than 0"
    if dtype_of(a.x) not in {"float32", "bfloat16", "float16"} or len(a.x.shape) != 2:
        yield f"x is {dtype_of(a.x)} with {len(a.x.shape)} axes; a floating dtype, [tokens, experts]"
        return
    experts = a.x.shape[1]
    if experts > 2048 or not 1 <= a.k <= experts:
        yield f"{a.k} of {experts} experts; at most 2048 experts, and no more picks"
    if a.bias is not None and (dtype_of(a.bias) != dtype_of(a.x) or tuple(a.bias.shape) != (experts,)):
        yield f"bias is {dtype_of(a.bias)}{tuple(a.bias.shape)}; {dtype_of(a.x)} ({experts},)"
    if (a.k_group, a.group_count) != (1, 1) or a.out_flag:
        yield f"k_group={a.k_group}, group_count={a.group_count}, out_flag={a.out_flag}; this backend has one group"
    if (a.input_ids is None) != (a.tid2eid is None):
        yield "input_ids and tid2eid come together"
    elif a.tid2eid is not None:
        if a.k > 64 or tuple(a.tid2eid.shape[1:]) != (a.k,) or tuple(a.input_ids.shape) != (a.x.shape[0],):
            yield f"tid2eid{tuple(a.tid2eid.shape)}, input_ids{tuple(a.input_ids.shape)}; [ids, {a.k}], at most 64 picks, [tokens]"
        if {dtype_of(a.tid2eid), dtype_of(a.input_ids)} - {"int32", "int64"}:
            yield f"tid2eid is {dtype_of(a.tid2eid)}, input_ids {dtype_of(a.input_ids)}; int32 or int64"


def clipped_swiglu(_generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Halves of the last axis."""
    if dtype_of(a.x) not in {"float16", "bfloat16", "float32"}:
        yield f"x is {dtype_of(a.x)}; float16, bfloat16 or float32"
    if len(a.x.shape) < 2 or a.x.shape[-1] % 2:
        yield f"x has shape {tuple(a.x.shape)}; more than one axis, the last even"
    if not contiguous(a.x):
        yield "x is not contiguous"
    if a.group_index is not None or a.dim not in {-1, len(a.x.shape) - 1} or a.interleaved:
        yield f"group_index, dim={a.dim}, interleaved={a.interleaved}; this backend passes all rows, halves of the last axis"


def moe_init_routing_v2(_generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Dropless, unquantised."""
    if len(a.x.shape) != 2 or len(a.expert_idx.shape) != 2 or a.x.shape[0] != a.expert_idx.shape[0]:
        yield f"x{tuple(a.x.shape)} and expert_idx{tuple(a.expert_idx.shape)}; [rows, channels] and [rows, picks]"
    if dtype_of(a.x) not in {"float16", "bfloat16", "float32"} or dtype_of(a.expert_idx) != "int32":
        yield f"x is {dtype_of(a.x)}, expert_idx {dtype_of(a.expert_idx)}; a floating dtype and int32"
    if a.scale is not None or a.offset is not None or a.quant_mode != -1 or a.drop_pad_mode or a.active_num > 0:
        yield (
            f"quant_mode={a.quant_mode}, drop_pad_mode={a.drop_pad_mode}, active_num={a.active_num}; "
            "this backend copies every row unquantised"
        )
    if not 0 < a.expert_num <= 10240:
        yield f"expert_num={a.expert_num}; 1 to 10240"
    if list(a.active_expert_range or [0, a.expert_num]) != [0, a.expert_num]:
        yield f"active_expert_range={a.active_expert_range}; all: rows of other experts are left undefined"
    if a.expert_tokens_num_type not in {0, 1} or not a.expert_tokens_num_flag or a.row_idx_type not in {0, 1}:
        yield f"expert_tokens_num_type={a.expert_tokens_num_type}, row_idx_type={a.row_idx_type}; 0 or 1 each, with expert_tokens_num_flag"


def moe_token_unpermute(_generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Weighted sums of a token's picks."""
    rows = tuple(a.permuted_tokens.shape)
    if len(rows) != 2 or dtype_of(a.permuted_tokens) not in {"float16", "bfloat16", "float32"}:
        yield f"permuted_tokens is {dtype_of(a.permuted_tokens)}{rows}; [rows, channels] in a floating dtype"
    if dtype_of(a.sorted_indices) != "int32" or tuple(a.sorted_indices.shape) != rows[:1]:
        yield f"sorted_indices is {dtype_of(a.sorted_indices)}{tuple(a.sorted_indices.shape)}; int32 {rows[:1]}"
    if a.padded_mode or a.restore_shape is not None:
        yield "padded_mode and restore_shape are not supported"
    if a.probs is not None and (
        len(a.probs.shape) != 2 or a.probs.shape[0] * a.probs.shape[1] != rows[0] or a.probs.shape[1] > 512
    ):
        yield f"probs has shape {tuple(a.probs.shape)}; tokens, picks with {rows[0]} elements and at most 512 picks"


def lightning_indexer(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Key blocks of 128 channels."""
    if a.layout_query != "BSND" or a.layout_key != "PA_BSND":
        yield f"layouts {a.layout_query} and {a.layout_key}; this backend calls BSND with PA_BSND"
        return
    heads, dim = a.query.shape[2:]
    if dtype_of(a.query) != dtype_of(a.key) or dtype_of(a.query) not in {"bfloat16", "float16"}:
        yield f"query is {dtype_of(a.query)}, key {dtype_of(a.key)}; both bfloat16 or float16"
    if dtype_of(a.weights) not in ({dtype_of(a.query)} if generation == "950" else {dtype_of(a.query), "float32"}):
        yield f"weights are {dtype_of(a.weights)} on {generation}; the query's dtype{'' if generation == '950' else ' or float32'}"
    if dim != 128 or a.key.shape[3] != 128:
        yield f"{dim} channels; 128"
    if heads > 64 or (generation == "950" and heads not in {8, 16, 24, 32, 64}):
        yield f"{heads} heads on {generation}; {'8, 16, 24, 32 or 64' if generation == '950' else 'at most 64'}"
    if a.key.shape[2] != 1:
        yield f"{a.key.shape[2]} key heads; 1"
    if a.key.shape[1] % 16 or not 0 < a.key.shape[1] <= 1024:
        yield f"{a.key.shape[1]} keys a block; a multiple of 16 up to 1024"
    if not (1 <= a.sparse_count <= 2048 or a.sparse_count in {3072, 4096, 5120, 6144, 7168, 8192}):
        yield f"sparse_count={a.sparse_count}; 1 to 2048, or 3072 to 8192 in steps of 1024"
    if a.sparse_mode not in {0, 3} or (a.pre_tokens, a.next_tokens) != (TOKENS_ALL, TOKENS_ALL) or a.return_value:
        yield f"sparse_mode={a.sparse_mode}, pre_tokens, next_tokens, return_value; 0 or 3, the defaults, False with PA_BSND"
    batch = a.query.shape[0]
    if (
        a.block_table is None
        or dtype_of(a.block_table) != "int32"
        or len(a.block_table.shape) != 2
        or a.block_table.shape[0] != batch
    ):
        yield f"block_table is missing or not int32 [{batch}, blocks]"
    if (
        a.actual_seq_lengths_key is None
        or dtype_of(a.actual_seq_lengths_key) != "int32"
        or tuple(a.actual_seq_lengths_key.shape) != (batch,)
    ):
        yield f"actual_seq_lengths_key is missing or not int32 ({batch},)"
    if not contiguous(a.query) or not contiguous(a.key) or not contiguous(a.weights):
        yield "query, key or weights are not contiguous"


def sparse_flash_attention(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """MLA-absorb mode: 512 channels, 64 of RoPE, one key/value head."""
    if (a.layout_query, a.layout_kv) != ("TND", "TND"):
        yield f"layouts {a.layout_query} and {a.layout_kv}; this backend calls TND"
        return
    tokens, heads, dim = a.query.shape
    if len(
        {dtype_of(t) for t in (a.query, a.key, a.value, a.query_rope, a.key_rope) if t is not None}
    ) != 1 or dtype_of(a.query) not in {"bfloat16", "float16"}:
        yield "query, key, value and both ropes are not of one dtype, bfloat16 or float16"
    if dim != 512 or a.key.shape[2] != 512:
        yield f"head_dim={dim}; 512"
    if a.value is None or tuple(a.value.shape) != tuple(a.key.shape) or a.key.shape[1] != 1:
        yield f"key has shape {tuple(a.key.shape)}; rows, 1 head, 512 channels, and value the same"
    if a.query_rope is None or a.key_rope is None or a.query_rope.shape[-1] != 64 or a.key_rope.shape[-1] != 64:
        yield "query_rope and key_rope are missing or not of 64 channels; attention_mode 2 needs both"
    if generation != "950" and heads not in {1, 2, 4, 8, 16, 32, 64, 128}:
        yield f"{heads} heads on {generation}; a power of two up to 128"
    if generation == "950" and not 1 <= heads <= 128:
        yield f"{heads} heads on 950; 1 to 128"
    if a.attention_mode != 2:
        yield f"attention_mode={a.attention_mode}; 2 only"
    if (
        a.sparse_mode not in {0, 3}
        or (a.pre_tokens, a.next_tokens) != (TOKENS_ALL, TOKENS_ALL)
        or a.sparse_block_size != 1
    ):
        yield (
            f"sparse_mode={a.sparse_mode}, sparse_block_size={a.sparse_block_size}; "
            "0 or 3, single rows, default pre_tokens and next_tokens"
        )
    picks = tuple(a.sparse_indices.shape)
    if (
        dtype_of(a.sparse_indices) != "int32"
        or len(picks) != 3
        or picks[:2] != (tokens, 1)
        or picks[2] < 1
        or not contiguous(a.sparse_indices)
    ):
        yield f"sparse_indices is {dtype_of(a.sparse_indices)}{picks}; contiguous int32 ({tokens}, 1, picks)"
    for name in ("actual_seq_lengths_query", "actual_seq_lengths_kv"):
        lengths = getattr(a, name)
        if lengths is None or dtype_of(lengths) != "int32" or len(lengths.shape) != 1:
            yield f"{name} is missing or not int32 [batch]; TND takes running totals"
    if a.block_table is not None:
        yield "block_table is for PA_BSND"
    if a.sinks is not None:
        yield "sinks are not supported on A2 and A3, and on 950 by no released CANN up to 9.1.0; the sink is a row"
    if not all(contiguous(t) for t in (a.query, a.key, a.value, a.query_rope, a.key_rope) if t is not None):
        yield "query, key, value or a rope is not contiguous"


def mhc_pre(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """950 only; 4, 6 or 8 streams."""
    if generation != "950":
        yield f"documented for Ascend 950 only, not {generation}"
    if dtype_of(a.x) not in {"bfloat16", "float16"} or len(a.x.shape) != 3:
        yield f"x is {dtype_of(a.x)}{tuple(a.x.shape)}; bfloat16 or float16 [tokens, streams, channels]"
        return
    streams, dim = a.x.shape[1:]
    mixes = streams * (streams + 2)
    yield from _streams(streams)
    if dim % 16 or not 0 < dim <= 16384:
        yield f"{dim} channels; a multiple of 16 up to 16384"
    for name, shape in (("phi", (mixes, streams * dim)), ("alpha", (3,)), ("bias", (mixes,))):
        tensor = getattr(a, name)
        if dtype_of(tensor) != "float32" or tuple(tensor.shape) != shape:
            yield f"{name} is {dtype_of(tensor)}{tuple(tensor.shape)}; float32 {shape}"
    if a.gamma is not None or a.inner_precise != 0 or a.out_flag not in {0, 1}:
        yield f"gamma, inner_precise={a.inner_precise}, out_flag={a.out_flag}; no gamma, float32 products (0), 0 or 1"
    if 0 in a.x.shape:
        yield "x is empty"


def mhc_sinkhorn(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """950 only; 4, 6 or 8 streams."""
    if generation != "950":
        yield f"documented for Ascend 950 only, not {generation}"
    if dtype_of(a.x) != "float32" or len(a.x.shape) != 3 or a.x.shape[1] != a.x.shape[2]:
        yield f"x is {dtype_of(a.x)}{tuple(a.x.shape)}; float32 [tokens, streams, streams]"
        return
    yield from _streams(a.x.shape[2])
    if not 1 <= a.num_iters <= 100 or a.out_flag != 0:
        yield f"num_iters={a.num_iters}, out_flag={a.out_flag}; 1 to 100, and 0: intermediate results are for training"
    if not 1 <= a.x.shape[0] <= 65536:
        yield f"{a.x.shape[0]} tokens; 1 to 65536"


def mhc_post(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Four streams on A2 and A3."""
    if dtype_of(a.x) not in {"bfloat16", "float16"} or dtype_of(a.h_out) != dtype_of(a.x) or len(a.x.shape) != 3:
        yield (
            f"x is {dtype_of(a.x)}{tuple(a.x.shape)}, h_out {dtype_of(a.h_out)}; "
            "one dtype, bfloat16 or float16, x [tokens, streams, channels]"
        )
        return
    tokens, streams, dim = a.x.shape
    if generation != "950" and (streams != 4 or dim % 128 or not 0 < dim <= 100000):
        yield f"{streams} streams of {dim} channels on {generation}; 4, and a multiple of 128 up to 100000"
    for name, shape in (("h_res", (tokens, streams, streams)), ("h_post", (tokens, streams))):
        tensor = getattr(a, name)
        if tensor is None or dtype_of(tensor) != "float32" or tuple(tensor.shape) != shape:
            yield f"{name} is missing or not float32 {shape}"
    if tuple(a.h_out.shape) != (tokens, dim):
        yield f"h_out has shape {tuple(a.h_out.shape)}; {(tokens, dim)}"


def mhc_pre_sinkhorn(generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Four streams, 20 iterations."""
    if dtype_of(a.x) != "bfloat16" or len(a.x.shape) != 4:
        yield f"x is {dtype_of(a.x)}{tuple(a.x.shape)}; bfloat16 [batch, tokens, streams, channels]"
        return
    streams, dim = a.x.shape[2:]
    if streams != 4 or a.hcMult != streams or a.numIters != 20:
        yield f"{streams} streams, hcMult={a.hcMult}, numIters={a.numIters}; 4, 4 and 20"
    if dim not in {4096, 7168} if generation == "950" else dim % 128 or not 0 < dim <= 100000:
        yield f"{dim} channels on {generation}; {'4096 or 7168' if generation == '950' else 'a multiple of 128 up to 100000'}"
    mixes = streams * (streams + 2)
    for name, shape in (("phi", (mixes, streams * dim)), ("alpha", (3,)), ("bias", (mixes,))):
        tensor = getattr(a, name)
        if dtype_of(tensor) != "float32" or tuple(tensor.shape) != shape:
            yield f"{name} is {dtype_of(tensor)}{tuple(tensor.shape)}; float32 {shape}"
    if a.outFlag:
        yield "outFlag=True; intermediate results are for training"
    if 0 in a.x.shape:
        yield "x is empty"


def inplace_partial_rotary_mul(_generation: Generation, a: SimpleNamespace) -> Iterator[str]:
    """Interleave mode within a slice of the channels."""
    if len(a.x.shape) != 4 or a.rotary_mode != "interleave" or dtype_of(a.x) not in {"bfloat16", "float16", "float32"}:
        yield f"x is {dtype_of(a.x)} with {len(a.x.shape)} axes, rotary_mode={a.rotary_mode!r}; a floating dtype, BSND, interleave"
        return
    batch, tokens, _, dim = a.x.shape
    start, end = a.partial_slice
    if dim > 1024 or dim % 2 or not 0 <= start < end <= dim or (end - start) % 2:
        yield f"{dim} channels, slice [{start}, {end}); at most 1024 and even, a slice of an even number of them"
    for name in ("r1", "r2"):
        table = getattr(a, name)
        if tuple(table.shape) != (batch, tokens, 1, end - start) or dtype_of(table) != dtype_of(a.r1):
            yield f"{name} is {dtype_of(table)}{tuple(table.shape)}; one dtype, {(batch, tokens, 1, end - start)}"
    if 0 in a.x.shape or not contiguous(a.x):
        yield "x is empty or not contiguous"


def _streams(streams: int) -> Iterator[str]:
    if streams not in {4, 6, 8}:
        yield f"{streams} streams; 4, 6 or 8"


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (mhc_pre_sinkhorn, inplace_partial_rotary_mul, moe_gating_top_k_hash)} | {
    f"npu_{rule.__name__}": rule
    for rule in (
        rms_norm, rotary_mul, transpose_batchmatmul, dynamic_quant, dynamic_mx_quant, quant_matmul, grouped_matmul, clipped_swiglu,
        format_cast, moe_gating_top_k, moe_init_routing_v2, moe_token_unpermute, lightning_indexer, sparse_flash_attention, mhc_pre, mhc_sinkhorn, mhc_post,
    )
}  # fmt: skip


def violation(op: str, generation: Generation, arguments: SimpleNamespace) -> str:
    """First rule that a call breaks, as ``npu_op: found; documented``, or nothing."""
    return next((f"{op}: {broken}" for broken in RULES[op](generation, arguments)), "")
