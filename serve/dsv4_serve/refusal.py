"""What a server says no to: a status, a sentence, and the field that it is about."""

from __future__ import annotations

from typing import Any

LONGEST = 600  # characters of a sentence; what it quotes of a request is cut


class RefusedError(Exception):
    """A request that is not served. ``status``: the HTTP status."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        if len(message) > LONGEST:  # a client that sent megabytes needs not have them back
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        super().__init__(message)
        self.message, self.status, self.param, self.kind = message, status, param, kind

    @classmethod
    def failed(cls, error: Exception, *, status: int = 500) -> RefusedError:
        """Make the answer to a request that failed here by no fault of its own."""
        return cls(f"{type(error).__name__}: {error}", status=status, kind="server_error")

    def body(self, *, anthropic: bool) -> dict[str, Any]:
        """The error in the form of a protocol."""
        if anthropic:
            kinds = {
                401: "authentication_error",
                404: "not_found_error",
                413: "request_too_large",
                429: "rate_limit_error",
                503: "overloaded_error",
            }
            kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": None}}


def number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number of the body, or the default; raise ``RefusedError`` where it is none or out of
    range.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RefusedError(f"{name} = {value!r} must be a number in [{low:g}, {high:g}]", param=name)
    return float(value)


def whole(body: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number of the body, or the default; raise ``RefusedError`` where it is none or out of
    range.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RefusedError(f"{name} = {value!r} must be a whole number in {low} .. {high}", param=name)
    return value


def flag(body: dict[str, Any], name: str) -> bool:
    """A truth value of the body, False where it is left out; raise ``RefusedError`` where it is
    something else.
    """
    value = body.get(name)
    if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
        raise RefusedError(f"{name} = {value!r} must be true or false", param=name)
    return bool(value)


def known(body: dict[str, Any], fields: frozenset[str], inert: dict[str, tuple[Any, ...]]) -> None:
    """Raise ``RefusedError`` for a field that would have no effect. ``inert``: fields that may have
    these values only.
    """
    for name, value in body.items():
        if value is None or name in fields:
            continue
        if name not in inert:
            raise RefusedError(f"{name!r} is not supported by this server; leave it out", param=name)
        if inert[name] and value not in inert[name]:
            allowed = " or ".join(repr(v) for v in inert[name])
            raise RefusedError(
                f"{name} = {value!r} is not supported by this server; leave it out, or give {allowed}", param=name
            )
