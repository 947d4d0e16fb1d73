"""The declarations hold together, and a backend that departs from one is told so when its class is
made.
"""

import numpy as np
import pytest

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.backend import Backend, BackendError, Option, missing_ops
from dsv4_core.contract.ops import OPS, EveryOp
from dsv4_core.contract.registry import create
from dsv4_core.contract.spec import Operand, UnsupportedOpError
from dsv4_core.planning.shapes import trace_calls
from dsv4_core.planning.support import planned_calls, uncalled


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_a_contract_is_complete(spec):
    parameters = set(spec.arrays) | set(spec.scalars)
    assert set(spec.axes) <= set(spec.arrays)
    assert set(spec.arrays) <= set(spec.axes) | {"parts"}
    assert {name.partition(".")[0] for name in spec.dtypes} - {"return"} <= parameters
    assert len(spec.judged) == len(spec.returns)
    assert set(spec.mutates) <= set(spec.arrays)
    assert spec.doc, "axes are declared; the docstring says what is computed"
    for parameter in spec.signature.parameters.values():
        assert parameter.default is parameter.empty, "ops have no defaults"


def test_required_ops_are_few():
    required = [name for name, spec in OPS.items() if not spec.fused]
    assert len(required) <= 30
    assert not any(OPS[name].fused and Backend.__dict__.get(name) is not None for name in required)


def test_a_missing_op_is_named():
    class Empty(Backend):
        name = "empty"

    with pytest.raises(UnsupportedOpError, match=r"backend 'empty' does not implement the required op 'rms_norm'.*eps"):
        Empty().rms_norm(np.ones((1, 2)), None, eps=1e-6)


def test_a_wrong_signature_shows_both():
    with pytest.raises(
        TypeError,
        match=r"Wrong\.rms_norm\(self, x, weight, epsilon\) does not match the contract rms_norm\(self, x: .*eps: ",
    ):

        class Wrong(Backend):
            def rms_norm(self, x, weight, epsilon):
                return x


def test_a_signature_from_a_mixin_is_checked_too():
    class Mixin:
        def concat(self, parts):
            return parts[0]

    with pytest.raises(TypeError, match=r"concat\(self, parts\) does not match"):
        type("Mixed", (Mixin, Backend), {})


def test_narrower_intermediates_are_bounded():
    with pytest.raises(TypeError, match="declares 'probabilities in fp8'; the contract allows"):
        type("Narrow", (Backend,), {"narrower": {"sparse_attn": ("probabilities in fp8",)}})


def test_options_and_numerics_are_checked():
    with pytest.raises(BackendError, match="numerics 'fp16' is not one of native, float32, float64"):
        create("reference", numerics="fp16")
    for name in ("soc", "name", "self"):
        with pytest.raises(BackendError, match=rf"'reference' has no option '{name}'; its options: .*weight_cache"):
            create("reference", **{name: "950"})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x", int),
        ("-1", int),
        ("9" * 30, int),
        ("\u00b2", int),
        (True, int),
        (1.5, int),
        ("yes", bool),
        (1, bool),
        ("", str),
        ("\x1b", str),
    ],
)
def test_a_value_that_an_option_cannot_be_is_named(value, kind):
    backend = type("Some", (Backend,), {"name": "some", "options": (Option("few", "how many", kind=kind),)})
    with pytest.raises(BackendError, match=r"backend 'some': option few = .* must be .*\(how many\)"):
        backend(few=value)


def test_text_becomes_what_an_option_is():
    options = (Option("a", "", 2), Option("b", "", default=False), Option("c", ""), Option("d", "", kind=int))
    made = type("Some", (Backend,), {"name": "some", "options": options})(a="7", b="True", c=950, d=None)
    assert (made.a, made.b, made.c, made.d) == (7, True, "950", None)


def test_required_ops_that_no_call_reaches_are_looked_at():
    """A vendor who runs a fused op whole learns of the required op that it hides, and of the one
    that ranks alone call.
    """
    whole = type(create("reference"))
    hidden = ("hc_split_sinkhorn", "act_quant")
    some = type("Some", (whole,), {"name": "some"} | {op: getattr(EveryOp, op) for op in hidden})()
    calls = planned_calls(PRESETS["tiny"], some, "e2m1")
    assert not missing_ops(some, [(c.op, c.operands) for c in calls])
    answers = dict(uncalled(PRESETS["tiny"], some, "e2m1", calls))
    assert {op for op, answer in answers.items() if not answer} == set(hidden)
    assert {c.op for c in calls} | answers.keys() >= {op for op, spec in OPS.items() if not spec.fused}
    assert all(answer for _, answer in uncalled(PRESETS["tiny"], create("reference"), "e2m1", calls))


def test_supports_says_why_not_and_the_run_stops():
    class Picky(Backend):
        name = "picky"

        def supports(self, op, **operands):
            from dsv4_core.contract.spec import Support

            if op == "linear" and operands["x"].shape[1] % 512:
                return Support(reason=f"linear: in_features={operands['x'].shape[1]} is not a multiple of 512")
            return Support(by="picky")

    calls = [(c.op, c.operands) for c in trace_calls(PRESETS["tiny"], Picky)]
    assert ("linear", "linear: in_features=256 is not a multiple of 512") in missing_ops(Picky(), calls)
    reference = create("reference")
    assert missing_ops(reference, calls) == []
    assert reference.supports("linear", x=Operand("bfloat16", (1, 128))).by == "reference"
    nobody = type("Nobody", (Backend,), {"name": "nobody"})()
    assert "does not implement" in nobody.supports("linear").reason
    assert not nobody.supports("linear")
    assert nobody.supports("moe").by == "composed of required ops"


def test_no_output_shape_depends_on_values():
    """The whole graph runs on shapes alone, prefill and decode, MTP included: nothing is read on
    the host.
    """
    for seq, start in ((1, 0), (300, 0), (1, 511), (3, 600)):
        calls = trace_calls(PRESETS["tiny"], Backend, seq=seq, start=start, batch=2, mtp=True)
        assert calls[-1].op == "sample"
