"""``dsv4 demo``."""

from __future__ import annotations

import click

PROMPT = "What is kludge?"


@click.command("demo")
@click.option("--chat", default=PROMPT, show_default=True, help="What to ask the embedded model.")
@click.option("--max-tokens", "-n", type=click.IntRange(1), default=48, show_default=True)
def command(chat: str, max_tokens: int) -> None:
    """Load the embedded checkpoint, generate on the reference backend, list the backends.

    Needs nothing but the package.
    """
    from dsv4_core.checkpoint.weights import embedded
    from dsv4_core.cli.backends import table
    from dsv4_core.cli.generate import encode_prompt
    from dsv4_core.cli.options import BackendFlags
    from dsv4_core.cli.running import Session, report, stop_tokens
    from dsv4_core.graph.sampling import Sampling

    report(
        "embedded model: a small trained DeepSeek-V4; fluent, usually wrong. Backend: reference (NumPy), native numerics\n"
    )
    session = Session.open(embedded(), BackendFlags("reference", "native", {}))
    click.echo(f"> {chat}")
    prompt = encode_prompt(session.tokenizer, None, chat, "", thinking=False)
    stop = stop_tokens(session.model.config, ())
    done = session.run(prompt, max_tokens=max_tokens, sampling=Sampling(), speculative=None, stop=stop, chunk=2048)
    report(done.summary() + "\n")
    table()
