"""``dsv4 plugin new``: a backend's package that installs and passes level 0, for a vendor to begin
with.
"""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path

import click

from dsv4_core.cli.commands import Command, Group
from dsv4_core.contract import registry
from dsv4_core.files import writing as files

TEMPLATES = {"pyproject.toml": "pyproject.toml", "README.md": "README.md", "{module}.py": "backend.py"}
"""File that is written -> template in ``data/plugin``."""


@click.group("plugin", cls=Group)
def command() -> None:
    """Begin a backend of your own."""


@command.command("new", cls=Command)
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write; by default dsv4-backend-NAME here.",
)
def new(name: str, out: Path | None) -> None:
    """Write a package with a backend NAME that installs and passes level 0."""
    folder = out or Path(f"dsv4-backend-{name}")
    written = write(name, folder)
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(
        f"next: pip install -e {folder}; dsv4 conformance run --backend {name} --tier smoke; "
        f"dsv4 conformance next --backend {name}"
    )


def write(name: str, folder: Path) -> list[Path]:
    """Write the package; raise ``ValueError`` for a name that cannot be one, or a folder that holds
    something.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        raise ValueError(
            f"plugin new {name!r}: a backend's name is a small letter, then small letters, digits and _; 40 at most"
        )
    if name in registry.installed():
        taken = ", ".join(registry.installed())
        raise ValueError(f"plugin new {name!r}: a backend of that name is installed; choose another than {taken}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files already; choose another folder with --out")
    words = {"name": name, "module": f"dsv4_backend_{name}", "Name": "".join(p.capitalize() for p in name.split("_"))}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for target, template in TEMPLATES.items():
        text = (resources.files("dsv4_conformance") / "data" / "plugin" / f"{template}.template").read_text()
        for word, value in words.items():
            text = text.replace(f"{{{word}}}", value)
        written.append(folder / target.replace("{module}", words["module"]))
        files.write(written[-1], text)
    return written
