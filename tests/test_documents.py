"""Documents: their length, the width of their lines, and that the files and options that they name
exist.
"""

import re
from pathlib import Path

import pytest

from dsv4_core.cli import root

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


OTHERS = {  # options of commands that are not dsv4's
    "--help", "--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--rdzv-backend",  # torchrun's
    "--tensor-parallel-size", "--speculative-config", "--additional-config",  # vLLM's
    "--bundle",  # cosign's
    "--no-deps",  # pip's
    "--ops", "--weights", "--llama",  # of scripts in benchmarks/
    "--inputs", "--ledger",  # of scripts in tests/
}  # fmt: skip


def options(command):
    """Every option of a command and of those below it."""
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from options(command.get_command(None, name))
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


def test_options_that_documents_name_exist():
    known = OTHERS | set(options(root))
    named = {(m, path.name) for path in DOCUMENTS for m in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", path.read_text())}
    assert not sorted((m, where) for m, where in named if m not in known)
