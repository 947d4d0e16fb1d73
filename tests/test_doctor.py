"""What `dsv4 doctor` says, and its exit status."""

import os
import subprocess
import sys

import pytest


def doctor(*args, path=None):
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-m", "dsv4_core", "doctor", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


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


def test_a_backend_whose_library_is_broken(tmp_path):
    """An import that dies is told apart from one that is missing, and named."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    done = doctor("-b", "torch", path=tmp_path)
    assert done.returncode == 1
    if __import__("importlib.util").util.find_spec("torch"):
        assert "failed to import: OSError: libtorch_cpu.so: cannot open shared object file" in done.stdout
    assert "torch (configured: chosen by --backend): cannot run" in done.stdout
    assert "reference: can run" in done.stdout


def test_torch_says_which_it_is_and_how_it_multiplies():
    torch = pytest.importorskip("torch")
    done = doctor("-b", "torch")
    assert done.returncode == 0, done.stdout
    said = done.stdout.split("torch (configured")[1]
    assert f"version          {torch.__version__}; dtypes it lacks" in said
    assert f"CPU              {torch.backends.cpu.get_cpu_capability()}, " in said
    assert "BF16 products" in said


def test_torch_on_a_device_that_is_not_there():
    pytest.importorskip("torch")
    done = doctor("-b", "torch", "--device", "nosuch")
    assert done.returncode == 1
    assert "device 'nosuch' cannot be used by torch" in done.stdout
