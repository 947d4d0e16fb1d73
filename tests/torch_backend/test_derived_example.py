"""A vendor's first backend: the torch backend with two ops of its own, which a whole model uses."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from dsv4_backend_torch import TorchBackend
from dsv4_conformance.check import Session
from dsv4_conformance.run import catalogue, runner

import dsv4_core as dsv4

FILE = Path(__file__).parents[2] / "examples" / "derived_backend" / "dsv4_backend_derived.py"
OWN = ("rms_norm", "embedding")


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("dsv4_backend_derived", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DerivedBackend


@pytest.mark.parametrize("numerics", ["native", "float32", "float64"])
def test_its_own_ops_pass_their_cases(backend, numerics):
    cases = [c.id for c in catalogue.collect("smoke", numerics) if c.group == "op" and c.op in OWN]
    result = runner.run(Session(backend(numerics=numerics), "smoke"), cases=cases)
    assert [f"{f.id}: {f.message}" for f in result.findings if f.status == "failed"] == []
    assert sum(f.status == "passed" for f in result.findings) >= len(OWN)


def test_a_whole_model_uses_them_and_says_what_torch_says(backend, monkeypatch):
    """Recorded steps too: nothing of torch's stands in for an op that was replaced."""
    called = Counter()
    for op in OWN:
        own = getattr(backend, op)

        def counted(self, *operands, own=own, op=op, **scalars):
            called[op] += 1
            return own(self, *operands, **scalars)

        monkeypatch.setattr(backend, op, counted)
    texts = []
    for made in (backend(numerics="float32"), TorchBackend(numerics="float32")):
        with dsv4.load(backend=made) as session:
            texts.append(list(session.generate("A kludge is", max_tokens=40, ignore_eos=True).run().tokens[0]))
    assert texts[0] == texts[1]
    assert called["embedding"] >= 40
    assert called["rms_norm"] >= 40 * 13, "at least two a layer, and one at the end, each step"
