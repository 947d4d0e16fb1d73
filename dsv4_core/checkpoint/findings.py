"""What is wrong with a checkpoint, and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

SHOWN = 3  # findings of one rule that an error message spells out; its ``findings`` holds all of them


class Finding(NamedTuple):
    """Something wrong with a checkpoint: the rule, the tensor (empty: a whole file), the file, and
    the sentence.
    """

    rule: str
    tensor: str
    file: str
    text: str
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        """Give one line: where, then what."""
        return ": ".join(part for part in (self.file, self.tensor, self.text) if part)


class CheckpointError(ValueError):
    """A directory that is no sound checkpoint. ``findings`` holds all there is, the message the
    first of each rule.
    """

    def __init__(self, path: Path, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        lines = summary(findings)
        if len(findings) > 1:
            counts = Counter(f.rule for f in findings)
            kinds = ", ".join(f"{count} {rule}" for rule, count in counts.items())
            head = f"{path}: {len(findings)} problems ({kinds}); `dsv4 inspect {path} --json` lists them all"
            super().__init__("\n  - ".join([head, *lines]))
        else:
            super().__init__(f"{path}: {lines[0]}")


def summary(findings: Iterable[Finding]) -> list[str]:
    """One line a finding, at most three for each rule, then how many more there are."""
    counts = Counter(f.rule for f in findings)
    lines: list[str] = []
    for rule, count in counts.items():
        lines += [str(f) for f in findings if f.rule == rule][:SHOWN]
        if count > SHOWN:
            lines.append(f"... and {count - SHOWN} more of: {rule}")
    return lines


class ForeignError(ValueError):
    """Weights in a format that dsv4 does not read: one sentence says which, and what to use
    instead.
    """
