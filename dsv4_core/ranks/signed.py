"""What ranks say to each other through the store, signed with a secret that they share: words of
strangers are not believed.

The store itself asks nobody who they are. With a secret (DSV4_STORE_KEY, or the file that
``--store-key-file`` names) every value is written with a keyed hash of itself and its key; one that
does not fit was written by somebody without the secret.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_core.files.reading import FileError, contents
from dsv4_core.ranks.watch import RankError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.collectives import Store

VARIABLE, FILE_VARIABLE = "DSV4_STORE_KEY", "DSV4_STORE_KEY_FILE"
SHORTEST, LONGEST = 16, 4096  # bytes of a secret
_DIGITS = 32  # of the hash: 128 bits


def secret() -> bytes:
    """Read the secret: from the file that DSV4_STORE_KEY_FILE names, else from DSV4_STORE_KEY;
    empty where there is none.

    Raises ``ValueError`` for one of under 16 bytes, and for a file that others may read.
    """
    file = Path(os.environ[FILE_VARIABLE]) if os.environ.get(FILE_VARIABLE) else None
    if file is not None:
        if file.stat().st_mode & 0o077:
            raise FileError(f"{file}: others may read it, so it keeps no secret; chmod 600 {file}")
        found, whence = contents(file, LONGEST).strip(), f"{file}"
    else:
        found, whence = os.environ.get(VARIABLE, "").encode(), VARIABLE
    if found and len(found) < SHORTEST:
        raise ValueError(
            f"{whence}: a secret of {len(found)} bytes; give at least {SHORTEST}, e.g. `openssl rand -hex 32`"
        )
    if file is not None and not found:
        raise ValueError(f"{whence}: empty; write a secret of at least {SHORTEST} bytes into it")
    return found


class SignedStore:
    """A store whose values carry a keyed hash; reading one that does not fit raises
    ``RankError``.
    """

    def __init__(self, store: Store, key: bytes) -> None:
        self.store, self.key = store, key

    def set(self, key: str, value: str, /) -> None:
        """Write, signed."""
        self.store.set(key, self._hash(key, value) + value)

    def check(self, keys: list[str], /) -> bool:
        """Say whether all keys have been written, by whomever."""
        return self.store.check(keys)

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        """Read keys that have been written."""
        return [self._held(key, value) for key, value in zip(keys, self.store.multi_get(keys), strict=True)]

    def _hash(self, key: str, value: str) -> str:
        return hmac.new(self.key, f"{key}\0{value}".encode(), "sha256").hexdigest()[:_DIGITS]

    def _held(self, key: str, value: bytes) -> bytes:
        stated, said = value[:_DIGITS], value[_DIGITS:].decode("utf-8", "replace")
        if not hmac.compare_digest(stated, self._hash(key, said).encode()):
            rank = key.rpartition("/")[2]
            raise RankError(
                f"what was written to the ranks' store as rank {rank} is not signed with this rank's secret: rank {rank} was "
                f"started with another {VARIABLE} or --store-key-file, or a stranger writes there"
            )
        return said.encode()
