"""The front door: a checkpoint, a backend and a tokenizer as one object.

>>> import dsv4_core as dsv4
>>> with dsv4.load(backend="reference") as model:
...     words = [event.text for event in model.generate("What is kludge?", max_tokens=8)]
...     logits = model.logits([0, 3, 327])
>>> logits.shape
(3, 2048)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from dsv4_core.checkpoint.locate import find_drafter, find_model
from dsv4_core.contract import registry
from dsv4_core.contract.backend import Backend
from dsv4_core.generation import Event, Finish, Generation
from dsv4_core.graph.engine import CHUNK
from dsv4_core.graph.evaluate import every_logits
from dsv4_core.graph.model import Model
from dsv4_core.graph.sampling import Sampling
from dsv4_core.graph.step import check_ids
from dsv4_core.planning.support import check_support, expert_format
from dsv4_core.ranks.team import Team, own_directory, team
from dsv4_core.text.chat import encode
from dsv4_core.text.defaults import defaults
from dsv4_core.text.fixed_texts import fixed_texts
from dsv4_core.text.markers import Piece
from dsv4_core.text.stopping import StopTexts
from dsv4_core.text.tokenizer import Vocabulary, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tokenizers import Tokenizer
    from typing_extensions import Self

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Numerics
    from dsv4_core.text.chat import Message

__all__ = ["Event", "Finish", "Generation", "Progress", "Prompt", "Sampling", "Session", "load"]

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"
"""A text as it stands, token ids, or the turns of a conversation."""
Progress: TypeAlias = "Callable[[str, int, int], None]"
"""Called as ``progress(what, done, of)`` while weights load and a prompt is read."""


def load(
    model: str | Path | None = None,
    *,
    drafter: str | Path | None = None,
    backend: str | Backend | None = None,
    numerics: Numerics = "native",
    tp: int = 1,
    ep: int = 1,
    lazy: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Session:
    """Open a model and load its weights.

    ``model``: a directory with config.json and safetensors shards, ``OWNER/NAME`` of a model in the
    local hub cache, or None for the small one that ships with the package. ``drafter``: a directory
    whose MTP block or DSpark drafts for it, in place of its own. ``backend``: a name (`dsv4
    backends` lists them), a ``Backend``, or None: DSV4_BACKEND, dsv4.toml, else what is here.
    ``options``: the backend's own, e.g. ``device="cuda:0"``. ``tp``, ``ep``: this process is one of
    ``tp * ep`` that were started together. ``lazy``: weights load when they are first needed, and
    what is wrong with a request is said before.

    Raises ``ValueError`` where there is no such model, ``CheckpointError`` where something is wrong
    with it, ``BackendError`` where the backend is unknown, cannot start or lacks an op that the
    model needs; all before weights load.
    """
    if isinstance(backend, Backend):
        if options or numerics not in {"native", backend.numerics}:
            raise ValueError("load: a Backend that is made already has its numerics and options; leave them out")
        made = backend
        session = open_session(model, lambda _: made, drafter=drafter, tp=tp, ep=ep, progress=progress)
    else:
        name = registry.choose(backend).name
        session = open_session(
            model,
            lambda local_rank: create_backend(name, numerics, options, local_rank),
            drafter=drafter,
            tp=tp,
            ep=ep,
            progress=progress,
        )
    if not lazy:
        session.load_weights()
    return session


def open_session(
    model: str | Path | None,
    create: Callable[[int | None], Backend],
    *,
    drafter: str | Path | None = None,
    tp: int = 1,
    ep: int = 1,
    progress: Progress | None = None,
) -> Session:
    """Open a model on the backend that ``create`` makes (for the n-th rank of this machine); no
    weight is read yet.
    """
    directory, drafts = own_directory(find_model(model)), find_drafter(drafter)
    with ExitStack() as stack:
        ranks = stack.enter_context(team(create, tp, ep))
        backend = ranks.ranks.backend if ranks.ranks else create(None)
        session = Session(directory, backend, ranks, drafter=drafts, progress=progress)
        session.closing = stack.pop_all()
    return session


def create_backend(name: str, numerics: Numerics, options: Mapping[str, Any], local_rank: int | None = None) -> Backend:
    """Construct a backend; as one of several ranks of a machine on the device of that number, where
    the backend has devices and none is named in full.
    """
    options = dict(options)
    if local_rank is not None:
        defaults = {option.name: option.default for option in registry.backend_class(name).options}
        device = options.get("device", defaults.get("device"))
        if device in {"cuda", "npu", "xpu"}:
            options["device"] = f"{device}:{local_rank}"
    return registry.create(name, numerics=numerics, **options)


class PromptError(ValueError):
    """A prompt that cannot be continued: its ``index`` among those given, and what is ``said`` of
    it.
    """

    def __init__(self, index: int, count: int, said: str) -> None:
        """``count``: how many prompts were given; of one the message gives no number."""
        super().__init__(f"prompt {index}: {said}" if count > 1 else said)
        self.index, self.said = index, said


class Session:
    """A model that is open on a backend. ``load`` makes one; leaving its ``with`` block, or
    ``close``, gives it up.

    ``directory``: where it was found. ``config``: its configuration. ``backend``: what it runs on.
    ``tokenizer``: a ``tokenizers.Tokenizer``, or None where the checkpoint has none. ``defaults``:
    what its generation_config.json asks for.
    """

    def __init__(
        self,
        directory: Path,
        backend: Backend,
        ranks: Team | None = None,
        *,
        drafter: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Read headers and ask the backend for every op; no weight is read yet."""
        self.directory, self.backend, self.ranks = directory, backend, ranks or Team()
        self.checkpoint = self.ranks.open(directory, drafter)
        self.config: ModelConfig = self.checkpoint.config
        self.closing = ExitStack()
        self._progress = progress
        if self.ranks.place.ranks > 1:
            self.ranks.place.check(self.config)
        check_support(self.config, backend, expert_format(self.checkpoint), self.ranks.place)
        self.tokenizer: Tokenizer | None = load_tokenizer(directory)
        self.defaults = defaults(directory, self.config)

    @cached_property
    def model(self) -> Model:
        """The graph with its weights, loaded when this is first asked for; what drafts is not,
        before ``load_drafter``.
        """
        source, parallel = self.ranks.share(self.checkpoint)
        return Model(source, self.backend, parallel=parallel, draft=False, progress=self._reporter("loading"))

    @property
    def most_drafts(self) -> int:
        """Tokens a step that what drafts in this checkpoint proposes at most: 0, MTP's one, or a
        block of DSpark's.
        """
        return {"": 0, "mtp": 1, "dspark": self.config.dspark_block_size}[self.config.draft]

    def load_drafter(self) -> int:
        """Load what drafts, if that has not been done; give ``most_drafts``. Raises ``ValueError``
        where nothing drafts.
        """
        if not self.most_drafts:
            raise ValueError(
                f"{self.directory} has no MTP block and no DSpark drafter, so that nothing proposes tokens: "
                "leave --speculative out"
            )
        self.model.load_drafter()
        return self.most_drafts

    def load_weights(self) -> None:
        """Load the weights, if that has not been done; after an error the other ranks, if there are
        any, are told.
        """
        with ExitStack() as stack:
            stack.push(self.__exit__)
            self.model  # noqa: B018  loads them
            stack.pop_all()

    @property
    def speaks(self) -> bool:
        """Whether this process prints results: of several ranks the first one."""
        return self.ranks.speaks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part from other ranks, if there are any; they are told of an error."""
        self.__dict__.pop("model", None)
        self.closing.__exit__(kind, error, trace)

    def close(self) -> None:
        """Give up the weights and part from other ranks."""
        self.__exit__(None, None, None)

    def generate(
        self,
        prompt: str | Sequence[Any],
        *,
        max_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        ignore_eos: bool = False,
        thinking: bool = False,
        speculative: bool | int = False,
        draft_confidence: float = 0.0,
        chunk: int = CHUNK,
    ) -> Generation:
        """Continue one prompt or several, which run as one batch; give the new tokens as they come.

        ``prompt``: a text (a control token that it spells is words), token ids, turns of a
        conversation (``[{"role": "user", "content": ...}]``), or a list of such prompts.
        ``temperature`` 0 is greedy, and so is None where the checkpoint's generation_config.json
        asks for no other; else each sequence draws by ``seed`` and its own number, among the tokens
        that ``top_k`` (0: off), ``top_p`` (None: as that file asks, else 1) and ``min_p`` leave.
        ``stop``: texts that end a sequence, and are not given out. ``stop_tokens``: ids that do,
        beside end-of-sentence (not with ``ignore_eos``). ``thinking``: of conversations, let the
        model think first. ``speculative``: how many tokens a step the MTP block or DSpark drafts
        (True: as many as it can); the tokens are the same. ``draft_confidence``: DSpark's drafts
        end where the chance that all of them are kept falls below it. ``chunk``: tokens of a
        prefill step.

        Raises ``ValueError`` before anything runs: for an empty prompt, an id outside the
        vocabulary, more tokens than the model has positions, or a text where there is no tokenizer.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens = {max_tokens} must be 1 or more")
        prompts = self._encoded(prompts_of(prompt), thinking=thinking)
        wanted = self.defaults
        sampling = Sampling(
            wanted.temperature if temperature is None else temperature,
            wanted.top_p if top_p is None else top_p,
            seed,
            top_k,
            min_p,
        )
        for i, ids in enumerate(prompts):
            if said := self._no_room(len(ids), max_tokens):
                raise PromptError(i, len(prompts), said)
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        StopTexts(texts)
        if texts and self.tokenizer is None:
            raise ValueError(
                "stop: this checkpoint has no tokenizer.json, so there is no text; use stop_tokens with ids"
            )
        check_ids(np.asarray(stop_tokens, np.int64).reshape(-1), self.config.vocab_size)
        most = self.most_drafts
        count = most if speculative is True else int(speculative)
        if speculative and not most:
            raise ValueError("speculative decoding drafts by an MTP block or DSpark, and this checkpoint has neither")
        if not 0 <= count <= most:
            raise ValueError(
                f"speculative = {count}: what drafts in this checkpoint proposes 1 to {most} tokens a step"
            )
        if not 0 <= draft_confidence < 1:
            raise ValueError(f"draft_confidence = {draft_confidence} must be in [0, 1)")
        if draft_confidence and self.config.draft != "dspark":
            raise ValueError(f"draft_confidence = {draft_confidence}: only DSpark gives one; leave it out")
        ends = {*stop_tokens} if ignore_eos else {*self.defaults.ends, *stop_tokens}
        request = {"prompts": prompts, "max_tokens": max_tokens, "sampling": asdict(sampling), "chunk": chunk}
        request |= {"stop": list(texts), "ends": sorted(ends), "speculative": count, "confidence": draft_confidence}
        self.ranks.agree({"request": request})

        def loaded() -> Model:
            if count:
                self.load_drafter()
            return self.model

        return Generation(
            loaded,
            self.tokenizer,
            prompts,
            max_tokens,
            sampling,
            texts,
            ends,
            drafting=(count, draft_confidence),
            chunk=chunk,
            progress=self._reporter("prefill"),
        )

    def encode(self, prompt: str | Sequence[Any], *, thinking: bool = False) -> list[int]:
        """Give the ids of one prompt; raise ``ValueError`` where there are none, or one is outside
        the vocabulary.
        """
        if not isinstance(prompt, str) and not any(isinstance(one, Mapping) for one in prompt):
            whole = not isinstance(prompt, np.ndarray) and all(type(n) is int for n in prompt)
            array = np.asarray(prompt, object if whole else None)  # an id may be past 64 bits
            if array.ndim != 1 or not array.size:
                raise ValueError("the prompt is empty: give at least one token")
            check_ids(array, self.config.vocab_size)
            return [int(token) for token in array]
        if self.tokenizer is None:
            raise ValueError(
                f"{self.directory} has no tokenizer.json; give --tokens with ids, or copy the tokenizer beside config.json"
            )
        if isinstance(prompt, str):
            pieces = [Piece(prompt)]
        else:
            turns = cast("Sequence[Message]", prompt)
            pieces = encode(turns, thinking=thinking, texts=fixed_texts(self.directory))
        ids = Vocabulary(self.tokenizer).ids(pieces)
        if not ids:
            raise ValueError("the prompt is empty: give at least one token of text")
        return ids

    def _encoded(self, prompts: list[Any], *, thinking: bool) -> list[list[int]]:
        """Encode prompts; of several the error names the one."""
        encoded: list[list[int]] = []
        try:
            for prompt in prompts:
                encoded.append(self.encode(prompt, thinking=thinking))  # noqa: PERF401  the error says how many are done
        except ValueError as error:
            raise PromptError(len(encoded), len(prompts), f"{error}") from None
        return encoded

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | Host, *, chunk: int = CHUNK) -> Host:
        """Give the logits after every token of ``ids`` [total] or [batch, total]: [..., total,
        vocab], float32 (float64).

        Raises ``ValueError`` for an id outside the vocabulary or more tokens than the model has
        positions.
        """
        tokens = np.asarray(ids)
        if tokens.ndim not in {1, 2} or not tokens.size:
            raise ValueError(f"logits: ids of shape {list(tokens.shape)} must be [total] or [batch, total], not empty")
        check_ids(tokens, self.config.vocab_size)
        if said := self._no_room(tokens.shape[-1], 0):
            raise ValueError(said)
        found = every_logits(self.model, np.atleast_2d(tokens), chunk=chunk, progress=self._reporter("tokens"))
        return found if tokens.ndim == 2 else found[0]

    def _no_room(self, length: int, more: int) -> str:
        """Why a prompt of so many tokens and ``more`` to generate do not fit; "" where they do."""
        limit = self.config.max_position_embeddings
        if length + more <= limit:
            return ""
        asked = f" and max_tokens = {more}" if more else ""
        advice = f"ask for at most {limit - length}" if length < limit and more else "shorten it"
        return f"the prompt has {length} tokens{asked}; the model has {limit} positions (max_position_embeddings of config.json): {advice}"

    def _reporter(self, what: str) -> Callable[[int, int], None] | None:
        told = self._progress
        return (lambda done, of: told(what, done, of)) if told else None


def prompts_of(prompt: str | Sequence[Any]) -> list[Any]:
    """Tell one prompt (text, ids, turns) from a list of them; give the list. Raises ``ValueError``
    where there is none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not len(prompt):
        raise ValueError("no prompt: give a text, token ids, or the turns of a conversation")
    is_one = all(isinstance(item, Mapping) for item in prompt) or all(np.ndim(item) == 0 for item in prompt)
    if is_one and not any(isinstance(item, str) for item in prompt):
        return [prompt]
    return list(prompt)
