"""What is fuzzed without a command line: readers that a command reaches only from another process
or over a network.

Each gets the words after its name, prints what it came to, and raises what it raises.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

SECRET = b"0123456789abcdef"


def tokenizer(directory: str) -> None:
    """Read a tokenizer, encode and decode with it."""
    from dsv4_core.text.tokenizer import Vocabulary, load_tokenizer

    found = load_tokenizer(Path(directory))
    assert found is not None
    vocabulary = Vocabulary(found)
    print(repr(vocabulary.text(vocabulary.words("hi 12"))))


def load(path: str) -> None:
    """``/load`` of the chat."""
    from dsv4_core.cli.chat import read_conversation

    print(len(read_conversation(Path(path), None)), "turns")


def prompts(path: str) -> None:
    """``generate --prompts``, as far as the file alone goes."""
    from dsv4_core.cli.generate import read_prompts

    print(len(read_prompts((), (), (), Path(path), "")), "prompts")


def texts(directory: str) -> None:
    """The fixed texts of a checkpoint's encoder, which is read and never run."""
    from dsv4_core.text.fixed_texts import fixed_texts

    print(fixed_texts(Path(directory), None))


def secret(path: str) -> None:
    """``--store-key-file``."""
    from dsv4_core.ranks import signed

    Path(path).chmod(0o600)
    os.environ[signed.FILE_VARIABLE] = path
    try:
        print(len(signed.secret()), "bytes")
    finally:
        del os.environ[signed.FILE_VARIABLE]


class Held:
    """A store that holds what was written to it, as torch's does: text in, bytes out."""

    def __init__(self, said: dict[str, str]) -> None:
        self.said = {key: value.encode("latin-1", "replace") for key, value in said.items()}

    def set(self, key: str, value: str, /) -> None:
        if not key.endswith("/0"):
            return
        self.said[key] = value.encode()

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.said for key in keys)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self.said[key] for key in keys]


WHAT = {"model": "0123abcd", "options": {"seed": 1, "tokens": [5, 6]}, "backend": "torch"}


def sound_store(*, signed: bool = False) -> dict[str, str]:
    """What rank 1 of 2 writes."""
    from dsv4_core.ranks.signed import SignedStore

    held = Held({})
    held.set = lambda key, value: held.said.__setitem__(key, value.encode())  # type: ignore[method-assign]
    writer: Any = SignedStore(held, SECRET) if signed else held
    for key, value in (("size", "2"), ("place", "host, process 7"), ("beat", "3"), ("agree 1", json.dumps(WHAT))):
        writer.set(f"dsv4/{key}/1", value)
    return {key: value.decode("latin-1") for key, value in held.said.items()}


def _rank_0(store: Any) -> None:
    """Meet, agree, and watch once, as rank 0 of 2."""
    from dsv4_core.files.words import one_line
    from dsv4_core.ranks.watch import RankError, Watch

    class Quiet(Watch):
        def _watch(self) -> None: ...
        def _guard(self) -> None: ...

    watch = Quiet(store, rank=0, ranks=2, holder=None, place="here", join=0.0)
    watch.agree(WHAT)
    said = [one_line(value.decode(errors="replace")) for value in store.multi_get(watch._keys("beat"))]
    if verdict := watch._judge(said, [0.0, 0.0]):
        raise RankError(one_line(verdict, 2000))
    print("agreed")


def store(path: str) -> None:
    """Ranks without a secret."""
    _rank_0(Held(json.loads(Path(path).read_text())))


def signed(path: str) -> None:
    """Ranks with one: what was changed after it was signed is refused."""
    from dsv4_core.ranks.signed import SignedStore

    plain, now = sound_store(), json.loads(Path(path).read_text())
    kept = sound_store(signed=True)
    changed = {key: value for key, value in now.items() if value != plain.get(key)}
    _rank_0(SignedStore(Held(kept | changed), SECRET))
    if any(changed.values()):
        raise AssertionError(f"believed a stranger: {changed}")


@functools.cache
def _served() -> Any:
    from dsv4_serve import running

    import dsv4_core as dsv4

    logging.getLogger("dsv4.serve").disabled = True
    return running.application(
        dsv4.load("speaking", backend="reference"), name="speaking", slots=1, context=400, profile="official"
    )


def body(kind: str, path: str) -> None:
    """A request's body, up to the engine: through the route, as a client's would come."""
    import asyncio

    app = _served()
    routes = {"chat": "chat/completions", "tools": "chat/completions"}
    path_of = "/tokenize" if kind == "tokenize" else f"/v1/{routes.get(kind, kind)}"
    status, said = asyncio.run(_asked(app, path_of, Path(path).read_bytes()))
    if status == 500:
        raise RuntimeError(said)
    if status != 200:
        raise ValueError(f"{status}: {said}")
    print("answered")


async def _asked(app: Any, path: str, content: bytes) -> tuple[int, str]:
    sent: list[dict[str, Any]] = []
    inputs = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> dict[str, Any]:
        import asyncio

        for message in inputs:
            return message
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
             "root_path": "", "scheme": "http", "query_string": b"", "headers": [(b"content-type", b"application/json")],
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}  # fmt: skip
    await app.asgi()(scope, receive, send)
    text = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body").decode("utf-8", "replace")
    return sent[0]["status"], text


DIRECT = {f"@{f.__name__}": f for f in (tokenizer, load, prompts, texts, secret, store, signed, body)}
