"""Text in and out, where the checkpoint has a tokenizer.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer


def load_tokenizer(model_dir: Path) -> Tokenizer | None:
    """Read ``model_dir/tokenizer.json``; None where there is none; raise ``ValueError`` where it cannot be read."""
    from tokenizers import Tokenizer

    path = model_dir / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception
        raise ValueError(
            f"{path}: not a tokenizer that the tokenizers library reads ({error}); copy it again or use token ids"
        ) from None


class TextStream:
    """Ids to text, as they come: a piece is given out once its bytes are whole characters.

    Special tokens are not shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Add a token; give the text that is complete now."""
        return self.stream.step(self.tokenizer, token) or ""
