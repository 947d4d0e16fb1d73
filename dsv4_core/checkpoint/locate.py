"""Where a model is: a directory, a name in the local hub cache, or the checkpoint that ships with
the package.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.foreign import path_problem
from dsv4_core.checkpoint.weights import embedded
from dsv4_core.files.reading import text

if TYPE_CHECKING:
    from collections.abc import Mapping

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def find_model(model: str | Path | None) -> Path:
    """Give the directory of ``model``: one that exists, or ``OWNER/NAME[@REVISION]`` in the hub's
    local cache.

    None is the embedded checkpoint. Nothing is downloaded. Raises ``ValueError`` saying what was
    looked for and how to get it.
    """
    if model is None:
        return embedded()
    path, name = Path(model), str(model)
    if not name:
        raise ValueError("the model's name is empty (an unset variable?); name a directory, or leave it out")
    if "://" in name:
        raise ValueError(
            f"{name}: an address, and dsv4 downloads nothing: `pip install huggingface_hub && hf download OWNER/NAME`, "
            "then give OWNER/NAME"
        )
    if problem := path_problem(path):
        raise ValueError(problem)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{model}: a model is a directory that holds config.json and *.safetensors; name that")
    if _HUB_NAME.fullmatch(name):
        return _in_hub_cache(name)
    preset = f"; {name!r} is a preset: `dsv4 init DIR --preset {name} --seed 0` makes one" if name in PRESETS else ""
    raise ValueError(
        f"{model}: no such directory; name one that holds config.json and *.safetensors, or leave it out for the embedded model{preset}"
    )


def find_drafter(drafter: str | Path | None) -> Path | None:
    """Give the directory of a drafter, named as for ``find_model``; None for None, and
    ``embedded`` for the DSpark that ships with the package, made for the embedded model.
    """
    if drafter is None:
        return None
    return embedded().with_name("tiny-jargon-dspark") if str(drafter) == "embedded" else find_model(drafter)


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Give the directory in which Hugging Face's tools keep what they download (HF_HUB_CACHE,
    HF_HOME, XDG_CACHE_HOME).
    """
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _in_hub_cache(name: str) -> Path:
    """Give the snapshot of a revision (of ``main``, or the only one, where none is named)."""
    repository, _, revision = name.partition("@")
    cache = hub_cache()
    kept = cache / f"models--{repository.replace('/', '--')}"
    snapshots = sorted(path for path in (kept / "snapshots").glob("*") if path.is_dir())
    download = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    if not snapshots:
        raise ValueError(
            f"{name}: no such directory, and no model of that name in the hub's cache {cache}; dsv4 downloads nothing: "
            f"`pip install huggingface_hub && {download}`, then give the same name again (or add --local-dir DIR, and name DIR)"
        )
    wanted = revision or "main"
    ref = kept / "refs" / wanted
    commit = text(ref, 4096).strip() if ref.is_file() else wanted
    for snapshot in snapshots:
        if snapshot.name == commit:
            return snapshot
    if not revision and len(snapshots) == 1:
        return snapshots[0]
    held = ", ".join(path.name for path in snapshots)
    raise ValueError(
        f"{name}: {kept} has no revision {wanted!r}, but {held}; name one as {repository}@REVISION, or get it: `{download}`"
    )
