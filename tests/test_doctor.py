"""What `dsv4 doctor` says, and its exit status."""

import subprocess
import sys

import pytest


def doctor(*args):
    return subprocess.run(
        [sys.executable, "-m", "dsv4_core", "doctor", *args], capture_output=True, text=True, check=False
    )


def test_a_healthy_backend():
    done = doctor("-b", "reference")
    assert done.returncode == 0, done.stderr
    assert "reference (configured: chosen by --backend): can run" in done.stdout
    assert "BLAS:" in done.stdout


def test_a_backend_that_is_not_there():
    done = doctor("-b", "nope")
    assert done.returncode == 1
    assert "nope (chosen by --backend): no such backend is installed" in done.stderr


def test_a_backend_whose_process_dies(monkeypatch):
    from dsv4_core.cli import doctor as module

    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "its process ended with status 1" in module._elsewhere("reference", None)["error"]


def test_a_backend_that_lacks_its_library():
    if __import__("importlib.util").util.find_spec("torch"):
        pytest.skip("torch is installed here")
    done = doctor("-b", "torch")
    assert done.returncode == 1
    assert "needs torch>=2.4, not found here; pip install 'dsv4[torch]'" in done.stdout
