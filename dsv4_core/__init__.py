"""DeepSeek-V4 on any hardware.

``load`` opens a model on a backend and gives a ``Session``, which generates and gives logits:

>>> import dsv4_core as dsv4
>>> with dsv4.load(backend="reference") as model:
...     reply = model.generate("What is kludge?", max_tokens=8).run()
>>> reply.tokens
[[...]]

Names are imported when they are first used: ``import dsv4_core`` itself reads this file and the
version. The rooms below hold contracts, checkpoints, the graph, ranks, planning, text and the
command line; none of them has device code.
"""

from typing import TYPE_CHECKING, Any

from dsv4_core.version import __version__

if TYPE_CHECKING:
    from dsv4_core.checkpoint.findings import CheckpointError
    from dsv4_core.contract.backend import BackendError
    from dsv4_core.generation import Event, Generation
    from dsv4_core.session import Sampling, Session, load

__all__ = ["BackendError", "CheckpointError", "Event", "Generation", "Sampling", "Session", "__version__", "load"]

_HOMES = {
    "BackendError": "dsv4_core.contract.backend",
    "CheckpointError": "dsv4_core.checkpoint.findings",
    **dict.fromkeys(("Event", "Generation"), "dsv4_core.generation"),
    **dict.fromkeys(("Sampling", "Session", "load"), "dsv4_core.session"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dsv4_core' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
