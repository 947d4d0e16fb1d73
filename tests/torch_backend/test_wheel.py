"""A wheel that carries the kernels, made by the commands that ``cibuildwheel`` would run and
installed where there is no compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml with tomllib", allow_module_level=True)

import tomllib
from dsv4_backend_torch import kept

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]  # three compilations


def done(command, folder, **more):
    """What a command prints, run in ``folder`` with this environment and ``more``."""
    given = {k: v for k, v in os.environ.items() if k not in {"CC", "PYTHONPATH"}} | more
    ran = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources after the step that cibuildwheel is told to run before, by a
    Python that has no packages.
    """
    copy = tmp_path_factory.mktemp("source") / "dsv4"
    left_out = shutil.ignore_patterns(".*", "reports", "docs", "tests", "*.egg-info", "build", "built", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    program, *words = shlex.split(
        tomllib.loads((copy / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["before-build"]
    )
    assert program == "python"
    bare = tmp_path_factory.mktemp("bare")
    done([sys.executable, "-m", "venv", "--without-pip", bare], copy)
    done([bare / "bin/python", *words], copy)
    done([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."], copy)
    (made,) = (copy / "dist").glob("*.whl")
    return made


def test_the_wheel_is_for_one_platform_and_carries_a_library_of_each_level(wheel):
    assert "-cp310-abi3-linux_" in wheel.name
    carried = [Path(name) for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert sorted(path.name.partition("-")[0] for path in carried) == sorted(kept.LEVELS)
    assert {path.parent for path in carried} == {Path("dsv4_backend_torch/built")}


def test_it_runs_where_there_is_no_compiler(wheel, tmp_path):
    place = tmp_path / "venv"
    done([sys.executable, "-m", "venv", "--without-pip", place], tmp_path)
    (packages,) = place.glob("lib/python3*/site-packages")
    done([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, wheel], tmp_path)
    others = [path for path in map(Path, sys.path) if path.is_dir() and path.name in {"site-packages", "dist-packages"}]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))  # torch and its like, not built here
    code = """
import torch, dsv4_core
from dsv4_backend_torch import TorchBackend
from dsv4_backend_torch.compiled import build
backend = TorchBackend(few_tokens_by="c")
x, w = torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(3, 64, dtype=torch.bfloat16)
print(dsv4_core.__file__, build().compiler, backend.linear(x, w, out_dtype="float32").tolist())
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = {"PATH": str(empty), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    said = done([place / "bin/python", "-c", code], tmp_path, **bare)
    assert said.startswith(str(packages))
    assert "carried by the package [[64.0, 64.0, 64.0], [64.0, 64.0, 64.0]]" in said
    wanted = next(level for level, (_, needed) in kept.LEVELS.items() if needed <= kept.cpu_flags())
    doctor = done([place / "bin/python", "-m", "dsv4_core", "doctor", "-b", "torch"], tmp_path, **bare)
    assert f"C kernels, built by {wanted}, carried by the package" in doctor.replace("\n", " ")
    assert not (tmp_path / "cache").exists()  # nothing was built
