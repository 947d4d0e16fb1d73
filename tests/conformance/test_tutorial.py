"""The tutorial of five faults: each is found at smoke, in the words that its page quotes."""

import importlib.util
import re
from pathlib import Path

import pytest
from dsv4_conformance.check import Session
from dsv4_conformance.run import runner

HOME = Path(__file__).parents[2] / "examples" / "broken_backend"


@pytest.fixture(scope="module")
def broken():
    spec = importlib.util.spec_from_file_location("dsv4_backend_broken", HOME / "dsv4_backend_broken.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dsv4_backend()


@pytest.mark.parametrize("op", ["rms_norm", "index_scores", "cache_read", "index_select", "hadamard"])
def test_the_page_quotes_what_the_suite_says(broken, op):
    page = (HOME / "README.md").read_text()
    section = re.search(rf"## \d\. `{op}`\n(.*?)(?=\n## |\Z)", page, re.DOTALL)[1]
    quoted = " ".join(line.strip() for line in section.splitlines() if line.startswith("    "))
    failing = [f for f in runner.run(Session(broken(), "smoke"), ops=[op]).findings if f.status == "failed"]
    assert failing
    named = re.match(r"FAILED (\S+) (.*)", quoted)
    if named:
        failing = [f for f in failing if f.id == named[1]]
        quoted = named[2]
    assert any(quoted in f.message for f in failing), [f.message for f in failing]
