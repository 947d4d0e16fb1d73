"""Whether a backend can run a model: asked of the graph on shapes, before a weight loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.checkpoint.layout import QUANTISED
from dsv4_core.contract.backend import Backend, BackendError, missing_ops
from dsv4_core.contract.ops import OPS
from dsv4_core.contract.spec import Support
from dsv4_core.planning.rank_trace import trace_rank
from dsv4_core.planning.shapes import trace_calls

if TYPE_CHECKING:
    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.rank_part import Place
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.contract.dtypes import Format
    from dsv4_core.planning.shapes import Call


def check_support(config: ModelConfig, backend: Backend, expert_format: Format, place: Place | None = None) -> None:
    """Raise ``BackendError`` with a table of what is missing and why; no weight has been read
    yet.
    """
    calls = [(call.op, call.operands) for call in planned_calls(config, backend, expert_format, place)]
    if missing := missing_ops(backend, calls):
        rows = "\n".join(f"  {op}: {reason}" for op, reason in missing)
        raise BackendError(
            f"backend {backend.name!r} cannot run this model:\n{rows}\n`dsv4 explain` shows every op; no other backend is used in its place"
        )


def planned_calls(
    config: ModelConfig,
    backend: Backend,
    expert_format: Format,
    place: Place | None = None,
    like: type[Backend] | None = None,
) -> list[Call]:
    """Every op that a prefill and a later decode step would call, with dtypes and shapes: at a
    ``place`` of several, its own.

    ``like``: as that backend would be called, instead of ``backend``.
    """
    prompt = min(
        512, config.max_position_embeddings
    )  # closes windows of 4 and 128 and leaves the indexer something to choose
    later = min(4096, config.max_position_embeddings - 1)
    calls: list[Call] = []
    for seq, start in ((prompt, 0), (1, later)):
        if place and place.ranks > 1:
            calls += trace_rank(config, backend, place, seq=seq, start=start, expert_format=expert_format)
            continue
        calls += trace_calls(
            config,
            like or type(backend),
            numerics=backend.numerics,
            seq=seq,
            start=start,
            mtp=config.draft != "",
            expert_format=expert_format,
        )
    return calls


def uncalled(
    config: ModelConfig, backend: Backend, expert_format: Format, calls: list[Call]
) -> list[tuple[str, Support]]:
    """Required ops that are not among ``calls``, because the backend runs fused ops whole or is
    alone, and who would run each.

    Of those that the contracts' own defaults reach, every call is asked about, and the first
    refusal is the answer.
    """
    answers: dict[str, Support] = {}
    called = {call.op for call in calls}
    for call in planned_calls(config, backend, expert_format, like=Backend):
        if call.op not in called and not OPS[call.op].fused and answers.get(call.op, True):
            answers[call.op] = backend.supports(call.op, **call.operands)
    for name, spec in OPS.items():  # what several ranks alone call
        if not spec.fused and name not in called | answers.keys():
            reason = "" if backend.implements(name) else f"backend {backend.name!r} does not implement it"
            answers[name] = Support(by="" if reason else backend.name, reason=reason)
    return list(answers.items())


def expert_format(checkpoint: Checkpoint) -> Format:
    """FP4, FP8 or int8, as the experts' tensors are stored (not as config.json says)."""
    return "int8" if checkpoint.is_int8 else QUANTISED.get(checkpoint.expert_dtype, "e4m3")
