import inspect

import numpy as np
import pytest

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.dtypes import ScaledArray, dtype_name, numpy_dtype
from dsv4_core.contract.ops import OPS
from dsv4_core.contract.registry import backend_class
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step
from dsv4_core.planning.shapes import STORED, Recorder, ShapeArray, ShapeBackend, ShapeError, ShapeSource, trace_calls

Reference = backend_class("reference")


class RandomSource(ShapeSource):
    def array(self, name):
        spec, rng = self.specs[name], np.random.default_rng(len(name))
        if spec.dtype == "I64":
            return rng.integers(0, self.config.n_routed_experts, spec.shape)
        if STORED[spec.dtype] == "uint8":
            low, high = (118, 122) if spec.dtype == "F8_E8M0" else (0, 0x7F)
            return rng.integers(low, high, spec.shape, dtype=np.uint8)
        return (rng.standard_normal(spec.shape) * 0.05).astype(numpy_dtype(STORED[spec.dtype]))


def shaped(value):
    """The same operand without its data."""
    if isinstance(value, ScaledArray):
        return ScaledArray(shaped(value.data), shaped(value.scale), value.format)
    if isinstance(value, list | tuple):
        return [shaped(v) for v in value]
    return ShapeArray(value.shape, dtype_name(value)) if isinstance(value, np.ndarray) else value


def checked(numerics):
    """A reference backend whose every result is held to the shape and dtype that the declaration
    gives.
    """
    shapes, seen = ShapeBackend(numerics=numerics, like=Reference), set()

    def wrap(name):
        method = getattr(Reference, name)

        def run(self, *args, **scalars):
            result = method(self, *args, **scalars)
            expected = getattr(shapes, name)(*map(shaped, args), **scalars)
            for got, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
                if want is not None or got is not None:
                    assert (tuple(got.shape), dtype_name(got)) == (want.shape, want.dtype), name
            seen.add(name)
            return result

        run.__signature__ = inspect.signature(method)
        return run

    return type("Checked", (Reference,), {n: wrap(n) for n in OPS})(numerics=numerics), seen


@pytest.mark.parametrize("numerics", ["native", "float32", "float64"])
def test_every_declared_result_is_what_the_reference_returns(numerics):
    backend, seen = checked(numerics)
    config = PRESETS["tiny"]
    model = Model(RandomSource(config), backend)
    cache = Cache(backend, config, 2, 300)
    for counts in ([130, 97], [1, 1], [3, 2]):
        step = Step(cache, np.ones((2, max(counts)), np.int64), counts=counts)
        h = model.forward(step)
        model.logits(model.mtp(h, step.ids, step), mtp=True)
        logits = model.logits(h)
        backend.sample(logits, np.zeros(len(logits), np.float32), temperature=0.0, top_p=1.0)
        cache.advance(step.sequences, step.ends)
    inside = {"act_quant", "hc_split_sinkhorn"}  # a backend may quantise and split inside other ops
    assert set(OPS) - seen <= {*inside, "sample_each"}, "all but what is chosen on the host is run on shapes"


def test_required_ops_are_recorded_where_a_backend_leaves_a_fused_op_out():
    whole = {c.op for c in trace_calls(PRESETS["tiny"], ShapeBackend, seq=4)}
    composed = {c.op for c in trace_calls(PRESETS["tiny"], Reference, seq=4)}
    assert {"moe", "ffn", "cached_sparse_attn", "hc_pre_norm", "logits"} <= whole
    assert not {n for n in composed if OPS[n].fused and not Reference.implements(n)}
    assert {"expert_linear", "dispatch", "sparse_attn", "cache_read", "hc_pre"} <= composed


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_the_last_token_of_a_million_is_traced_in_every_layer(preset):
    config = PRESETS[preset]
    calls = trace_calls(config, ShapeBackend, start=config.max_position_embeddings - 1)
    assert {c.layer for c in calls} == {None, *range(config.num_hidden_layers)}
    rows = {c.operands["index"].shape[0] for c in calls if c.op == "cached_index_topk"}
    assert rows == {config.max_position_embeddings // 4}


@pytest.mark.parametrize(
    ("op", "args", "scalars", "message"),
    [
        ("rms_norm", ([3, 8], [4]), {"eps": 1e-6}, "operand weight, axis 0 (dim) is 4 and must be 8 (dim = 8 by x)"),
        ("rms_norm", ([3, 2, 8], [8]), {"eps": 1e-6}, "operand x has shape [3, 2, 8]; its axes are [tokens dim]"),
        ("hc_expand", (None,), {"hc": 4}, "operand x is None; its axes are [tokens dim]"),
        ("grouped_linear", ([3, 2, 8], [6, 9]), {}, "operand weight, axis 1 (in) is 9 and must be 8 (in = 8 by x)"),
    ],
)
def test_a_contradiction_names_op_operand_and_axis(op, args, scalars, message):
    with pytest.raises(ShapeError) as error:
        getattr(ShapeBackend(), op)(*(None if a is None else ShapeArray(a, "bfloat16") for a in args), **scalars)
    assert str(error.value) == f"{op}: {message}"


def test_a_wrong_dtype_names_the_contract_s_word():
    with pytest.raises(ShapeError, match="operand x has dtype float32; the contract says act, here bfloat16"):
        ShapeBackend().rms_norm(ShapeArray([3, 8], "float32"), None, eps=1e-6)


def test_products_and_sums_with_one_unknown_are_solved_or_refused():
    be, q = ShapeBackend(), ShapeArray([2, 1, 4, 64], "bfloat16")
    small = {n: ShapeArray([2, 1], "int32") for n in ("visible", "offset")}
    from dsv4_core.contract.dtypes import RowLayout

    def pick(rows):
        return be.cached_index_topk(
            q, ShapeArray([2, 1, 4], "float32"), ShapeArray([99, 34], "uint8"), ShapeArray([rows], "int32"),
            small["visible"], small["offset"], layout=RowLayout("key", 64), scale=1.0, topk=3,
        )  # fmt: skip

    assert pick(20).shape == (2, 1, 3)
    with pytest.raises(ShapeError, match=r"operand index, axis 0 \(batch\*rows\) is 21, which no rows makes"):
        pick(21)


def test_shape_arrays_refuse_what_has_no_meaning():
    array = ShapeArray([4, 6], "float32")
    assert (array[1:3, 0].shape, array.reshape((3, 8)).shape, array[-1:].nbytes) == ((2,), (3, 8), 24)
    for wrong in (lambda: array[4], lambda: array.reshape((5, 5)), lambda: Recorder().to_numpy(array)):
        with pytest.raises(ShapeError):
            wrong()
