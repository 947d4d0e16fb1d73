"""What a file is that should have been another: told by its first bytes."""

from __future__ import annotations

_BEGINS = (
    (b"version https://git-lfs", "a Git LFS pointer, in place of the file: fetch it with `git lfs pull`"),
    (b"GGUF", "a GGUF file, which dsv4 does not read"),
    (b"PK\x03\x04", "a ZIP archive, such as PyTorch's pickles are, which dsv4 does not read"),
    (b"\xef\xbb\xbf", "text that begins with a byte-order mark: save it as plain UTF-8"),
    (b"\xff\xfe", "UTF-16 text: save it as plain UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as plain UTF-8"),
)


def mistaken(begin: bytes) -> str | None:
    """Say what file begins so; None where it is not known."""
    if begin.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, in place of the file: the download was refused, or needs a login"
    return next((what for magic, what in _BEGINS if begin.startswith(magic)), None)
