"""How a request wants its tokens chosen, in the fields that all protocols share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_serve.refusal import RefusedError

if TYPE_CHECKING:
    from dsv4_serve.served import Served


def wishes(body: dict[str, Any], served: Served) -> dict[str, Any]:
    """Arguments of ``Sampling`` from a body that was checked; raise ``RefusedError`` for ids that
    the vocabulary does not have.
    """
    vocab = served.engine.model.config.vocab_size
    bias = {int(token): float(value) for token, value in (body.get("logit_bias") or {}).items()}
    if outside := [token for token in bias if token >= vocab]:
        raise RefusedError(
            f"logit_bias: token id {outside[0]} is outside the vocabulary 0 .. {vocab - 1}", param="logit_bias"
        )
    told = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    return {**{name: body[name] if body.get(name) is not None else value for name, value in told.items()}, "bias": bias}
