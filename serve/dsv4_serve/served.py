"""What is served: a model by a name, with its tokenizer, fixed texts and engine."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsv4_core.text.markers import THOUGHT, Piece
from dsv4_serve.grammar import Grammar, Grammars
from dsv4_serve.refusal import RefusedError
from dsv4_serve.thought import Thought

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv4_core.graph.engine import Engine
    from dsv4_core.graph.sampling import Constraint
    from dsv4_core.text.fixed_texts import FixedTexts
    from dsv4_core.text.tokenizer import Vocabulary


@dataclass
class Served:
    """``ends``: ids that end a reply. ``thinking``: whether a request that does not say thinks."""

    name: str
    directory: Path
    engine: Engine
    vocabulary: Vocabulary
    texts: FixedTexts | None
    ends: frozenset[int]
    thinking: bool = True
    started: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def recipe_tokenizer(self) -> Any:
        """The same tokenizer, as DeepSeek's library reads it."""
        import deepseek_recipe

        return deepseek_recipe.Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    @cached_property
    def grammars(self) -> Grammars:
        """The vocabulary, as llguidance reads it."""
        return Grammars((self.directory / "tokenizer.json").read_text(), self.engine.model.config.vocab_size, self.ends)

    def check_model(self, name: Any) -> None:
        """Raise ``RefusedError`` for another model's name."""
        if name != self.name:
            raise RefusedError(f"the model {name!r} is not served here; {self.name!r} is", status=404, param="model")

    def check_length(self, pieces: Sequence[Piece]) -> None:
        """Raise ``RefusedError`` for a prompt that is too long whatever its tokens are; one that
        passes may still be.
        """
        if (least := self.vocabulary.least(pieces)) > self.engine.capacity:
            raise RefusedError(
                f"the maximum context length is {self.engine.capacity} tokens; the prompt has {least} at least: shorten it",
                param="prompt",
            )

    def constraint(self, kind: str | None, schema: str, *, thinking: bool, budget: int | None) -> Constraint | None:
        """What a reply must keep to: a kind of grammar and its schema, a ``budget`` of tokens to
        think with.
        """
        if kind is None and budget is None:
            return None
        kept: Grammar | Thought | None = self.grammars.constraint(kind, schema, thinking=thinking) if kind else None
        if budget is not None:
            [ending] = self.vocabulary.ids([Piece(THOUGHT, control=True)])
            kept = Thought(budget, ending, self.engine.model.config.vocab_size, kept)
        if kept is not None:
            kept.asked = (kind, schema, thinking, budget)
        return kept

    def draw_seed(self) -> int:
        """A seed for a request that names none."""
        return secrets.randbits(53)

    def clock(self) -> int:
        """Now, in seconds since 1970."""
        return int(time.time())
