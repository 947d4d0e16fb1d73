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
