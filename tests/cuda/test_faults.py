"""Faults in kernels: each can still be planted, and the committed table is of these. ``plant.py``
lets the suite judge them; that takes minutes.
"""

from __future__ import annotations

import pytest
from faults import FAULTS
from plant import DOCUMENT, HEAD, planted, row

from dsv4_core.files.markdown import in_lines


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(name, tmp_path):
    planted(FAULTS[name], tmp_path)


def test_the_document_is_of_these_faults():
    text = DOCUMENT.read_text()
    rows = text.removeprefix(in_lines(HEAD)).splitlines()
    assert text.startswith(in_lines(HEAD))
    assert len(rows) == len(FAULTS)
    for fault, line in zip(FAULTS.values(), rows, strict=True):
        assert line.startswith(row(fault)), f"run python tests/cuda/plant.py: {line}"
