"""One rank's graph on shapes: what its backend is asked before a weight loads, with the sizes that
the rank has.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dsv4_core.checkpoint.rank_part import ShardedSource
from dsv4_core.contract.dtypes import FP8_BLOCK, dtype_name
from dsv4_core.graph.model import Parallel
from dsv4_core.planning.shapes import LayeredModel, Recorder, ShapeSource, run_step

if TYPE_CHECKING:
    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.rank_part import Place
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Format
    from dsv4_core.contract.spec import Array
    from dsv4_core.planning.shapes import Call, ShapeBackend


def trace_rank(
    config: ModelConfig, backend: Backend, place: Place, *, seq: int, start: int, expert_format: Format
) -> list[Call]:
    """Record the calls that one rank's ``backend`` gets in a step of one sequence, the MTP block's
    among them.
    """
    recorder = Recorder(numerics=backend.numerics, like=backend)
    source = ShardedSource(ShapeSource(config, expert_format), place)
    model = LayeredModel(source, recorder, parallel=shape_parallel(recorder, place, config))
    run_step(model, batch=1, seq=seq, start=start, mtp=config.draft != "")
    return recorder.notes


def shape_parallel(be: ShapeBackend, place: Place, config: ModelConfig) -> Parallel:
    """Give the reduction points of ``exchange.Ranks``, which send nothing and give arrays of the
    right shapes.
    """
    several, cuts = place.tp > 1, place.cuts_output(config)

    def reduce(x: Array) -> Array:
        return be.array(x.shape, be.activation_dtype)

    def gather(x: Array, channels: int) -> Array:
        return be.array((x.shape[0], channels), dtype_name(x))

    def experts(
        count: int,
        x: Array,
        weights: Array,
        indices: Array,
        shared: Array | None,
        *held: Any,
        out_dtype: str,
        **scalars: Any,
    ) -> Array:
        """As many copies arrive as leave."""
        bounds = place.expert_bounds(count, place.t)
        rows, row_weights, order, offsets = be.dispatch(
            x, weights, indices, first_expert=bounds[0], n_experts=bounds[-1] - bounds[0]
        )
        if be.activation_dtype == "bfloat16":
            be.act_quant(rows, block=FP8_BLOCK)
        copies = rows.shape[0]
        ids, act = be.array((copies, 1), "int32"), be.activation_dtype
        y = be.moe(rows, row_weights.reshape((copies, 1)), ids, None, *held, out_dtype=act, **scalars)
        return be.combine(y, order, offsets, shared, topk=indices.shape[1], out_dtype=out_dtype)

    return Parallel(
        first_expert=lambda count: place.experts(count).start,
        holds_shared=place.holds_shared(config),
        reduce_embedding=reduce if several else None,
        gather_low_rank=(lambda x: gather(x, config.o_groups * config.o_lora_rank)) if several and not cuts else None,
        reduce_attention=reduce if several and cuts else None,
        experts=(lambda count, _padded: partial(experts, count)) if place.ep > 1 else None,
        reduce_moe=reduce if several else None,
        gather_logits=(lambda x: gather(x, config.vocab_size)) if several else None,
    )
