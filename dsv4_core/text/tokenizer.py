"""Text and control tokens to ids and back, where the checkpoint has a tokenizer.json."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from dsv4_core.files import tokenizers
from dsv4_core.files.words import one_line
from dsv4_core.text.markers import Piece, joined

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer


def load_tokenizer(model_dir: Path) -> Tokenizer | None:
    """Read ``model_dir/tokenizer.json``; None where there is none; raise ``ValueError`` where it
    cannot be read.
    """
    from tokenizers import Tokenizer

    path = model_dir / "tokenizer.json"
    if not path.exists():
        return None
    safe = tokenizers.safe(path)
    try:
        return Tokenizer.from_str(safe)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  the library raises bare Exception, and panics beside it
        said = one_line(str(error))
        raise ValueError(
            f"{path}: not a tokenizer that the tokenizers library reads ({said}); copy it again or use token ids"
        ) from None


class Vocabulary:
    """A checkpoint's tokenizer. Words and control tokens are told apart: text that spells a control
    token is words.

    ``control``: the added tokens by id. ``full`` is the tokenizer as it was read; only trusted text
    is given to it.
    """

    def __init__(self, full: Tokenizer) -> None:
        from tokenizers import Tokenizer

        self.full = full
        self.control = {token: added.content for token, added in full.get_added_tokens_decoder().items()}
        self._plain = Tokenizer(full.model)  # the same model, without the added tokens
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        if full.pre_tokenizer is not None:
            self._plain.pre_tokenizer = full.pre_tokenizer

    def words(self, text: str) -> list[int]:
        """Encode text, none of which is a control token.

        Raises ``ValueError`` where the tokenizer has no token for it, or gives a control token
        after all.
        """
        ids = self._encoded(self._plain, text)
        if found := next((token for token in ids if token in self.control), None):
            raise ValueError(
                f"{self.control[found]!r} in a text would become a control token with this tokenizer; leave it out"
            )
        return ids

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token; where tokens are of bytes, each of them is written as
        one character.
        """
        return max(map(len, self._plain.get_vocab(with_added_tokens=False)), default=1)

    def least(self, pieces: Iterable[Piece]) -> int:
        """How many tokens these are at least, told by their length alone: encoding a text of
        megabytes takes minutes.

        0 with a tokenizer that rewrites its text, which may make it shorter.
        """
        if str(self.full.normalizer) not in {"None", "Sequence(normalizers=[])"}:
            return 0
        return sum(1 if piece.control else -(-len(piece.text) // self._longest) for piece in pieces)

    def ids(self, pieces: Iterable[Piece]) -> list[int]:
        """Encode words and control tokens; raise ``ValueError`` for a control token that the
        tokenizer lacks.
        """
        ids: list[int] = []
        for piece in joined(pieces):
            if not piece.control:
                ids += self.words(piece.text)
                continue
            token = self.full.token_to_id(piece.text)
            if token is None or token not in self.control:
                raise ValueError(
                    f"the tokenizer has no control token {piece.text!r}; the chat format needs it: copy the checkpoint's tokenizer.json again"
                )
            ids.append(token)
        return ids

    def marked(self, text: str) -> list[int]:
        """Encode trusted text, in which a control token that is spelt is one."""
        return self._encoded(self.full, text)

    @staticmethod
    def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  the library raises bare Exception, and panics beside it
            raise ValueError(f"text that the tokenizer cannot encode: {text[:40]!r} ({one_line(str(error))})") from None
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Decode ids; control tokens are spelt out."""
        return self.full.decode(ids, skip_special_tokens=False)


class PieceStream:
    """Ids to pieces, as they come: words are given out once their bytes are whole characters."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers.decoders import DecodeStream

        self.vocabulary = vocabulary
        self._new = DecodeStream
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def push(self, token: int) -> list[Piece]:
        """Add a token; give the pieces that are complete now."""
        if token in self.vocabulary.control:
            return [*self.finish(), Piece(self.vocabulary.control[token], control=True)]
        self._held.append(token)
        text = self._stream.step(self.vocabulary.full, token)
        if not text:
            return []
        self._held.clear()
        return [Piece(text)]

    def finish(self) -> list[Piece]:
        """Give what was held back: bytes that are no whole character become U+FFFD."""
        held, self._held = self._held, []
        self._stream = self._new(skip_special_tokens=False)
        return joined([Piece(self.vocabulary.text(held))]) if held else []


class TextStream:
    """Ids to text, as they come: a piece is given out once its bytes are whole characters.

    Control tokens are not shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = PieceStream(Vocabulary(tokenizer))

    def push(self, token: int) -> str:
        """Add a token; give the text that is complete now."""
        return "".join(piece.text for piece in self._pieces.push(token) if not piece.control)
