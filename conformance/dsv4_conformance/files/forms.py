"""The forms of the suite's own files: calls, exported cases, traces, reports."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from dsv4_core.contract.spec import OPS
from dsv4_core.files.forms import Digest, Form, Text, Word
from dsv4_core.files.reading import FileError, checked

Numerics = Literal["native", "float32", "float64"]
Few = Annotated[int, Meta(ge=0, le=1 << 20)]
Seed = Annotated[int, Meta(ge=0)]
Axis = Annotated[int, Meta(ge=0, le=1 << 40)]


class Row(Form):
    """A ``RowLayout``."""

    kind: Literal["kv", "key", "plain"]
    dim: Few
    rope_dim: Few = 0


class Plain(Form, tag_field="kind", tag="array"):
    """An operand that is one tensor."""

    tensor: str


class Scaled(Form, tag_field="kind", tag="scaled"):
    """A quantised weight."""

    data: str
    scale: str
    format: Literal["e4m3", "e2m1", "int8"]


class Experts(Form, tag_field="kind", tag="experts"):
    """Stacked experts, those in ``used`` of ``count``."""

    count: Annotated[int, Meta(ge=1, le=1 << 16)]
    used: Annotated[list[Few], Meta(min_length=1, max_length=1 << 16)]
    data: str
    format: Literal["e4m3", "e2m1", "int8"] | None
    scale: str | None


class Parts(Form, tag_field="kind", tag="list"):
    """Several operands as one."""

    parts: Annotated[list[Plain | Scaled | None], Meta(max_length=1 << 12)]


class StoredCall(Form):
    """A call as ``stored_calls`` describes it."""

    op: Word
    scalars: dict[str, Row | bool | int | float | str | list[int] | None]
    operands: dict[str, Plain | Scaled | Experts | Parts | None]


class Output(Form):
    """What a case's program is to write."""

    name: Text
    dtype: Word
    shape: Annotated[list[Axis], Meta(max_length=8)]
    judged: Literal["rounded", "exact", "discrete"]


class ExportedCase(Form):
    """One case of an exported directory."""

    id: Text
    op: Word
    level: Annotated[int, Meta(ge=0, le=4)]
    seed: Seed
    inputs: Text
    expected: Text
    results: Text
    outputs: Annotated[list[Output], Meta(min_length=1, max_length=64)]
    call: dict[str, Any]


class Manifest(Form):
    """``manifest.json`` of an exported directory."""

    numerics: Numerics
    tier: Literal["smoke", "standard", "full"]
    narrower: dict[Word, list[Text]]
    cases: list[dict[str, Any]]


class TracedCall(Form):
    """One call of a trace."""

    time: Annotated[str, Meta(pattern=r"^(prefill|decode[0-9]{1,9})\Z")]
    place: Annotated[str, Meta(pattern=r"^(embedding|head|layer[0-9]{1,6})\Z")]
    number: Annotated[int, Meta(ge=1, le=1 << 20)]
    seed: Seed
    positions: list[Annotated[int, Meta(ge=-1, le=1 << 40)]]
    results: list[Text]
    call: dict[str, Any]


class Trace(Form):
    """``trace.json``."""

    numerics: Numerics
    checkpoint: Digest
    tensors: Digest
    calls: list[TracedCall]


class SavedCase(Form):
    """The metadata of a saved case; every value is text, ``call`` JSON."""

    call: str
    numerics: Numerics
    seed: Annotated[str, Meta(pattern=r"^[0-9]{1,20}\Z")]
    note: str = ""


class Finding(Form):
    """One finding of a report; what it leaves out is as ``report.short`` says."""

    id: Text
    op: Word | UnsetType = UNSET
    group: Word = "op"
    status: Word = "passed"
    claimed: bool = True
    counts: bool | UnsetType = UNSET
    message: str = ""
    level: int | None = None


class Environment(Form):
    """Where a run took place."""

    suite: Word


class Files(Form):
    """Of a certificate: a distribution and the hash of its package's files."""

    distribution: Text
    version: Text
    module: Word
    files: Digest


Argument = Annotated[str, Meta(pattern=r"^(--numerics|native|float32|float64|--option|[a-z][a-z0-9_]*=[^\n]{0,200})\Z")]


class Certificate(Form):
    """Of a report: what it is of."""

    suite: Digest
    oracle: Files
    plugin: Files
    inputs: Digest
    arguments: list[Argument]
    libraries: dict[str, str]
    kernels: list[str]


class Sworn(Form):
    """One finding, as far as it is verified."""

    id: Text
    level: int
    group: Word = "op"
    status: Word = "passed"
    inputs: str = ""
    used: float | None = 0.0


class CertifiedReport(Form):
    """``report.json``, as far as it is verified."""

    backend: Word
    numerics: Numerics
    tier: Literal["smoke", "standard", "full"]
    partial: bool
    level: Annotated[int, Meta(ge=0, le=4)] | None
    certificate: Certificate
    findings: Annotated[list[Sworn], Meta(min_length=1)]


class Report(Form):
    """``report.json``, as far as the matrix reads it."""

    backend: Word
    numerics: Numerics
    tier: Word
    device: Text
    date: Word
    version: Word
    rerun: Text
    partial: bool
    level: Annotated[int, Meta(ge=0, le=4)] | None
    environment: Environment
    findings: list[Finding]
    proof: dict[str, str] | None = None
    options: dict[Word, Text] | UnsetType = UNSET
    command: Text | UnsetType = UNSET


def hold_call(description: Any, name: str, advice: str) -> None:
    """Hold a stored call to its form and to the operands and scalars of its op's contract; raise
    ``FileError``.
    """
    call = checked(description, StoredCall, name, advice)
    if call.op not in OPS:
        raise FileError(f"{name}: op {call.op!r} is none of this version's; {advice}")
    spec = OPS[call.op]
    for what, has, wants in (("operands", call.operands, spec.arrays), ("scalars", call.scalars, spec.scalars)):
        if set(has) != set(wants):
            raise FileError(f"{name}: {what} {', '.join(has) or 'none'}; {call.op} has {', '.join(wants)}; {advice}")
    for key, value in call.scalars.items():
        kind = spec.signature.parameters[key].annotation
        if not _of_kind(value, kind):
            raise FileError(f"{name}: {key} = {value!r} is no {kind}, which {call.op} takes there; {advice}")
        if isinstance(value, int) and not -(1 << 40) <= value <= 1 << 40:
            raise FileError(f"{name}: {key} = {value} is beyond 2^40; {advice}")
    if any(isinstance(v, Experts) and len(set(v.used)) != len(v.used) for v in call.operands.values()):
        raise FileError(f"{name}: an expert is named twice in used; {advice}")


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "Format": (str,),
    "RowLayout": (Row,),
}


def _of_kind(value: Any, kind: str) -> bool:
    """Whether a stored scalar is what a contract's annotation says."""
    return isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))


def plain(value: Any) -> Any:
    """A form's value as dictionaries and lists."""
    return msgspec.to_builtins(value)
