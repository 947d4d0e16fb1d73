"""The example on JAX, where JAX is installed: its ops, and tokens of a whole model. `make jax` runs
the standard tier.
"""

import importlib.util
from pathlib import Path

import pytest
from dsv4_conformance.check import Session
from dsv4_conformance.laws.small_model import weights
from dsv4_conformance.run import catalogue, runner

from dsv4_core.contract import registry
from dsv4_core.contract.spec import OPS
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model

jax = pytest.importorskip("jax")
FILE = Path(__file__).parents[2] / "examples" / "jax_backend" / "dsv4_backend_jax.py"


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("dsv4_backend_jax", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.JaxBackend


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) <= 500


@pytest.mark.parametrize("numerics", ["native", "float32"])
def test_a_small_case_of_every_op(backend, numerics):
    first = {c.op: c.id for c in reversed(catalogue.collect("smoke", numerics)) if c.group == "op"}
    result = runner.run(Session(backend(numerics=numerics), "smoke"), cases=list(first.values()))
    assert [f"{f.id}: {f.message}" for f in result.findings if f.status != "passed"] == []
    assert len(result.findings) == len(OPS)


def test_tokens_are_the_references(backend):
    source, prompts = weights((0, 4, 128)), [[1, 2, 3, 4, 5], [7] * 40]
    texts = [
        list(generate(Model(source, cls(numerics="float32")), prompts, max_tokens=12))
        for cls in (backend, registry.reference())
    ]
    assert texts[0] == texts[1]
