"""``dsv4 demo``."""

from __future__ import annotations

import click

from dsv4_core.cli.commands import Command

PROMPT = "What is kludge?"


@click.command("demo", cls=Command)
@click.option("--chat", default=PROMPT, show_default=True, help="What to ask the embedded model.")
@click.option("--max-tokens", "-n", type=click.IntRange(1), default=48, show_default=True)
def command(chat: str, max_tokens: int) -> None:
    """Load the embedded checkpoint, generate on the reference backend, list the backends.

    Needs nothing but the package.
    """
    from dsv4_core.cli.backends import table
    from dsv4_core.cli.generate import show
    from dsv4_core.cli.options import BackendFlags
    from dsv4_core.cli.running import open_model, report

    report(
        "embedded model: a small trained DeepSeek-V4; fluent, usually wrong. Backend: reference (NumPy), native numerics\n"
    )
    with open_model(None, BackendFlags("reference", "native", {})) as session:
        click.echo(f"> {chat}")
        events = session.generate([[{"role": "user", "content": chat}]], max_tokens=max_tokens)
        show(session, events, [chat])
    report(f"{events.summary()}\n")
    table()
    report("\nTalk to it: dsv4 chat. Serve it to clients of OpenAI and Anthropic: dsv4 serve.")
