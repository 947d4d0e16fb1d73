"""Recorded traces as checks: single ops on recorded inputs, and the parts of a layer that are made
of several.

An op's result and the recorded one are each within their budget of the exact result, so they differ
by at most both budgets. Casts agree bit for bit. What is made of several ops (attention, experts, a
block) goes through quantisations that turn one BF16 unit into an FP8 code: its distance from the
exact output (nothing quantised or rounded) is compared with the recorded output's own, as a whole
model's is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dsv4_conformance.cases.checks import level_of, refused
from dsv4_conformance.check import Check, Finding, Group, Session
from dsv4_conformance.model import golden
from dsv4_conformance.model.checks import ALLOWED, ratio_of_means, share_of_excess
from dsv4_conformance.verdict.budget import expect
from dsv4_conformance.verdict.calls import Call, execute, seed_of
from dsv4_conformance.verdict.discrete import judge_discrete
from dsv4_conformance.verdict.judge import Verdict, judge_exact, judge_rounded
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import BFLOAT16, E8M0_VALUES, Host, decode, encode, numpy_dtype, power_of_two_scale
from dsv4_core.contract.spec import OPS
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.dtypes import Format
    from dsv4_core.contract.spec import Numerics, Tier

LAYERS: dict[golden.Model, tuple[int, ...]] = {"tiny-flash": (0, 2, 3), "tiny-pro": (0, 2)}
TIMES = ("prefill", *(f"decode{p}" for p in range(250, 257)))
PREFILLED = 250  # tokens before the first recorded decode position
SAME_ROWS = 0.995  # elements of compressed rows that are equal; the others are one code apart

Tensors = dict[str, Host]


def rows(x: Host) -> Host:
    """All but the last axis flattened."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Recorded:
    """A recorded call: its checkpoint's weights and its tensors."""

    source: Checkpoint
    layer: int
    tensors: Tensors

    def weight(self, name: str) -> Any:
        """A weight of the layer."""
        return self.source.weight(f"layers.{self.layer}.{name}")

    def array(self, name: str) -> Host:
        """A tensor of the layer."""
        return self.source.array(f"layers.{self.layer}.{name}")


def _gemm(weight: Callable[[Recorded], Any]) -> Callable[[Recorded], tuple[Any, ...]]:
    def call(r: Recorded) -> tuple[Any, ...]:
        codes = decode(rows(r.tensors["a"]), "e4m3") * np.repeat(E8M0_VALUES[rows(r.tensors["a_scale"])], 128, axis=1)
        return "linear", [codes.astype(BFLOAT16), weight(r)], {"out_dtype": "bfloat16"}, ("out",)

    return call


def _lowest_expert(r: Recorded) -> Any:
    return r.weight(f"ffn.experts.{int(r.tensors['gate.indices'].min())}.w1")


def _hc_pre(r: Recorded) -> tuple[Any, ...]:
    c, mix = r.source.config, [r.array(f"hc_attn_{part}") for part in ("fn", "scale", "base")]
    h = r.tensors["x"].reshape(-1, c.hc_mult, c.hidden_size)
    return (
        "hc_pre",
        [h, *mix],
        {"norm_eps": c.rms_norm_eps, "eps": c.hc_eps, "iters": c.hc_sinkhorn_iters},
        ("out", "post", "comb"),
    )


def _hc_post(r: Recorded) -> tuple[Any, ...]:
    c, t = r.source.config, r.tensors
    h = t.get("residual", t["hc_pre.x"]).reshape(-1, c.hc_mult, c.hidden_size)
    return "hc_post", [rows(t["x"]), h, rows(t["post"]), t["comb"].reshape(-1, c.hc_mult, c.hc_mult)], {}, ("out",)


def _sinkhorn(r: Recorded) -> tuple[Any, ...]:
    c, t = r.source.config, r.tensors
    return (
        "hc_split_sinkhorn",
        [rows(t["mixes"]), t["hc_scale"], t["hc_base"]],
        {"hc": c.hc_mult, "eps": c.hc_eps, "iters": c.hc_sinkhorn_iters},
        ("pre", "post", "comb"),
    )


def _gate(r: Recorded) -> tuple[Any, ...]:
    c, x = r.source.config, rows(r.tensors["x"])
    scale = {"route_scale": c.routed_scaling_factor}
    if r.layer < c.num_hash_layers:
        ids = r.tensors["input_ids"].reshape(-1).astype(np.int32)
        return "gate_hash", [x, r.weight("ffn.gate"), r.array("ffn.gate.tid2eid"), ids], scale, ("weights", "indices")
    return (
        "gate",
        [x, r.weight("ffn.gate"), r.array("ffn.gate.bias")],
        {"topk": c.num_experts_per_tok, **scale},
        ("weights", "indices"),
    )


def _sparse_attn(r: Recorded) -> tuple[Any, ...]:
    c, t = r.source.config, r.tensors
    q = t["q"].reshape(-1, c.num_attention_heads, c.head_dim)
    return (
        "sparse_attn",
        [q, t["kv"][0], t["attn_sink"], t["topk_idxs"][0].astype(np.int32)],
        {"softmax_scale": c.head_dim**-0.5},
        ("out",),
    )


def _qdq(fmt: str, block: int) -> Callable[[Recorded], tuple[Any, ...]]:
    def call(r: Recorded) -> tuple[Any, ...]:
        x = rows(r.tensors["x"])
        return "act_qdq", [x], {"format": fmt, "block": block, "channels": x.shape[1]}, ("out",)

    return call


SINGLE: dict[str, Callable[[Recorded], tuple[Any, ...]]] = {
    "act_quant_fp8_128": lambda r: ("act_quant", [rows(r.tensors["x"])], {"block": 128}, ("q", "scale")),
    "act_quant_qdq_64": _qdq("e4m3", 64),
    "act_quant_fp4_qdq_32": _qdq("e2m1", 32),
    "rotate_activation": lambda r: ("hadamard", [rows(r.tensors["x"])], {}, ("out",)),
    "fp8_gemm": _gemm(lambda r: r.weight("attn.wq_a")),
    "fp4_gemm": _gemm(_lowest_expert),
    "rms_norm": lambda r: (
        "rms_norm",
        [rows(r.tensors["x"]), r.weight("attn_norm")],
        {"eps": r.source.config.rms_norm_eps},
        ("out",),
    ),
    "hc_split_sinkhorn": _sinkhorn,
    "hc_pre": _hc_pre,
    "hc_post": _hc_post,
    "gate": _gate,
    "sparse_attn": _sparse_attn,
}
"""Recorded operation -> (op, operands, scalars, names of the recorded results)."""

OP_OF = {
    "act_quant_fp8_128": "act_quant", "act_quant_qdq_64": "act_qdq", "act_quant_fp4_qdq_32": "act_qdq", "rotate_activation": "hadamard", "fp8_gemm": "linear",
    "fp4_gemm": "linear", "rms_norm": "rms_norm", "hc_split_sinkhorn": "hc_split_sinkhorn", "hc_pre": "hc_pre", "hc_post": "hc_post", "gate": "gate",
    "sparse_attn": "sparse_attn",
}  # fmt: skip


def recorded(model: golden.Model, time: str, layer: int, what: str) -> Tensors:
    """Tensors of one recorded call, with the few of its neighbours that it leans on."""
    trace = golden.load(model, "trace")
    prefix = f"{time}.layer{layer}."
    own = {k.removeprefix(f"{prefix}{what}."): v for k, v in trace.items() if k.startswith(f"{prefix}{what}.")}
    lent = {k: trace[prefix + k] for k in ("gate.indices", "gate.input_ids", "hc_pre.x") if prefix + k in trace}
    return {**lent, **own} if own else {}


def source(session: Session, model: golden.Model) -> Checkpoint:
    """The checkpoint that a trace was recorded on, opened once a session."""
    key = f"checkpoint {model}"
    if key not in session.shared:
        session.shared[key] = Checkpoint(golden.checkpoint_path(model))
    return cast("Checkpoint", session.shared[key])


@dataclass(frozen=True)
class OpTrace:
    """One recorded call of one op."""

    model: golden.Model
    time: str
    layer: int
    what: str
    tier: Tier = "standard"
    group: Group = "trace"

    @property
    def id(self) -> str:
        """``trace/MODEL/TIME.layerN.OPERATION``."""
        return f"trace/{self.model}/{self.time}.layer{self.layer}.{self.what}"

    @property
    def op(self) -> str:
        """The op that computes it (score-routed gates and hash gates share their recorded name)."""
        return (
            "gate_hash"
            if self.what == "gate" and self.layer < (2 if self.model == "tiny-flash" else 1)
            else OP_OF[self.what]
        )

    @property
    def level(self) -> int:
        """The op's."""
        return level_of(OPS[self.op])

    def run(self, session: Session) -> Finding:
        """Ask for support; run the op; compare with the recorded result, and with the oracle for
        what both may be off.
        """
        taken = Recorded(
            source(session, self.model), self.layer, recorded(self.model, self.time, self.layer, self.what)
        )
        op, operands, scalars, names = SINGLE[self.what](taken)
        call = Call(op, operands, scalars, seed=seed_of(self.id))
        if finding := refused(self, call, session):
            return finding
        expected = expect(call, session.oracle, session.backend)
        outcome = execute(call, session.backend, [e.value.shape for e in expected])
        verdict = Verdict(list(outcome.problems), used=float("inf") if outcome.problems else 0.0)
        if verdict.ok and op == "gate":
            verdict.add(judge_discrete(call, outcome.results, session.oracle, session.backend), "")
        if not verdict.ok:
            return Finding.of(self, verdict, seed=call.seed)
        if op == "gate" and same_experts(outcome.results[1], taken.tensors["indices"]):
            outcome.results[0] = in_order(outcome.results[0], outcome.results[1], taken.tensors["indices"])
            theirs, ours = taken.tensors["indices"], expected[1].value
            parts: dict[str, Any] = {}
            for part in ("value", "budget", "spread", "noise"):
                parts[part] = in_order(getattr(expected[0], part), ours, theirs)
            expected[0] = replace(expected[0], **parts)
        for name, got, want in zip(names, outcome.results, expected, strict=True):
            theirs = taken.tensors[name].reshape(want.value.shape)
            if want.budget is None and op != "gate":
                verdict.add(judge_exact(got, type(want)(theirs, want.dtype)), f"{name}: ")
            elif want.budget is not None:
                assert want.spread is not None
                assert want.noise is not None
                explained = 2 * want.spread + _unit_bias(want.value)
                both = type(want)(theirs.astype(np.float64), want.dtype, 2 * want.budget, explained, 2 * want.noise)
                verdict.add(judge_rounded(got, both), f"{name} against the recorded one: ")
        return Finding.of(self, verdict, seed=call.seed)


def same_experts(a: Host, b: Host) -> bool:
    """Say whether two choices [tokens, k] are of the same experts, in whatever order."""
    return bool((np.sort(a, axis=1) == np.sort(rows(b), axis=1)).all())


def in_order(values: Host, of: Host, wanted: Host) -> Host:
    """Values of experts ``of`` [tokens, k] in the order in which ``wanted`` lists them."""
    by_expert = np.take_along_axis(values, np.argsort(of, axis=1), 1)
    return np.take_along_axis(by_expert, np.argsort(np.argsort(rows(wanted), axis=1), axis=1), 1)


def _unit_bias(value: Host) -> Host:
    """Recorded values are rounded too, so a mean difference between two roundings says nothing
    about either: explain a unit of it.
    """
    return np.abs(value) * 2.0**-8


def loaded(session: Session, model: golden.Model) -> Model:
    """The recorded model on the session's backend, loaded once a session."""
    key = f"model {model}"
    if key not in session.shared:
        session.shared[key] = Model(source(session, model), session.backend)
    return cast("Model", session.shared[key])


def exactly(session: Session) -> Session:
    """The reference in float64 without quantisation, on which exact outputs are computed, made once
    a session.
    """
    if "exactly" not in session.shared:
        session.shared["exactly"] = Session(registry.reference()(numerics="float64"), session.tier)
    return cast("Session", session.shared["exactly"])


def replay(session: Session, model: golden.Model, layer: int, what: str) -> tuple[dict[str, Host], Cache]:
    """Run a layer's attention or whole block on the recorded inputs, prefill and then one by one:
    outputs by time, and the cache.
    """
    key = f"replay {model} {layer} {what}"
    if key not in session.shared:
        m, trace = loaded(session, model), golden.load(model, "trace")
        be, block = m.backend, m.blocks[layer]
        cache, outputs = Cache(be, m.config, 1, 320), {}
        for time in TIMES:
            x = trace[f"{time}.layer{layer}.{what}.x"][0]
            start = int(cache.lengths[0])
            step = Step(cache, trace["tokens"][:, start : start + len(x)])
            given = be.from_numpy(x.astype(numpy_dtype(be.activation_dtype)))
            y = m.attention(block, given, step) if what == "attention" else m.block(block, given, step)
            outputs[time] = np.asarray(be.to_numpy(y)).astype(np.float64)
            cache.advance(step.sequences, step.ends)
        session.shared[key] = outputs, cache
    return cast("tuple[dict[str, Host], Cache]", session.shared[key])


@dataclass(frozen=True)
class PartTrace:
    """A part of a layer on recorded inputs: ``attention``, ``block``, ``shared_expert``, ``moe``;
    prefill, or all decode positions together.
    """

    model: golden.Model
    phase: str
    layer: int
    what: str
    tier: Tier = "standard"
    group: Group = "trace"
    level: int = 2

    @property
    def id(self) -> str:
        """``trace/MODEL/PHASE.layerN.PART``."""
        return f"trace/{self.model}/{self.phase}.layer{self.layer}.{self.what}"

    @property
    def op(self) -> str:
        """The part's name."""
        return f"layer_{self.what}"

    def run(self, session: Session) -> Finding:
        """Run the part on every recorded input of the phase; compare its distance from the exact
        output with the recorded one's.
        """
        theirs = [recorded(self.model, t, self.layer, self.what)["out"].astype(np.float64) for t in self.times]
        exact = self.outputs(exactly(session))
        width = theirs[0].shape[-1]
        mine, reference = (
            ((np.concatenate([x.reshape(-1, width) for x in part]) - exact) ** 2).sum(-1)
            for part in ([self.outputs(session)], theirs)
        )
        ratio, least = (float(np.sqrt(x)) for x in ratio_of_means(mine, reference))
        relative = float(np.sqrt(mine.sum() / (exact**2).sum()))
        figures = {"distance from exact": relative, "ratio to the recorded": ratio, "ratio at least": least}
        verdict = Verdict(used=share_of_excess(least), metrics=figures)
        if not least <= ALLOWED:
            verdict.problems.append(
                f"{self.what} of layer {self.layer}, {self.phase}: {relative:.3g} (relative L2) from the exact output, {ratio:.3g} times as far as the "
                f"recorded one, at least {least:.3g} with 95 % confidence; {ALLOWED} is allowed"
            )
        return Finding.of(self, verdict)

    @property
    def times(self) -> list[str]:
        """The recorded times of the phase."""
        return [t for t in TIMES if t.startswith(self.phase)]

    def outputs(self, session: Session) -> Host:
        """The part's outputs of the phase on a session's backend, [rows, width] in float64."""
        every = [self.output(session, t) for t in self.times]
        return np.concatenate([x.reshape(-1, every[0].shape[-1]) for x in every]).astype(np.float64)

    def output(self, session: Session, time: str) -> Host:
        """The part's output at one recorded time."""
        if self.what in {"attention", "block"}:
            return replay(session, self.model, self.layer, self.what)[0][time]
        m, t = loaded(session, self.model), recorded(self.model, time, self.layer, self.what)
        be, ffn = m.backend, m.blocks[self.layer].ffn
        x = be.from_numpy(rows(t["x"]).astype(numpy_dtype(be.activation_dtype)))
        if self.what == "shared_expert":
            assert ffn.shared is not None
            return np.asarray(be.to_numpy(be.ffn(x, *ffn.shared, limit=m.config.swiglu_limit)))
        step = Step(Cache(be, m.config, 1, 512), t["gate.input_ids"].reshape(1, -1))
        return np.asarray(be.to_numpy(m.moe(ffn, x, step)))


@dataclass(frozen=True)
class RowsTrace:
    """Compressed rows of a layer (``compressor``) or of its indexer, as the cache holds them after
    the recorded inputs.
    """

    model: golden.Model
    layer: int
    what: str
    tier: Tier = "standard"
    group: Group = "trace"
    level: int = 2

    @property
    def id(self) -> str:
        """``trace/MODEL/layerN.PART``."""
        return f"trace/{self.model}/layer{self.layer}.{self.what}"

    @property
    def op(self) -> str:
        """The part's name."""
        return f"layer_{self.what}"

    def run(self, session: Session) -> Finding:
        """Equal in 99.5 % of the elements, elsewhere one code of the 8-bit or 4-bit grid apart."""
        m, cache = loaded(session, self.model), replay(session, self.model, self.layer, "attention")[1]
        layer, ratio, be = cache.layers[self.layer], m.config.compress_ratios[self.layer], m.backend
        keys = self.what == "indexer_compressor"
        stored, layout = (layer.keys, cache.key_layout) if keys else (layer.rows, cache.kv_layout)
        assert stored is not None
        same = apart = total = 0
        for time in TIMES:
            if "out" not in (t := recorded(self.model, time, self.layer, self.what)):
                continue
            last = PREFILLED if time == "prefill" else int(time.removeprefix("decode")) + 1
            index = np.arange(last // ratio - len(t["out"][0]), last // ratio, dtype=np.int32)
            got, want = np.asarray(be.to_numpy(be.cache_read(stored, be.from_numpy(index), layout=layout))), t["out"][0]
            quantised = layout.dim - layout.rope_dim
            same, total = same + int((got == want).sum()), total + got.size
            a, b = codes(got[:, :quantised], want[:, :quantised], "e2m1" if keys else "e4m3", 32 if keys else 64)
            rope = [x[:, quantised:].astype(np.float64) for x in (got, want)]
            apart += int((np.abs(a - b) > 1).sum() + (np.abs(rope[0] - rope[1]) > 2.0**-7 * np.abs(rope[1])).sum())
        verdict = Verdict(used=(1 - same / total) / (1 - SAME_ROWS), metrics={"equal_elements": same / total})
        if same / total < SAME_ROWS or apart:
            verdict.problems.append(
                f"rows of layer {self.layer}: {same / total:.4%} of the elements equal the recorded ones, {apart} are more than one code apart; "
                f"want {SAME_ROWS:.1%} and none"
            )
        return Finding.of(self, verdict)


def codes(a: Host, b: Host, fmt: Format, block: int) -> tuple[Host, Host]:
    """Both arrays' codes in the coarser of their blocks' scales, as integers in the order of their
    values.
    """
    blocks = [x.astype(np.float32).reshape(len(x), -1, block) for x in (a, b)]
    scale = E8M0_VALUES[power_of_two_scale(np.maximum(*(np.abs(x).max(-1) for x in blocks)), fmt)][..., None]
    sign, magnitude = (0x80, 0x7F) if fmt == "e4m3" else (0x8, 0x7)
    ordered = [encode(x / scale, fmt).astype(int) for x in blocks]
    first, second = (np.where(c & sign, -(c & magnitude), c & magnitude) for c in ordered)
    return first, second


def checks(numerics: Numerics) -> list[Check]:
    """Every recorded call; native mode only, which is what was recorded."""
    if numerics != "native":
        return []
    found: list[Check] = []
    for model, layers in LAYERS.items():
        names = names_of(model)
        found += [
            OpTrace(model, t, i, what)
            for what in SINGLE
            for t in TIMES
            for i in layers
            if f"{t}.layer{i}.{what}" in names
        ]
        found += [
            PartTrace(model, p, i, what)
            for what in ("shared_expert", "moe", "attention", "block")
            for p in ("prefill", "decode")
            for i in layers
        ]
        for what in ("compressor", "indexer_compressor"):
            found += [RowsTrace(model, i, what) for i in layers if f"prefill.layer{i}.{what}" in names]
    return found


def names_of(model: golden.Model) -> frozenset[str]:
    """Recorded calls, ``TIME.layerN.OPERATION``, of a trace."""
    return frozenset(name.rpartition(".")[0] for name in golden.names(model, "trace"))
