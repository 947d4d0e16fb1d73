"""Every example runs as its first lines say, and prints what its page says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "run_the_model.py": "What is kludge? ->",
    "settle_a_disagreement.py": "first over budget: op swiglu, layer0",
    "size_a_machine.py": "1048576 tokens:",
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name):
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_every_page_has_its_example():
    pages = "".join(path.read_text() for path in (EXAMPLES.parent / "docs").glob("*.md"))
    for name in (*SAYS, "vendor_backend"):
        assert f"examples/{name}" in pages, f"no page names examples/{name}"
