"""Documents: their length, the width of their lines, and that the files that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def prose(path):
    """Lines outside code, tables and lists with hard breaks, with their numbers."""
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith(("|", "    ", "<", "!")) and not line.endswith("  "):
            yield number, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_lines_of_prose_are_at_most_100_characters(path):
    assert not [(number, line) for number, line in prose(path) if len(line) > 100]


def test_readme_takes_two_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_that_a_document_names_exist(path):
    named = re.findall(
        r"`((?:dsv4_core|backends|conformance|examples|benchmarks|tests|docs)/[\w/.-]+)`", path.read_text()
    )
    missing = [name for name in named if "FAMILY" not in name and not (ROOT / name).exists()]
    assert not missing
