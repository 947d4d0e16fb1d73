"""A vendor's package in one file, installed where there is no checkout on the path, is told its
level; a wrong line in it is found.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from dsv4_conformance.cli.run import IN_FULL

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vendor_backend"
FILE = "dsv4_backend_example.py"


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    """A fresh environment with the vendor's package in it; libraries come from the one that runs
    the tests.
    """
    home = tmp_path_factory.mktemp("vendor")
    shutil.copytree(EXAMPLE, home / "package", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    venv.create(home / "venv", with_pip=False)
    site = next((home / "venv" / "lib").glob("python*")) / "site-packages"
    parent = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in parent))
    python = home / "venv" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-e",
        home / "package",
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return home, python


def run(vendor, *arguments):
    home, python = vendor
    command = [
        python,
        "-c",
        "from dsv4_core.cli import main; main()",
        "conformance",
        "run",
        "--backend",
        "example",
        *arguments,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)


def test_the_file_is_short():
    assert len((EXAMPLE / FILE).read_text().splitlines()) < 100


def test_it_is_told_its_level(vendor):
    done = run(vendor, "--tier", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "level 0 (codecs and data movement); claims level 0" in done.stdout
    assert "sparse_attn" in done.stdout.splitlines()[-1]  # neither claimed nor run: named in the last line


def test_a_level_may_be_required(vendor):
    assert run(vendor, "--tier", "smoke", "--require", "1", "-q").returncode == 1


def test_a_wrong_line_is_found(vendor):
    home, _ = vendor
    source = home / "package" / FILE
    right = source.read_text()
    source.write_text(
        right.replace("np.mean(wide * wide, axis=-1, keepdims=True)", "np.mean(wide * wide, axis=0, keepdims=True)")
    )
    try:
        done = run(vendor, "--op", "rms_norm")
    finally:
        source.write_text(right)
    assert done.returncode == 1
    assert re.search(r"FAILED rms_norm/small", done.stdout)
    assert re.search(r"worst \[\d+, \d+\]: got \S+, want \S+, off by \S+, budget \S+", done.stdout)
    assert "re-run: dsv4 conformance run --backend example --case rms_norm/small" in done.stdout
    assert done.stdout.count("re-run: ") == IN_FULL < done.stdout.count("FAILED rms_norm/")  # then they are named only
    assert done.stdout.count("rms_norm's failures are named only") == 1
