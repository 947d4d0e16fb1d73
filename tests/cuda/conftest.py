"""Kernel tests run in the repaired interpreter, and only after every proof of the repair has passed
in this very run.
"""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_[!b]*.py", "test_build.py", "test_build_cli.py"]  # the rest judges what is committed
else:
    from dsv4_backend_torch import interpret

    interpret.activate()


@pytest.fixture(scope="session")
def proven_interpreter():
    import interpreter_proofs

    for proof in interpreter_proofs.PROOFS:
        proof()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "cuda" and item.path.name.startswith("test_kernel"):
            item.fixturenames.insert(0, "proven_interpreter")
