"""Time dsv4 against Hugging Face transformers' DeepseekV4: same random weights, same tokens, same
threads, alternated in one run.

    python benchmarks/vs_transformers.py --backend torch --dtype bfloat16
    python benchmarks/vs_transformers.py --backend cuda --device cuda --weights published

Both sides hold plain weights of ``--dtype``. transformers runs with eager attention (it has no
other for this model) and the fastest of its experts implementations, which are tried first. dsv4
runs ``native`` numerics in bfloat16 (BF16 between operations, FP8 key/value rows, FP4 indexer keys)
and in float32 its exact mode, whose logits must agree. With ``--weights published`` dsv4 holds FP8
and FP4 weights as the published checkpoints do, and transformers their exact values in BF16. dsv4's
decode steps are recorded and replayed, as in ``dsv4 generate``. ``--device cuda`` runs both sides
on a GPU. Prefills of the two sides alternate, and blocks of eight decode steps, so that whatever
else the machine does meets both. Each begins after a pause: OpenMP's threads look for work for some
milliseconds after a side's step, and would take a core from the other side's. Printed: medians and
their ratio, the same of the fastest, the range of the middle 80 % (on an idle machine both sides'
lie within a tenth; a process beside them slows transformers far more, whose steps wait for all
threads more often, so a ratio taken then says little), and beside them the bounds: memory bandwidth
for decode, matrix products for prefill, both measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("--backend", default="torch")
parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
parser.add_argument("--device", default="cpu", help="of both sides, as torch names it")
parser.add_argument(
    "--weights", choices=("plain", "published"), default="plain", help="published: FP8 and FP4, and their values in BF16 for transformers"
)  # fmt: skip
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prefill", type=int, default=1024)
parser.add_argument("--decode", type=int, default=24, help="decode steps of a run")
parser.add_argument("--runs", type=int, default=5, help="alternated runs of each side")
parser.add_argument(
    "--clock", choices=("wall", "cpu"), default="wall", help="cpu, with --threads 1: for a machine that is busy"
)
parser.add_argument("--ops", action="store_true", help="also where a decode step's time goes, op by op")
parser.add_argument("--only", choices=("dsv4", "transformers"), help="time one side only (for profiling)")
args = parser.parse_args()
if args.weights == "published" and args.dtype != "bfloat16":
    parser.error("--weights published: native numerics alone multiply FP8 and FP4; add --dtype bfloat16")
if args.device != "cpu" and args.clock == "cpu":
    parser.error(f"--clock cpu: a processor's time says nothing of {args.device}; leave it out")
clock = time.process_time if args.clock == "cpu" else time.perf_counter
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read once, when the libraries load
    os.environ[variable] = str(args.threads)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dsv4_core.checkpoint.config import ModelConfig  # noqa: E402
from dsv4_core.contract.dtypes import Experts, Format, Host, ScaledArray, numpy_dtype, quantise_weight  # noqa: E402
from dsv4_core.contract.registry import create  # noqa: E402
from dsv4_core.contract.spec import OPS  # noqa: E402
from dsv4_core.graph.cache import Cache  # noqa: E402
from dsv4_core.graph.model import Model  # noqa: E402
from dsv4_core.graph.replay import Replay  # noqa: E402
from dsv4_core.graph.step import Addresses, Step  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=8192, hidden_size=1024, num_hidden_layers=6, num_attention_heads=16, head_dim=128, qk_rope_head_dim=64, q_lora_rank=256,
    o_groups=4, o_lora_rank=256, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=512, num_hash_layers=1, index_n_heads=16,
    index_head_dim=64, index_topk=128, compress_ratios=(0, 0, 4, 128, 4, 128), num_nextn_predict_layers=0, routed_scaling_factor=1.5,
)  # fmt: skip


PAUSE = 0.02  # s: libgomp's 300000 turns take 4 ms with pauses of 40 cycles, 15 with 130, as some CPUs have them
BLOCK = 8  # decode steps of a side one after another, as in use: after a pause a core, and its memory, take a step or two to wake


class RandomWeights:
    """A weight source of random weights: each made when first asked for, and kept. ``plain``: the
    dtype of what the checkpoint has in BF16 or less; ``published``: FP8 and FP4 where published
    checkpoints have them.
    """

    def __init__(self, config: ModelConfig, plain: str, *, published: bool = False) -> None:
        self.config, self.plain, self.published = config, plain, published
        self.tensors: dict[str, Host] = {}
        """Values, as transformers gets them."""
        self.packed: dict[str, ScaledArray] = {}
        self.rng = np.random.default_rng(0)

    def array(self, name: str) -> Host:
        """Make a tensor by its full name."""
        if name not in self.tensors:
            self.tensors[name] = self._make(name)
        return self.tensors[name]

    def weight(self, name: str) -> Any:
        """Make ``name.weight``, an array or a ``ScaledArray``."""
        full, fmt = f"{name}.weight", published_format(name) if self.published else None
        if fmt is None:
            return self.array(full)
        if full not in self.packed:
            self.packed[full] = quantise_weight(self.array(full).astype(np.float32), fmt)
            self.tensors[full] = self.packed[full].dequantise().astype(numpy_dtype(self.plain))
        return self.packed[full]

    def experts(self, prefix: str, projection: str) -> Experts:
        """Make one projection of every routed expert."""
        return Experts([self.weight(f"{prefix}.experts.{e}.{projection}") for e in range(self.config.n_routed_experts)])

    def _make(self, name: str) -> Host:
        shape = self._shape(name)
        if name.endswith("tid2eid"):
            return self.rng.random((shape[0], self.config.n_routed_experts)).argsort(1)[:, : shape[1]].astype(np.int64)
        if "norm" in name.split(".")[-2 if "." in name else 0]:
            return (1 + 0.1 * self.rng.standard_normal(shape)).astype(numpy_dtype(self.plain))
        wide = self.rng.standard_normal(shape).astype(np.float32)
        if name.endswith("_scale"):
            return np.abs(wide)
        if name.endswith((".weight", "_fn")):  # unit variance in, unit variance out
            wide *= np.float32(shape[1] ** -0.5)
        return (
            wide.astype(numpy_dtype(self.plain))
            if name.endswith(".weight")
            else wide * np.float32(0.1 if name.endswith("bias") else 1)
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        c = self.config
        D, d, hc, inter = c.hidden_size, c.head_dim, c.hc_mult, c.moe_intermediate_size
        rank_o = c.o_groups * c.o_lora_rank
        indexer = ".indexer." in name
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        m = c.compress_ratios[layer]
        width = (2 if m == 4 else 1) * (c.index_head_dim if indexer else d)
        leaf = name.rsplit("attn.", maxsplit=1)[-1].removeprefix("indexer.").removeprefix("compressor.")
        heads = (c.index_n_heads, c.index_head_dim) if indexer else (c.num_attention_heads, d)
        if "compressor" in name:
            table = {
                "wkv.weight": (width, D),
                "wgate.weight": (width, D),
                "ape": (m, width),
                "norm.weight": (c.index_head_dim if indexer else d,),
            }
            return table[leaf]
        if "experts" in name:
            return (D, inter) if ".w2." in name else (inter, D)
        mix = (2 + hc) * hc
        sizes: dict[str, tuple[int, ...]] = {
            "embed.weight": (c.vocab_size, D), "head.weight": (c.vocab_size, D), "hc_head_fn": (hc, hc * D), "hc_head_base": (hc,),
            "hc_head_scale": (1,),
            "fn": (mix, hc * D), "base": (mix,), "scale": (3,), "wq_a.weight": (c.q_lora_rank, D), "q_norm.weight": (c.q_lora_rank,),
            "wq_b.weight": (heads[0] * heads[1], c.q_lora_rank), "wkv.weight": (d, D), "kv_norm.weight": (d,), "attn_sink": (heads[0],),
            "wo_a.weight": (rank_o, heads[0] * d // c.o_groups), "wo_b.weight": (D, rank_o), "weights_proj.weight": (c.index_n_heads, D),
            "gate.weight": (c.n_routed_experts, D), "gate.bias": (c.n_routed_experts,),
            "gate.tid2eid": (c.vocab_size, c.num_experts_per_tok),
        }  # fmt: skip
        for key in (name, leaf, name.rsplit("ffn.", maxsplit=1)[-1], name.rpartition("_")[2]):
            if key in sizes:
                return sizes[key]
        return (D,)  # the norms of a block


def published_format(name: str) -> Format | None:
    """The format of a weight in the published checkpoints: FP4 experts, FP8 projections and shared
    experts, the rest in BF16 or float32.
    """
    if ".experts." in name and "shared" not in name:
        return "e2m1"
    fp8 = (
        "attn.wq_a",
        "wq_b",
        "attn.wkv",
        "attn.wo_a",
        "attn.wo_b",
        "shared_experts.w1",
        "shared_experts.w3",
        "shared_experts.w2",
    )
    return "e4m3" if name.endswith(fp8) else None


RENAMED = (
    ("indexer.compressor.", "compressor.indexer."), ("attn.indexer.weights_proj", "attn.compressor.indexer.scorer.weights_proj"),
    ("attn.indexer.wq_b", "attn.compressor.indexer.q_b_proj"), ("attn.compressor.norm", "attn.compressor.kv_norm"),
    ("compressor.indexer.norm", "compressor.indexer.kv_norm"), ("ape", "position_bias"), ("attn.", "self_attn."), ("ffn.", "mlp."),
    ("wq_a", "q_a_proj"), ("wq_b", "q_b_proj"), ("wkv", "kv_proj"), ("wgate", "gate_proj"), ("wo_a", "o_a_proj"), ("wo_b", "o_b_proj"),
    ("q_norm", "q_a_norm"), ("attn_sink", "sinks"), ("gate.bias", "gate.e_score_correction_bias"),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"), ("shared_experts.w3", "shared_experts.up_proj"), ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"), ("hc_attn_", "attn_hc."), ("hc_ffn_", "ffn_hc."),
)  # fmt: skip
TOP = {
    "embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight", "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn", "hc_head_base": "model.hc_head.hc_base", "hc_head_scale": "model.hc_head.hc_scale",
}  # fmt: skip


def to_torch(array: Host) -> torch.Tensor:
    """Share or copy a host array."""
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if str(array.dtype) == "bfloat16"
        else torch.from_numpy(array)
    )


def transformers_model(weights: RandomWeights) -> Any:
    """Build transformers' model with ``weights`` (all made by now) in the precisions that it would
    load them in.
    """
    import transformers
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    transformers.logging.set_verbosity_error()
    c = weights.config
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
        "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok",
        "moe_intermediate_size", "num_hash_layers", "index_n_heads", "index_head_dim", "index_topk",
        "routed_scaling_factor", "sliding_window", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps",
        "rms_norm_eps", "rope_theta", "compress_rope_theta", "max_position_embeddings",
    )  # fmt: skip
    yarn = {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    config = DeepseekV4Config(
        **{key: getattr(c, key) for key in same},
        compress_ratios=list(c.compress_ratios),
        rope_parameters=yarn,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    state: dict[str, torch.Tensor] = {}
    for name, array in weights.tensors.items():
        if ".experts." in name and "shared" not in name:
            continue
        renamed = TOP.get(name)
        if renamed is None:
            head, _, rest = name.partition(".")
            index, _, rest = rest.partition(".")
            for old, new in RENAMED:
                rest = new + rest.removeprefix(old) if rest.startswith(old) else rest.replace("." + old, "." + new)
            renamed = f"model.{head}.{index}.{rest}"
        state[renamed] = to_torch(array)
    for i in range(c.num_hidden_layers):
        w1, w3, w2 = (
            [to_torch(weights.array(f"layers.{i}.ffn.experts.{e}.{p}.weight")) for e in range(c.n_routed_experts)]
            for p in ("w1", "w3", "w2")
        )
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([g, u]) for g, u in zip(w1, w3, strict=True)]
        )
        state[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack(w2)
    strict = tuple(model._keep_in_fp32_modules_strict)  # noqa: SLF001  what from_pretrained would keep in float32
    state = {
        k: v.float() if any(part in k for part in strict) and v.is_floating_point() else v for k, v in state.items()
    }
    missing = set(model.state_dict()) ^ set(state)
    if missing:
        raise SystemExit(f"names that do not match transformers': {sorted(missing)[:8]}")
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():  # RoPE frequencies are computed, not loaded
        if type(module).__name__ == "DeepseekV4RotaryEmbedding":
            module.__init__(config, device="cpu")
    return model.eval()


class Transformers:
    """One side of the race."""

    def __init__(self, weights: RandomWeights) -> None:
        self.model = transformers_model(weights).to(args.device)
        self.cache: Any = None
        self.experts = {"prefill": "eager", "decode": "eager"}

    def prefill(self, ids: Host) -> Host:
        """Give the last token's logits."""
        self.cache = None
        self.model.set_experts_implementation(self.experts["prefill"])
        logits = self._forward(ids)
        self.model.set_experts_implementation(self.experts["decode"])
        return logits

    def _forward(self, ids: Host) -> Host:
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.from_numpy(ids)[None].to(args.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        self.cache = out.past_key_values
        return out.logits[0, -1].float().cpu().numpy()  # waits for the device

    decode = _forward


class Dsv4:
    """The other."""

    def __init__(self, weights: RandomWeights, backend: str, numerics: str, room: int) -> None:
        device = {} if args.device == "cpu" else {"device": args.device}
        self.backend = create(backend, numerics=numerics, **device)
        self.model = Model(weights, self.backend)
        self.cache = Cache(self.backend, weights.config, 1, room)
        self.replay = Replay(self.model, self.cache)

    def prefill(self, ids: Host) -> Host:
        """Give the last token's logits."""
        self.cache.rewind(0, 0)
        return self.decode(ids)

    def decode(self, ids: Host, *, replayed: bool = True) -> Host:
        """Give the last token's logits. ``replayed``: of a step that was recorded."""
        step = Step(self.cache, ids[None])
        logits = self.replay.logits(step) if replayed and len(ids) == 1 else self.logits(step)
        self.cache.advance(step.sequences, step.ends)
        return self.backend.to_numpy(logits)[-1].copy()  # a replay's result holds until the next

    def logits(self, step: Step) -> Any:
        """Run a step as it is; the last token's logits [1, vocab]."""
        return self.model.logits(self.model.forward(step)[-1:])

    def record(self, ids: Host) -> Any:
        """Record the next step."""
        step = Step(self.cache, ids[None])
        recorded = self.backend.record(
            lambda buffer: self.model.logits(self.model.forward(Addresses(self.cache, step.shape, buffer)))
        )
        recorded(step.host)
        return recorded


def timed(side: Transformers | Dsv4, ids: Host, prefill: int) -> tuple[float, float, list[Host]]:
    """Seconds of a prefill and the median of the decode steps after it, with all logits."""
    start = clock()
    logits = [side.prefill(ids[:prefill])]
    seconds = clock() - start
    steps = []
    for i in range(prefill, len(ids)):
        start = clock()
        logits.append(side.decode(ids[i : i + 1]))
        steps.append(clock() - start)
    return seconds, statistics.median(steps), logits


def clocked(seconds: list[float], call: Callable[[Host], Host], ids: Host) -> Host:
    """Call, and note how long it took."""
    start = clock()
    result = call(ids)
    seconds.append(clock() - start)
    return result


def choose_experts(side: Transformers, ids: Host) -> None:
    """Set transformers' fastest experts implementation, for prefill and for decode each; batched_mm
    copies a weight per token and is for decode alone.
    """
    for phase, names in (("prefill", ("eager", "grouped_mm")), ("decode", ("eager", "grouped_mm", "batched_mm"))):
        seconds: dict[str, float] = {}
        for name in names:
            side.experts[phase] = name
            times: list[float] = []
            if phase == "prefill":
                side.prefill(ids[:64])
                clocked(times, side.prefill, ids[: args.prefill])
            else:
                side.model.set_experts_implementation(name)
                for i in range(args.prefill, args.prefill + 8):
                    clocked(times, side.decode, ids[i : i + 1])
            seconds[name] = min(times)
        side.experts[phase] = min(seconds, key=lambda n: seconds[n])
        print(
            f"  transformers {phase} by experts implementation: {', '.join(f'{n} {t * 1e3:.1f} ms' for n, t in seconds.items())}"
        )


def best_of(body: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` calls, the device's work included."""
    times = []
    for _ in range(repeats):
        start = clock()
        body()
        if args.device != "cpu":
            torch.accelerator.synchronize()
        times.append(clock() - start)
    return min(times)


def bandwidth() -> float:
    """Bytes a second that all threads, or the device, read: the sum of 256 MB, or of 4 GB."""
    block = torch.ones((64 if args.device == "cpu" else 1024) << 20, device=args.device)
    return block.numel() * 4 / best_of(block.sum, 7)


def gemm_peak(dtype: str, backend: str) -> float:
    """Operations a second of a product of square matrices, 2048 on a CPU and 8192 elsewhere, by the
    library that the backend uses.
    """
    n = 2048 if args.device == "cpu" else 8192
    if backend == "reference":
        a = np.ones((n, n), np.float32)
        return 2 * n**3 / best_of(lambda: a @ a.T, 7)
    b = torch.ones((n, n), dtype=getattr(torch, dtype), device=args.device)
    return 2 * n**3 / best_of(lambda: torch.nn.functional.linear(b, b), 7)


def work(weights: RandomWeights, tokens: int) -> tuple[float, float]:
    """Bytes of weights that one decode step reads, and operations of a prefill of ``tokens``:
    products with weights, attention over what each token sees.
    """
    c = weights.config
    active = used = 0
    for name, array in weights.tensors.items():
        if array.ndim != 2 or "tid2eid" in name or name == "embed.weight" or name.endswith("ape"):
            continue
        share = c.num_experts_per_tok / c.n_routed_experts if ".experts." in name and "shared" not in name else 1
        held = weights.packed.get(name)
        active += (held.data.nbytes + held.scale.nbytes if held else array.nbytes) * share
        used += 0 if name == "head.weight" else array.size * share
    attended = sum(
        min(c.sliding_window, tokens) + (min(c.index_topk, tokens // 8) if m == 4 else tokens / 256 if m else 0)
        for m in c.compress_ratios
    )
    return active, 2 * tokens * used + 4 * tokens * attended * c.num_attention_heads * c.head_dim


def machine() -> str:
    """The device; for a CPU with those of its instructions that decide how matrices are
    multiplied.
    """
    if torch.device(args.device).type == "cuda":
        return f"{torch.cuda.get_device_name(args.device)}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = (
        dict(line.split("\t: ", 1) for line in cpuinfo.read_text().splitlines() if "\t: " in line)
        if cpuinfo.exists()
        else {}
    )
    fields = {key.strip(): value for key, value in lines.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    told = [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve") if f in flags]
    return f"{fields.get('model name', platform.machine()).strip()}; {' '.join(told) or 'flags unknown'}"


def op_table(side: Dsv4, tokens: Host) -> list[str]:
    """Per op of a decode step that is not replayed: its own milliseconds (without the ops inside
    it), its share, calls, microseconds a call.
    """
    backend = side.backend
    own: dict[str, float] = dict.fromkeys(OPS, 0.0)
    calls = dict.fromkeys(OPS, 0)
    inside = [0.0]

    def watched(name: str, method: Any) -> Any:
        def call(*a: Any, **k: Any) -> Any:
            inside.append(0.0)
            begin = clock()
            result = method(*a, **k)
            seconds = clock() - begin
            own[name] += seconds - inside.pop()
            calls[name] += 1
            inside[-1] += seconds
            return result

        return call

    for name in OPS:
        setattr(backend, name, watched(name, getattr(backend, name)))
    begin = clock()
    for i in range(len(tokens)):
        side.decode(tokens[i : i + 1], replayed=False)
    total = clock() - begin
    for name in OPS:
        delattr(backend, name)
    own["(graph, addresses, to host)"], n = total - sum(own.values()), len(tokens)
    return [
        f"{name:>28} {t / n * 1e3:7.3f} ms {t / total:6.1%}"
        + (f" {calls[name] / n:6.1f} calls {t / calls[name] * 1e6:7.1f} us each" if calls.get(name) else "")
        for name, t in sorted(own.items(), key=lambda item: -item[1])
        if t / total >= 0.002
    ]


def kernel_table(side: Dsv4, token: Host) -> list[str]:
    """Per kernel of a recorded step: milliseconds, share, calls, microseconds a call; nothing where
    the backend cannot time them apart.
    """
    timed_apart = getattr(side.record(token), "timed", list)()
    sums: dict[str, list[float]] = {}
    for name, t in timed_apart:
        sums.setdefault(name, []).append(t)
    total = sum(t for _, t in timed_apart)
    return [
        f"{name:>28} {sum(t) * 1e3:7.3f} ms {sum(t) / total:6.1%} {len(t):6.1f} calls {sum(t) / len(t) * 1e6:7.1f} us each"
        for name, t in sorted(sums.items(), key=lambda item: -sum(item[1]))
    ]


def call_cost(side: Dsv4, token: Host) -> tuple[int, float]:
    """Ops that one decode step calls, and seconds by which calling an op through the backend
    exceeds calling its function.
    """
    count = 0
    backend = side.backend
    for name in OPS:
        method = getattr(backend, name)

        def counted(*a: Any, _method: Any = method, **k: Any) -> Any:
            nonlocal count
            count += 1
            return _method(*a, **k)

        setattr(backend, name, counted)
    side.decode(token, replayed=False)
    for name in OPS:
        delattr(backend, name)
    x = (backend.zeros((1, 1), backend.activation_dtype),)
    body = type(backend).concat
    loop = range(20000)

    def through() -> None:
        for _ in loop:
            backend.concat(x, axis=0)

    def direct() -> None:
        for _ in loop:
            body(backend, x, axis=0)

    return count, max(0.0, best_of(through, 9) - best_of(direct, 9)) / len(loop)


def main() -> None:
    """Race, and print."""
    torch.set_num_threads(args.threads)
    weights = RandomWeights(CONFIG, args.dtype, published=args.weights == "published")
    numerics = "native" if args.dtype == "bfloat16" else args.dtype
    total = args.prefill + args.decode
    ours = Dsv4(weights, args.backend, numerics, total + 40)
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, total)
    sides: dict[str, Any] = {}
    print(
        f"dsv4 --backend {args.backend} ({numerics}) against transformers, {args.dtype}, {args.weights} weights, {args.device}, {args.threads} threads, "
        f"torch {torch.__version__}, NumPy {np.__version__}; {datetime.datetime.now(datetime.UTC).date()}\n  {machine()}"
    )
    if args.only != "dsv4":
        sides["transformers"] = Transformers(weights)
        choose_experts(sides["transformers"], ids)
    if args.only != "transformers":
        sides["dsv4"] = ours
        timed(ours, ids[: args.prefill + 2], args.prefill)  # first use: pages, repacked weights
    prefill: dict[str, list[float]] = {name: [] for name in sides}
    decode: dict[str, list[float]] = {name: [] for name in sides}
    logits: dict[str, list[Host]] = {name: [] for name in sides}
    for _ in range(args.runs):
        for name, side in sides.items():
            time.sleep(PAUSE)
            logits[name] = [clocked(prefill[name], side.prefill, ids[: args.prefill])]
        for first in range(args.prefill, total, BLOCK):
            for name, side in sides.items():
                time.sleep(PAUSE)
                for i in range(first, min(first + BLOCK, total)):
                    logits[name].append(clocked(decode[name], side.decode, ids[i : i + 1]))
    median = {name: (statistics.median(prefill[name]), statistics.median(decode[name])) for name in sides}
    for name, (p, d) in median.items():
        tenths = statistics.quantiles(decode[name], n=10)
        fastest = (
            f"fastest {min(prefill[name]) * 1e3:.1f} and {min(decode[name]) * 1e3:.2f}; "
            f"decode, the middle 80 %: {tenths[0] * 1e3:.2f} to {tenths[-1] * 1e3:.2f}"
        )
        print(
            f"{name:>13}: prefill {args.prefill} tokens {p * 1e3:8.1f} ms, decode {d * 1e3:7.2f} ms a token ({fastest})"
        )
    if len(sides) == 2:
        for kind, least in (("medians", statistics.median), ("fastest", min)):
            by = [
                least(prefill["transformers"]) / least(prefill["dsv4"]),
                least(decode["transformers"]) / least(decode["dsv4"]),
            ]
            print(f"        ratio: prefill {by[0]:.2f}x, decode {by[1]:.2f}x ({kind} of {args.runs} runs)")
        theirs, mine = (np.stack(logits[name]) for name in ("transformers", "dsv4"))
        error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
        top = (mine.argmax(-1) == theirs.argmax(-1)).mean()
        # native mode has FP8 and FP4 rows, transformers none, and random weights are chaotic;
        # unrelated logits are 1.4 apart
        limit = 1e-4 if args.dtype == "float32" else 0.5
        print(f"       logits: relative L2 difference {error:.1e} (limit {limit:g}), same top token {top:.0%}")
        if error > limit:
            sys.exit("logits disagree")
    if "dsv4" in sides:
        p, d = median["dsv4"]
        touched, operations = work(weights, args.prefill)
        read, peak = bandwidth(), gemm_peak(args.dtype, args.backend)
        print(
            f"       decode: reads {touched / 1e6:.0f} MB of weights; "
            f"at {read / 1e9:.1f} GB/s {touched / read * 1e3:.2f} ms: {touched / read / d:.0%} of the bound"
        )
        print(
            f"      prefill: {operations / 1e9:.0f} GFLOP at {operations / p / 1e9:.0f} GFLOP/s: "
            f"{operations / p / peak:.0%} of the {peak / 1e9:.0f} of a plain product"
        )
        if args.ops:
            print("\n".join(["  a decode step that is not recorded, op by op:", *op_table(ours, ids[:24])]))
            if table := kernel_table(ours, ids[:1]):
                print("\n".join(["  a recorded one, each kernel called alone, the fastest of 20 calls:", *table]))
        count, each = call_cost(ours, ids[:1])
        print(
            f"      op call: {count} ops a decode step, {each * 1e9:.0f} ns each through the interface: {count * each / d:.3%} of a step"
        )


if __name__ == "__main__":
    main()
