"""What ``--json`` prints: one envelope, and one form of result for each command.

docs/json.md and docs/json.schema.json are made from this file (``python -m dsv4_core.cli.schema
DIRECTORY``). Within one ``schema`` number keys are only added.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from dsv4_core.files import writing
from dsv4_core.files.markdown import in_lines
from dsv4_core.version import __version__

SCHEMA = 1


class Form(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An object whose keys are all known."""


class Run(Form):
    """What ran: the model's directory (null: the embedded one, or none), the backend in its own
    words, the numerics.
    """

    model: str | None
    backend: str
    numerics: str


class Sequence(Form):
    """One prompt's continuation: new ids and their text (null without a tokenizer); why it
    ended.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str | None
    finish: Literal["stop", "length"]


class Drafts(Form):
    """Speculation: tokens that the MTP block or DSpark proposed, those that were accepted, and
    steps of the main model.
    """

    proposed: int
    accepted: int
    steps: int


class Generated(Form):
    """``dsv4 generate``. Seconds: until the first token, and from there to the last."""

    run: Run
    sequences: list[Sequence]
    prefill_seconds: float
    decode_seconds: float
    drafts: Drafts | None


class Roofline(Form):
    """The most that a machine could do (counted, not measured), what limits it, and the share that
    was reached.
    """

    hardware: str
    tokens_per_second: float
    limit: str
    share: float


class Rate(Form):
    """Tokens per second: the median of the runs, the slowest and the fastest."""

    tokens_per_second: float
    slowest: float
    fastest: float
    roofline: Roofline | None


class Benched(Form):
    """``dsv4 bench``: tokens of each prompt, tokens decoded after it, sequences side by side,
    runs.
    """

    run: Run
    prompt: int
    tokens: int
    batch: int
    runs: int
    prefill: Rate
    decode: Rate


Status = Literal["runs", "simulates only", "cannot run"]
"""Of a backend here: it can run, it can only be simulated or interpreted on a CPU, or it cannot."""


class BackendEntry(Form):
    """An installed backend: what it is from, what it needs, what of that is missing and the command
    that installs it.
    """

    name: str
    distribution: str
    version: str
    requires: list[str]
    missing: list[str]
    install: str | None
    status: Status
    note: str


class Chosen(Form):
    """The backend that would be used, and what chose it."""

    name: str
    why: str


class Listed(Form):
    """``dsv4 backends``."""

    backends: list[BackendEntry]
    chosen: Chosen


class Line(Form):
    """One thing that was looked at, what was found, and (where something is wrong) what to do."""

    what: str
    found: str
    advice: str


class Diagnosed(Form):
    """One backend: ``loaded`` says whether its libraries were loaded and it was constructed, or
    only looked for.
    """

    name: str
    status: Status
    loaded: bool
    lines: list[Line]
    error: str


class Doctored(Form):
    """``dsv4 doctor``."""

    host: list[Line]
    chosen: Chosen
    backends: list[Diagnosed]


class ExplainedOp(Form):
    """One op on weights of one dtype: how often it is called, who runs it (null: nobody) or why
    nobody does, how far proven.
    """

    op: str
    weight: str
    calls: int
    by: str | None
    reason: str
    proof: str


class Explained(Form):
    """``dsv4 explain``: the calls of a 512-token prefill and of a later decode step together."""

    run: Run
    ops: list[ExplainedOp]
    missing: int


class Machine(Form):
    """Equal devices: memory of each in bytes, and where its figures are from."""

    name: str
    devices: int
    memory: float
    source: str


class PerToken(Form):
    """Of one token on one rank: operations by precision (and what they weigh in FP8's), bytes by
    kind.
    """

    operations: dict[str, float]
    equivalent_fp8: float
    read: dict[str, float]
    written: dict[str, float]
    sent: dict[str, float]


class CeilingOf(Form):
    """Tokens per second of the machine at best, what limits it, and seconds of a step by each
    limit.
    """

    tokens_per_second: float
    limit: str
    seconds: dict[str, float]
    dollars_per_million_tokens: float | None = None


class Ceilings(Form):
    """Of both phases."""

    prefill: CeilingOf
    decode: CeilingOf


class Growth(Form):
    """Decode at another context: FP8 operations and bytes of a token and rank, bytes of a
    sequence's cache.
    """

    context: int
    equivalent_fp8: float
    cache_per_sequence: float
    weights_read: float
    cache_read: float
    tokens_per_second: float
    limit: str


class Planned(Form):
    """``dsv4 plan``: bytes of a rank by kind, bytes of a sequence's cache, sequences that would
    fit.
    """

    model: str
    context: int
    batch: int
    hardware: Machine
    tp: int
    ep: int
    fits: bool
    why: str
    memory_per_rank: dict[str, float]
    cache_per_sequence: float
    sequences: int
    decode_per_token_and_rank: PerToken
    prefill_per_token_and_rank: PerToken
    ceilings: Ceilings
    growth: list[Growth]


class PublishedClaim(Form):
    """A published figure, ours, and how far apart they may be."""

    what: str
    published: float
    ours: float
    unit: str
    tolerance: float
    holds: bool


class Claimed(Form):
    """``dsv4 plan --claims``."""

    claims: list[PublishedClaim]


class Tensors(Form):
    """Tensors of one kind and dtype."""

    kind: str
    dtype: str
    count: int
    bytes: int


class Finding(Form):
    """Something about a checkpoint: an error, or a note."""

    rule: str
    tensor: str
    file: str
    text: str
    severity: str


class Inspected(Form):
    """``dsv4 inspect``. ``audited``: whether values were read, too."""

    path: str
    config: dict[str, Any]
    parameters: dict[str, int]
    bytes: int
    tensors: list[Tensors]
    audited: bool
    findings: list[Finding]


class Failure(Form):
    """A check that did not pass: what it said, and the command that runs it alone."""

    id: str
    status: str
    claimed: bool
    message: str
    rerun: str


class Judged(Form):
    """``dsv4 conformance run``: levels (null: none), checks by status, those that failed the run,
    stale xfails.
    """

    backend: str
    version: str
    numerics: str
    tier: str
    command: str
    level: int | None
    claimed: int | None
    required: int | None
    statuses: dict[str, int]
    failures: list[Failure]
    stale: list[str]
    report: str | None


RESULTS: dict[str, type[Form]] = {
    "generate": Generated,
    "bench": Benched,
    "backends": Listed,
    "doctor": Doctored,
    "explain": Explained,
    "plan": Planned,
    "plan --claims": Claimed,
    "inspect": Inspected,
    "conformance run": Judged,
}


def emit(command: str, result: Form, *, ok: bool = True) -> None:
    """Print a command's document; ``ok``: whether the command exits with 0."""
    document = {"dsv4": __version__, "schema": SCHEMA, "command": command, "ok": ok, "result": result}
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema (2020-12) of every document."""
    results, components = msgspec.json.schema_components(RESULTS.values(), ref_template="#/$defs/{name}")
    for component in components.values():
        component["description"] = " ".join(component["description"].split())
    documents = [
        {
            "type": "object",
            "properties": {
                "dsv4": {"type": "string"},
                "schema": {"const": SCHEMA},
                "command": {"const": command},
                "ok": {"type": "boolean"},
                "result": result,
            },
            "required": ["dsv4", "schema", "command", "ok", "result"],
            "additionalProperties": False,
        }
        for command, result in zip(RESULTS, results, strict=True)
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "oneOf": documents, "$defs": components}


def page() -> str:
    """Write docs/json.md."""
    lines = [
        "# JSON for scripts",
        "",
        "`--json` makes a command print one JSON document on standard output, and nothing else there.",
        "Messages and progress go to standard error. The exit status is that of the same command without",
        "`--json`; after an error (status 2 and above) standard output is empty.",
        "",
        "```json",
        f'{{"dsv4": "{__version__}", "schema": {SCHEMA}, "command": "bench", "ok": true, "result": {{...}}}}',
        "```",
        "",
        "`ok` is true where the command exits with 0. Within one `schema` number keys are only added.",
        "[json.schema.json](json.schema.json) is the JSON Schema of all documents. This page and the schema",
        "are made from `dsv4_core/cli/schema.py`.",
        "",
        "| command | `result` is |",
        "|---|---|",
        *(f"| `dsv4 {command}` | [{form.__name__}](#{form.__name__.lower()}) |" for command, form in RESULTS.items()),
        "",
    ]
    for form in _forms():
        lines += [f"## {form.__name__}", "", " ".join((form.__doc__ or "").replace("``", "`").split()), ""]
        lines += ["| key | type |", "|---|---|"]
        lines += [f"| `{field.name}` | {_type(field.type)} |" for field in msgspec.structs.fields(form)]
        lines.append("")
    return in_lines("\n".join(lines))


def _forms() -> list[type[Form]]:
    """Give every form, in the order of the file."""
    return [value for value in globals().values() if isinstance(value, type) and issubclass(value, Form)][1:]


def _type(kind: Any) -> str:
    """Write a type for people."""
    if isinstance(kind, type) and issubclass(kind, Form):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    text = (
        getattr(kind, "__name__", str(kind)) if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    )
    args: tuple[Any, ...] = getattr(kind, "__args__", ())
    if str(kind).startswith("typing.Literal"):
        return " or ".join(f'`"{arg}"`' for arg in args)
    if getattr(kind, "__origin__", None) is list:
        return f"list of {_type(args[0])}"
    if getattr(kind, "__origin__", None) is dict:
        return f"object of {_type(args[1])}"
    if args:
        return " or ".join(_type(arg) for arg in args)
    return {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "NoneType": "null"}.get(
        text, "any"
    )


def write(directory: Path) -> None:
    """Write both files."""
    writing.write(directory / "json.md", page())
    writing.write(directory / "json.schema.json", json.dumps(json_schema(), indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
