"""``dsv4 serve``."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import BackendFlags, Finite, RankFlags, backend_options, rank_options

if TYPE_CHECKING:
    from dsv4_core.text.fixed_texts import Profile


@click.command("serve", cls=Command)
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is everybody's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="The model's name in requests (else its directory's).")
@click.option(
    "--api-key", envvar="DSV4_API_KEY", help="What clients must give (also DSV4_API_KEY); none: everybody may."
)
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True, help="Requests that run at once.")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens of a request, prompt and reply (else 8192, or the model's)."
)
@click.option(
    "--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait; more get 429."
)
@click.option(
    "--chunk", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a step that are prefill."
)
@click.option("--speculative", is_flag=True, help="Draft with what the checkpoint has for it, MTP or DSpark.")
@click.option(
    "--draft-confidence",
    type=Finite(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="DSpark's drafts end where the chance that all of them are kept falls below it.",
)
@click.option("--thinking/--no-thinking", default=True, show_default=True, help="Where a request does not say.")
@click.option(
    "--encoding-profile",
    type=click.Choice(["preview", "official"]),
    help="Chat texts for a copy without encoding/: preview (April) or official (from July on).",
)
@click.option("--max-body", type=click.IntRange(1), default=10 << 20, show_default=True, help="Bytes of a request.")
@click.option(
    "--drain-seconds",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="Until requests are cut off at the end.",
)
@rank_options
@backend_options
def command(
    model: str | None,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    slots: int,
    context: int | None,
    queue: int,
    chunk: int,
    speculative: bool,
    draft_confidence: float,
    thinking: bool,
    encoding_profile: Profile | None,
    max_body: int,
    drain_seconds: int,
    flags: BackendFlags,
    asked: RankFlags,
) -> None:
    """Serve MODEL (a checkpoint's directory; the embedded one if left out) to clients of OpenAI's
    and Anthropic's protocols.
    """
    try:
        from dsv4_serve.running import application, bound, follow_first, listen
    except ImportError as error:
        raise click.ClickException(f"dsv4 serve needs its extra ({error}); pip install 'dsv4[serve]'") from None

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from dsv4_core.cli.running import open_model

    how: dict[str, Any] = {
        "name": name,
        "slots": slots,
        "context": context,
        "chunk": chunk,
        "drafts": speculative,
        "confidence": draft_confidence,
        "thinking": thinking,
        "profile": encoding_profile,
    }
    with open_model(model, flags, asked) as session:
        if not session.speaks:
            follow_first(session, **how)
            if asked.stats:
                session.ranks.report()
            return
        with bound(host, port) as address:
            listen(application(session, queue=queue, key=api_key, largest=max_body, **how), address, drain_seconds)
        if asked.stats:
            click.echo(session.ranks.report(), err=True)
