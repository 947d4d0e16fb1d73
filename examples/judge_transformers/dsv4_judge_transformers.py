"""transformers' own functions of DeepSeek-V4 behind dsv4's contracts. Nothing is computed here but
what their modules do not hold.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from dsv4_core.backend import Backend, Support
from dsv4_core.dtypes import BFLOAT16
from dsv4_core.registry import hookimpl

torch.set_grad_enabled(False)


def given(module, **tensors):
    """Their module with these tensors as its parameters and buffers, in the dtypes that they
    have.
    """
    for name, tensor in tensors.items():
        delattr(module, name)
        module.register_buffer(name, tensor)
    return module.eval()


class TransformersJudged(Backend):
    """Norms, RoPE, routers, hyper-connections, grouped projection, SwiGLU and attention of
    transformers; claims nothing.
    """

    name = "transformers"
    claims_level = None
    numerics_modes = ("native", "float32")
    ties = "any"  # torch.topk promises no order among equals

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
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def supports(self, op, **operands):
        if "@" in str(getattr(operands.get("weight"), "dtype", "")):
            return Support(
                reason="their modules multiply plain weights; quantised ones are dequantised when they are loaded"
            )
        return super().supports(op, **operands)

    def rms_norm(self, x, weight, *, eps):
        if weight is None:
            return theirs.DeepseekV4UnweightedRMSNorm(eps)(x)
        return given(theirs.DeepseekV4RMSNorm(x.shape[1], eps), weight=weight.float())(x)

    def apply_rope(self, x, positions, freqs, *, inverse):
        holder = SimpleNamespace(main_inv_freq=freqs, main_attention_scaling=1.0)
        forward = theirs.DeepseekV4RotaryEmbedding.forward.__wrapped__  # without its update of lengths
        cos, sin = forward(holder, x, positions[None], layer_type="main")
        return theirs.apply_rotary_pos_emb(x, cos[0], -sin[0] if inverse else sin[0])

    def grouped_linear(self, x, weight):
        module = theirs.DeepseekV4GroupedLinear(x.shape[2], weight.shape[0], x.shape[1])
        return given(module, weight=weight.to(x.dtype))(x).flatten(1)

    def _router(self, kind, x, weight, topk, route_scale, **more):
        config = SimpleNamespace(
            num_experts_per_tok=topk, num_local_experts=weight.shape[0], hidden_size=x.shape[1],
            scoring_func="sqrtsoftplus", routed_scaling_factor=route_scale, vocab_size=1,
        )  # fmt: skip
        return given(kind(config), weight=weight.to(x.dtype), **more)

    def gate(self, x, weight, bias, *, topk, route_scale):
        router = self._router(theirs.DeepseekV4TopKRouter, x, weight, topk, route_scale, e_score_correction_bias=bias)
        _, weights, indices = router(x)
        return weights.float(), indices.int()

    def gate_hash(self, x, weight, tid2eid, ids, *, route_scale):
        topk = tid2eid.shape[1]
        router = self._router(theirs.DeepseekV4HashRouter, x, weight, topk, route_scale, tid2eid=tid2eid)
        _, weights, indices = router(x, ids.long())
        return weights.float(), indices.int()

    def swiglu(self, gate, up, weights, *, limit):
        experts = SimpleNamespace(limit=limit, act_fn=nn.functional.silu)
        y = theirs.DeepseekV4Experts._apply_gate(experts, torch.cat([gate, up], dim=-1))  # noqa: SLF001  where the clamp is
        return y if weights is None else (y * weights[:, None]).to(gate.dtype)

    def hc_pre(self, h, fn, scale, base, *, norm_eps, eps, iters):
        config = SimpleNamespace(
            hc_mult=h.shape[1], hc_sinkhorn_iters=iters, hc_eps=eps, rms_norm_eps=norm_eps, hidden_size=h.shape[2]
        )
        module = given(theirs.DeepseekV4HyperConnection(config), fn=fn, scale=scale, base=base)
        post, comb, collapsed = module(h.contiguous()[None])  # their streams always are
        return collapsed[0], post[0], comb[0]

    def hc_head(self, h, fn, scale, base, *, norm_eps, eps):
        config = SimpleNamespace(hc_mult=h.shape[1], hc_eps=eps, rms_norm_eps=norm_eps, hidden_size=h.shape[2])
        return given(theirs.DeepseekV4HyperHead(config), hc_fn=fn, hc_scale=scale, hc_base=base)(h[None])[0]

    def sparse_attn(self, q, kv, attn_sink, topk_idxs, *, softmax_scale):
        listed = torch.zeros(len(q), len(kv) + 1)
        listed.scatter_add_(1, topk_idxs.long() % (len(kv) + 1), torch.ones(topk_idxs.shape))  # -1: the last column
        mask = listed[:, :-1].log()[None, None].to(q.dtype)  # a row that is listed twice counts twice
        module = SimpleNamespace(num_key_value_groups=q.shape[1], sinks=attn_sink, training=False)
        rows = kv[None, None]
        out, _ = theirs.eager_attention_forward(module, q.transpose(0, 1)[None], rows, rows, mask, softmax_scale)
        return out[0]


@hookimpl
def dsv4_backend():
    return TransformersJudged
