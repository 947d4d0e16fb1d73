"""Coverage-guided: atheris looks for inputs that take new ways through the readers of files.

python tests/fuzz/guided.py READER -runs=100000     (libFuzzer's own options; an uncaught error ends
it and is written to a file)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["dsv4_core.files", "dsv4_core.checkpoint.shards", "dsv4_core.checkpoint.config"]
):
    from dsv4_core.checkpoint.config import ConfigError, ModelConfig
    from dsv4_core.checkpoint.shards import Shard, ShardError
    from dsv4_core.files import forms, reading, tokenizers

FOLDER = Path(tempfile.mkdtemp())
FILE = FOLDER / "config.json"
READERS = {
    "shard": lambda: Shard(FILE).entries,
    "config": lambda: ModelConfig.load(FOLDER),
    "index": lambda: reading.json_file(FILE, forms.Index, "advice"),
    "converted": lambda: reading.json_file(FILE, forms.Converted, "advice"),
    "toml": lambda: reading.toml_file(FILE, forms.Toml, "advice"),
    "npy": lambda: reading.integers(FILE, "advice"),
    "tokenizer": lambda: tokenizers.safe(FILE),
}


def one(data: bytes) -> None:
    """Read one input; anything but a refusal without control characters is an error."""
    FILE.write_bytes(data)
    try:
        READER()
    except (reading.FileError, ShardError, ConfigError) as error:
        if any(ord(c) < 32 and c != "\n" for c in str(error)):
            raise AssertionError(f"control characters in {error!r}") from error


if __name__ == "__main__":
    READER = READERS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
