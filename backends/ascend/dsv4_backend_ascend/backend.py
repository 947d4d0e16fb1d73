"""The ascend backend: PyTorch on an NPU, CANN's own ops where the capability table and the
documents allow them.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from dsv4_backend_torch.backend import TorchBackend
from dsv4_backend_torch.graphs import Recorded

from dsv4_backend_ascend import probe, proof, selftest, simulate, triton, trust, vendor
from dsv4_backend_ascend.cann import attention, matmul, moe, norm
from dsv4_backend_ascend.cann.call import RefusedError
from dsv4_backend_ascend.capability import GENERATIONS, Answer, table
from dsv4_backend_ascend.capability import cann_version as parse_cann
from dsv4_backend_ascend.composed import ComposedBackend
from dsv4_backend_ascend.kept import Kept
from dsv4_backend_ascend.plan import IMPLEMENTATIONS, gaps, plan
from dsv4_backend_ascend.selftest_cases import CASES
from dsv4_backend_ascend.weights import MxArray, MxExperts, TiledExperts
from dsv4_core.contract.backend import BackendError, DeviceCheck, Diagnosis, Option
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray, dtype_name
from dsv4_core.contract.ops import OPS
from dsv4_core.contract.spec import Operand, Support

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dsv4_core.contract.dtypes import RowLayout


GATES = ("gate", "gate_hash")
UNQUANTISED = "activations of linear layers with FP8 or FP4 weights are not quantised"
BELOW_ONE = "the gate's scores are sqrt(ln(1 + e^x)) as it stands there: nothing is left of logits below -17"


def _tiered(op: str) -> Callable[..., Any]:
    """One contract: the tier or the kernel that the plan says, else what PyTorch composes."""
    composed = getattr(ComposedBackend, op)

    @functools.wraps(composed)
    def run(self: AscendBackend, *arrays: Any, **scalars: Any) -> Any:
        answer = self.planned(op, arrays, scalars)
        if answer.tier != "composed" and self.fits_bf16(op, arrays):
            self.note(answer, op)
            return IMPLEMENTATIONS[answer.tier][op](self, *arrays, **scalars)
        return composed(self, *arrays, **scalars)

    return run


class AscendBackend(ComposedBackend):
    """Ascend NPUs.

    ``tier``: ``vendor`` (the operators' own extension where it is installed and serves, then CANN's
    ops), ``cann`` (CANN's ops where they serve) or ``composed`` (plain PyTorch, the yardstick).
    ``prefer``: ``triton`` puts vector kernels of our own before CANN's ops, where Triton-Ascend is
    installed. ``composed``: contracts that are composed whatever the tier. ``trust``: a report of
    `dsv4 ascend selftest`; what failed there is composed. ``simulate``: a generation; compute on
    the CPU with simulated CANN. ``soc``: a generation; plan for it without computing, or name the
    chip that is there. ``cann``: plan for this version. ``expand_bytes``: BF16 weights of experts
    that exist at a time on chips without FP8. ``activations``: ``bf16`` leaves out that linear
    layers quantise and dequantise what they multiply, on chips without FP8; not the published
    arithmetic, and nothing is claimed of it. ``gating``: ``fused`` takes an operator that loses
    scores of very low logits, for fewer launches: torch-npu's on 950, vLLM's on 910B and 910C in
    the vendor tier; nothing is claimed of it either.
    """

    name = "ascend"
    options: ClassVar[tuple[Option, ...]] = (
        *(o for o in TorchBackend.options if o.name not in {"device", "few_tokens_by", "weight_cache"}),
        Option("weight_cache", "bytes of FP8 weights kept expanded to BF16 on 910B and 910C", 16 << 30),
        Option("device", "torch device of the NPU", "npu"),
        Option("tier", "vendor, cann, or composed: plain PyTorch ops only; vendor on an NPU, else cann"),
        Option("prefer", "triton: vector kernels of our own by Triton-Ascend, for fewer launches", ""),
        Option("composed", "contracts that are composed whatever the tier, with commas: index_topk,sparse_attn"),
        Option("trust", "report of `dsv4 ascend selftest` on this chip: what failed there is composed"),
        Option("simulate", "run on simulated CANN, on the CPU: 910B, 910C or 950"),
        Option("soc", "plan for this generation without an NPU, or name the one that is there: 910B, 910C or 950"),
        Option("cann", "plan for this CANN version"),
        Option("activations", "fp8: quantised as published; bf16: left out, on 910B and 910C", "fp8"),
        Option(
            "gating", "exact, or fused: CANN's operator, or vLLM's where it is installed; loses low scores", "exact"
        ),
        Option(
            "rows",
            "cache rows: bf16, or packed in FP8 and FP4: the same values in half the memory, more launches",
            "bf16",
        ),
        Option("expand_bytes", "bytes of expert weights expanded to BF16 at a time on 910B and 910C", 1 << 30),
    )
    weight_formats = ("e4m3", "e2m1", "int8")
    packs_rows = False  # what plans are made for: they ask the class
    on_cpu = False  # on simulated CANN too: the paths are those of a device

    def __init__(self, **options: Any) -> None:
        """Raise ``BackendError`` where torch-npu or CANN is missing, or the SoC is unknown; each
        says what to do.
        """
        chosen = {o.name: o.default for o in self.options} | options
        if chosen["tier"] not in {None, "vendor", "cann", "composed"}:
            raise BackendError(f"backend 'ascend': tier {chosen['tier']!r} is not one of vendor, cann, composed")
        if chosen["activations"] not in {"fp8", "bf16"}:
            raise BackendError(f"backend 'ascend': activations {chosen['activations']!r} is not one of fp8, bf16")
        if chosen["gating"] not in {"exact", "fused"}:
            raise BackendError(f"backend 'ascend': gating {chosen['gating']!r} is not one of exact, fused")
        if chosen["prefer"] not in {"", "triton"}:
            raise BackendError(
                f"backend 'ascend': prefer {chosen['prefer']!r} is not triton; leave it out for CANN's ops alone"
            )
        for name in ("simulate", "soc"):
            if chosen[name] is not None and str(chosen[name]) not in GENERATIONS:
                raise BackendError(f"backend 'ascend': {name} {chosen[name]!r} is not one of {', '.join(GENERATIONS)}")
        self.standing = self._find_chip(chosen)
        if self.standing == "found" and chosen.get("numerics") == "float64":
            raise BackendError(
                "backend 'ascend': numerics 'float64' has no kernels on an NPU; 'float32' runs there, and float64 on a CPU: "
                "--simulate CHIP, or the torch backend"
            )
        device = {"simulated": "cpu", "planned": "meta"}.get(self.standing, chosen["device"])
        super().__init__(**{**options, "device": device})
        self.tier = chosen["tier"] or ("vendor" if self.standing == "found" else "cann")
        self.kept_composed = trust.named(chosen["composed"]) | trust.failed(chosen["trust"], self.generation)
        if "index_topk" in self.kept_composed:  # one operator reads keys that are given and keys of a cache
            self.kept_composed.setdefault("cached_index_topk", self.kept_composed["index_topk"])
        if self.activations == "bf16":
            if self.generation == "950":
                raise BackendError(
                    "backend 'ascend': activations 'bf16' is for 910B and 910C; 950 multiplies FP8 activations as published"
                )
            self.departures = dict.fromkeys(("linear", "expert_linear", "ffn", "moe"), UNQUANTISED)
        if self.gating == "fused":
            self.departures = {**self.departures, **dict.fromkeys(GATES, BELOW_ONE)}
            if self.standing == "found" and self.generation != "950":
                probe.extension(probe.VLLM)
        if self.departures:
            self.claims_level = None  # type: ignore[misc]  # of this instance
        self.cann_version = chosen["cann"] or (probe.cann_version() if self.standing == "found" else None)
        if self.cann_version is not None:
            try:
                parse_cann(self.cann_version)
            except ValueError as error:
                if chosen["cann"]:
                    raise BackendError(f"backend 'ascend': {error}") from None
                warnings.warn(
                    f"backend 'ascend': {error}; ops are used as if it were new enough (--cann VERSION says otherwise)",
                    stacklevel=2,
                )
                self.cann_version = None
        self.drift = {} if self.standing == "planned" else probe.drift()
        made = [c for c in table().claimed(self.generation) if not c.departs or self.gating == "fused"]
        claimed = {c.name for c in made if c.tier == "cann"}
        for problem in dict.fromkeys(said for name, said in self.drift.items() if name in claimed):
            warnings.warn(f"backend 'ascend': {problem}; what it serves is composed", stacklevel=2)
        if chosen["rows"] not in {"bf16", "packed"}:
            raise BackendError(f"backend 'ascend': rows {chosen['rows']!r} is not one of bf16, packed")
        if self.prefer:
            triton.ready(self.standing)
            self.vector_cores = triton.vector_cores(self.standing, self.generation)
        self.packs_rows = chosen["rows"] == "packed"
        self.kept = Kept()
        self.plans = {}
        self.ran: dict[str, None] = {}

    def _find_chip(self, chosen: dict[str, Any]) -> str:
        """Set the generation; say whether the chip is simulated, planned for, or found."""
        if chosen["simulate"] is not None:
            try:
                self.chip = simulate.install(str(chosen["simulate"]))  # type: ignore[arg-type]
            except RuntimeError as error:
                raise BackendError(f"backend 'ascend': {error}") from error
            self.generation = self.chip.generation
            return "simulated"
        if chosen["soc"] is not None and not _npu_present():
            self.generation = str(chosen["soc"])  # type: ignore[assignment]
            return "planned"
        probe.import_torch_npu()
        rank = os.environ.get("LOCAL_RANK", "")
        if chosen["device"] == "npu" and rank.isdecimal():  # of torchrun: a device for each rank of a machine
            chosen["device"] = f"npu:{rank}"
        probe.prepare(str(chosen["device"]))
        found = probe.npus()
        if not found:
            raise BackendError(f"backend 'ascend': torch-npu finds no NPU (npu-smi info lists them); {probe.PLAN}")
        soc = str(chosen["soc"]) if chosen["soc"] is not None else None
        self.generation = soc or probe.generation_of(found[0])  # type: ignore[assignment]
        return "found"

    def departing(self, op: str) -> bool:
        """Whether an op that departs from this contract was asked for."""
        return self.gating == "fused" and op in GATES

    def note(self, answer: Answer, op: str = "") -> None:
        """Remember what ran."""
        self.ran.update(
            dict.fromkeys([f"triton:{op}"] if answer.tier == "triton" else [call.name for call in answer.calls])
        )

    def planned(self, op: str, arrays: tuple[Any, ...], scalars: dict[str, Any]) -> Answer:
        """The plan for a call, made once for each set of dtypes, shapes, gaps and scalars."""
        forms = (None if a is None else (dtype_name(a), tuple(a.shape), gaps(a)) for a in arrays)
        key = (op, *forms, *scalars.items())
        if key not in self.plans:
            self.plans[key] = plan(self, op, dict(zip(OPS[op].arrays, arrays, strict=True)) | scalars)
        return self.plans[key]

    def supports(self, op: str, **operands: Any) -> Support:
        """Name the tier: the npu ops with their standing, or that it is composed and why."""
        base = super().supports(op, **operands)
        if not base:
            return base
        answer = plan(self, op, operands) if operands else Answer("composed", reason="no operands were named")
        reached = " ".join(proof.rungs(self.generation, answer.calls)) or "none"
        if answer.tier == "composed":
            parts = "; its parts are planned by themselves" if OPS[op].fused else ""
            return Support(by=f"composed: {answer.reason}{parts}", proof=reached)
        if answer.tier == "triton":
            return Support(by=f"triton: {op}", proof=proof.KERNELS)
        sources = "; ".join(f"{cell.standing}: {cell.source}" for cell in answer.cells)
        named = ", ".join(dict.fromkeys(call.op for call in answer.calls))
        return Support(by=f"{answer.tier}: {named}", proof=f"{reached} ({sources})")

    def describe(self) -> str:
        """Chip and standing: planned for, simulated, or found."""
        standing = {"planned": "planned for", "simulated": "simulated", "found": "found"}[self.standing]
        cann = (
            f"CANN {self.cann_version}"
            if self.cann_version
            else "any CANN"
            if self.standing != "found"
            else "CANN of unknown version"
        )
        departs = "".join(f"\n{said}; not the published arithmetic" for said in dict.fromkeys(self.departures.values()))
        kept = "".join(f"\ncomposed: {op}: {reason}" for op, reason in self.kept_composed.items())
        return f"backend {self.name}, {standing} {self.generation}, {cann}, tier {self.tier}\n{proof.LEGEND}{departs}{kept}"

    def device_checks(self) -> Sequence[DeviceCheck]:
        """The self-test: on a chip all of it; on simulated CANN what needs gigabytes at tier
        full.
        """
        if self.standing == "planned" or self.numerics != "native":
            return ()
        simulated = self.standing == "simulated"
        return [
            DeviceCheck(
                case.contract,
                case.name,
                "full" if simulated and case.gigabytes else "standard",
                functools.partial(selftest.problem, self, case),
            )
            for case in CASES
        ]

    def record(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """On an NPU as a graph of its own (``torch.npu.NPUGraph``); simulated, each time anew.

        Nothing that was kept of an earlier run may be read by a captured one, and nothing that a
        captured one made may be kept.
        """
        if self.standing != "found":
            return super().record(function)
        return Recorded(self.alone(function), self.device, torch.npu, "NPUGraph")

    def alone(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with nothing kept before it or after it."""

        def run(*arrays: Any) -> Any:
            self.forget()
            try:
                with self.computing():
                    return function(*arrays)
            finally:
                self.forget()

        return run

    def kernels_ran(self) -> Sequence[str]:
        """Calls of the capability table, in the order in which they first ran."""
        ran, self.ran = self.ran, {}
        return tuple(ran)

    def proof(self, ran: Mapping[str, bool]) -> Mapping[str, str]:
        """Rungs of every op on this chip: those recorded, and L3 or L6 where this run is its
        proof.
        """
        return proof.of_run(self.generation, self.standing, ran)

    @classmethod
    def diagnose(cls) -> tuple[Diagnosis, ...]:
        """Look at torch-npu, CANN, the chip, and the schemas of the ops that are called."""
        return tuple(probe.diagnose())

    def fits_bf16(self, op: str, arrays: tuple[Any, ...]) -> bool:
        """Say whether weights that a call expands to BF16 keep their values there: scales near
        2^-127 do not.
        """
        if op not in {"grouped_linear", "expert_linear"}:
            return True
        weight = getattr(arrays[1], "stack", arrays[1])
        expanded = (
            isinstance(weight, ScaledArray)
            and weight.format != "int8"
            and (op == "grouped_linear" or not isinstance(weight, MxArray))
        )
        return not expanded or self.well_scaled(weight)

    def load(self, weight: Host | ScaledArray) -> Any:
        """On 950 a quantised weight gets its scales in MX layout too. Raises ``BackendError`` for a
        chip that is planned for alone.
        """
        if self.standing == "planned":
            raise BackendError(
                f"backend 'ascend': soc={self.generation} plans for a chip that is not here, and computes nothing; "
                f"simulate={self.generation} computes on this CPU, `dsv4 explain` and `dsv4 plan` take soc"
            )
        loaded = super().load(weight)
        published = isinstance(loaded, ScaledArray) and loaded.format != "int8"
        return self._as_mx(loaded) if published and self.generation == "950" else loaded

    def load_experts(self, experts: Experts) -> Experts:
        """One stack; on 950 with MX scales, FP4 codes in tiles where the grouped product will read
        them.
        """
        loaded = self.stacked_experts(experts)
        if not (isinstance(loaded.stack, ScaledArray) and loaded.stack.format != "int8" and self.generation == "950"):
            return loaded
        mx = self._as_mx(loaded.stack)
        if mx.format == "e2m1" and self._multiplies(loaded):
            return TiledExperts(matmul.tiled(mx.mx))
        return MxExperts(mx)

    def _multiplies(self, experts: Experts) -> bool:
        """Whether the cann tier will multiply by these experts, whatever the number of rows."""
        rows = Operand("bfloat16", (1, experts.shape[2]))
        ends = Operand("int32", (experts.shape[0] + 1,))
        return plan(self, "expert_linear", {"x": rows, "weight": experts, "offsets": ends}).tier == "cann"

    def _as_mx(self, weight: ScaledArray) -> MxArray:
        repacked = MxArray.of(weight)
        self._well_scaled[id(repacked)] = (repacked, self.well_scaled(weight))
        del self._well_scaled[id(weight)]
        return repacked

    def gated(self, pairs: torch.Tensor, weights: torch.Tensor | None, limit: float) -> torch.Tensor:
        """``swiglu`` of gate and up side by side, in the tier that the plan says."""
        answer = self.planned("swiglu", (*pairs.unbind(1), weights), {"limit": limit})
        if answer.tier == "composed":
            return super().gated(pairs, weights, limit)
        self.note(answer, "swiglu")
        if answer.tier == "triton":
            return triton.swiglu(self, *pairs.unbind(1), weights, limit=limit)
        return moe.gated(pairs, weights, limit=limit)

    def rms_norm_rope(
        self, x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, freqs: torch.Tensor, *, eps: float
    ) -> torch.Tensor:
        """The default, turning the norm's result in place: so not by ``self.rms_norm``, whose
        result is its caller's for whoever watches the op.
        """
        answer = self.planned("rms_norm_rope", (x, weight, positions, freqs), {"eps": eps})
        if answer.tier == "triton":
            self.note(answer, "rms_norm_rope")
            return triton.rms_norm_rope(self, x, weight, positions, freqs, eps=eps)
        normed = type(self).rms_norm(self, x.flatten(0, 1), weight, eps=eps).reshape(x.shape)
        answer = self.planned("apply_rope", (normed, positions, freqs), {"inverse": False})
        if answer.tier == "composed":
            return self.apply_rope(normed, positions, freqs, inverse=False)  # type: ignore[no-any-return]
        self.note(answer)
        return (vendor if answer.tier == "vendor" else norm).turn_own(self, normed, positions, freqs, inverse=False)

    def cached_sparse_attn(
        self, q: torch.Tensor, kv: torch.Tensor, ring: torch.Tensor, ring_index: torch.Tensor, rows: torch.Tensor | None,
        row_index: torch.Tensor | None, attn_sink: torch.Tensor, topk_idxs: torch.Tensor, *, layout: RowLayout, softmax_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """The default, with the row that carries the sink joined to the others at once."""
        indices = [ring_index, *([row_index] if rows is not None and row_index is not None else [])]
        scale = {"softmax_scale": softmax_scale}
        every = Operand(dtype_name(kv), (kv.shape[0] + sum(index.shape[0] for index in indices), kv.shape[1]))
        joins = self.planned("cache_read", (ring, ring_index), {"layout": layout}).tier == "triton"

        def joined(*last: torch.Tensor) -> torch.Tensor:
            if joins:
                return triton.joined(self, ring, ring_index, kv, rows, row_index, zeros=len(last))
            parts = [self.cache_read(ring, ring_index, layout=layout), kv]
            if rows is not None and row_index is not None:
                parts.append(self.cache_read(rows, row_index, layout=layout))
            return torch.cat([*parts, *last])

        answer = self.planned("sparse_attn", (q, every, attn_sink, topk_idxs), scale)
        if answer.tier == "composed":
            return self.sparse_attn(q, joined(), attn_sink, topk_idxs, **scale)  # type: ignore[no-any-return]
        self.note(answer)
        return attention.attend(self, q, joined(attention.no_row(self, kv)), attn_sink, topk_idxs, **scale)

    def expanded(self, stacks: Sequence[ScaledArray], own: torch.Tensor) -> torch.Tensor:
        """Packed experts in BF16, by a kernel where one is preferred and takes them."""
        if self.by_kernels("moe"):
            try:
                made = triton.expanded(self, stacks, own)
            except RefusedError:
                return super().expanded(stacks, own)
            self.ran["triton:expand"] = None
            return made
        return super().expanded(stacks, own)

    def summed(
        self, rows: torch.Tensor, shared: torch.Tensor | None, topk: int, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """What a token's experts give, added by a kernel where one is preferred."""
        if self.by_kernels("moe"):
            return triton.combined(self, rows, shared, topk, out_dtype)
        return super().summed(rows, shared, topk, out_dtype)

    def by_kernels(self, op: str) -> bool:
        """Whether kernels of our own may be part of a contract."""
        return bool(self.prefer) and op not in self.kept_composed and self.tier != "composed"

    act_qdq = _tiered("act_qdq")
    hadamard = _tiered("hadamard")
    cache_write = _tiered("cache_write")
    cache_read = _tiered("cache_read")
    compress = _tiered("compress")
    cached_compress = _tiered("cached_compress")
    hc_pre_norm = _tiered("hc_pre_norm")
    rms_norm = _tiered("rms_norm")
    apply_rope = _tiered("apply_rope")
    linear = _tiered("linear")
    grouped_linear = _tiered("grouped_linear")
    expert_linear = _tiered("expert_linear")
    gate = _tiered("gate")
    gate_hash = _tiered("gate_hash")
    swiglu = _tiered("swiglu")
    dispatch = _tiered("dispatch")
    combine = _tiered("combine")
    index_topk = _tiered("index_topk")
    cached_index_topk = _tiered("cached_index_topk")
    sparse_attn = _tiered("sparse_attn")
    hc_pre = _tiered("hc_pre")
    hc_post = _tiered("hc_post")


def _npu_present() -> bool:
    """Whether an NPU answers, without failing where torch-npu or CANN is missing."""
    try:
        probe.import_torch_npu()
        return bool(probe.npus())
    except BackendError:
        return False
