"""Lines of Markdown: prose is kept to 100 characters, in what people write and in what is made from
code.
"""

from __future__ import annotations

import re
import textwrap

WIDTH = 100
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
_KEPT = ("|", "#", "<", "    ", "!")  # tables, headings, comments, code, pictures


def in_lines(text: str) -> str:
    """Wrap paragraphs and items of lists that have a longer line; leave all else, and lines with a
    hard break, as they are.
    """
    lines: list[str] = []
    paragraph: list[str] = []
    code = False
    for line in (*text.splitlines(), ""):
        fence = line.lstrip().startswith("```")
        code ^= fence
        if code or fence or line.startswith(_KEPT) or line.endswith("  ") or not line.strip():
            lines += [*_wrapped(paragraph), line]
            paragraph = []
            continue
        if _ITEM.match(line):
            lines += _wrapped(paragraph)
            paragraph = []
        paragraph.append(line)
    return "\n".join(lines[:-1]) + "\n"


def _wrapped(paragraph: list[str]) -> list[str]:
    if max(map(len, paragraph), default=0) <= WIDTH:
        return paragraph
    item = _ITEM.match(paragraph[0])
    first = item[0] if item else " " * (len(paragraph[0]) - len(paragraph[0].lstrip()))
    body = " ".join([paragraph[0][len(first) :], *paragraph[1:]])
    return textwrap.wrap(
        re.sub(r"\s+", " ", body),
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
