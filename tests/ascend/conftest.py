"""These tests run on simulated CANN; where torch-npu is installed they would meet the real ops, and
are left out.
"""

import importlib.util

import pytest

pytest.importorskip("torch")
if importlib.util.find_spec("triton"):  # before anything imports it: kernels are interpreted here
    from dsv4_backend_torch import interpret

    interpret.activate()
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("torch_npu") else []
