"""Small random models for the laws: held in memory, on a backend or on the oracle, and how far
rounding can move them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dsv4_conformance.verdict.budget import SAFETY
from dsv4_conformance.verdict.calls import Call, result_dtype
from dsv4_core.checkpoint import create
from dsv4_core.checkpoint.config import PRESETS, ModelConfig
from dsv4_core.checkpoint.layout import QUANTISED, tensor_specs
from dsv4_core.contract import registry
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray, numpy_dtype
from dsv4_core.contract.spec import OPS, Numerics
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCAB = 16  # few enough that a draft is right now and then
TOPK = 8  # compressed rows picked by the indexer: a choice from position 35 on
ALL = 1 << 10  # more picks than rows: nothing is left out


class RandomWeights:
    """A checkpoint that is drawn when it is read, never written."""

    def __init__(self, model: ModelConfig, seed: int = 0) -> None:
        self.config, self.seed = model, seed
        self.specs = tensor_specs(model)

    def array(self, name: str) -> Host:
        """Draw a tensor by its full name."""
        spec = self.specs[name]
        return np.concatenate(list(create.tensor(spec, self.specs, self.config, seed=self.seed))).reshape(spec.shape)

    def weight(self, name: str) -> Host | ScaledArray:
        """Draw ``name.weight``, joined with its scale if it has one."""
        fmt = QUANTISED.get(self.specs[f"{name}.weight"].dtype)
        data = self.array(f"{name}.weight")
        return ScaledArray(data, self.array(f"{name}.scale"), fmt) if fmt else data

    def experts(self, prefix: str, projection: str) -> Experts:
        """Draw one projection of every routed expert."""
        count = self.config.n_routed_experts
        return Experts([self.weight(f"{prefix}.experts.{e}.{projection}") for e in range(count)])


@functools.lru_cache(maxsize=64)
def weights(
    ratios: tuple[int, ...], *, window: int = 16, topk: int = TOPK, positions: int = 4096, dspark: bool = False
) -> RandomWeights:
    """Layers of these compress ratios, as narrow as the formats' blocks allow; the same object each
    time. ``dspark``: with its stages, which read every layer, in place of the MTP block.
    """
    preset = PRESETS["tiny-dspark" if dspark else "tiny"]
    stages = len(preset.compress_ratios) - preset.num_hidden_layers
    reads: dict[str, Any] = {"dspark_target_layer_ids": tuple(range(len(ratios))), "dspark_noise_token_id": VOCAB - 1}
    made = replace(
        preset,
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=len(ratios),
        num_attention_heads=2,
        n_routed_experts=4,
        index_n_heads=2,
        index_topk=topk,
        compress_ratios=(*ratios, *[0] * stages),
        sliding_window=window,
        max_position_embeddings=positions,
        **(reads if dspark else {}),
    )
    return RandomWeights(made)


class OracleBackend(Backend):
    """The oracle as a backend: every required op evaluated in float64, rounded to what the contract
    returns; fused ops are composed.

    ``perturbation``: take the result that the oracle perturbs as the contract allows, with this
    seed, instead of the exact one.
    """

    name = "oracle"

    def __init__(self, *, numerics: Numerics, perturbation: int | None = None) -> None:
        super().__init__(numerics=numerics)
        self.perturbation = perturbation
        self.calls = 0
        self.oracle = registry.oracle(numerics, {})

    def from_numpy(self, array: Host) -> Host:
        """Give the array itself."""
        return array

    def to_numpy(self, array: Any) -> Host:
        """Give the array itself."""
        return cast("Host", array)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate zeros."""
        return np.zeros(shape, numpy_dtype(dtype))

    def evaluate(self, op: str, operands: Sequence[Any], scalars: dict[str, Any]) -> Any:
        """Run one op."""
        self.calls += 1
        perturbed = self.perturbation is not None and "rounded" in OPS[op].judged
        with np.errstate(all="ignore"):
            exact, samples = self.oracle.evaluate(
                op, operands, scalars, samples=int(perturbed), seed=hash((self.perturbation, self.calls)) % 2**32
            )
        result = samples[-1] if perturbed else exact
        call = Call(op, operands, scalars)
        if isinstance(result, tuple):
            return tuple(r.astype(numpy_dtype(result_dtype(call, i, self)), copy=False) for i, r in enumerate(result))
        return None if result is None else result.astype(numpy_dtype(result_dtype(call, 0, self)), copy=False)


def _evaluated(op: str) -> Callable[..., Any]:
    def method(self: OracleBackend, *operands: Any, **scalars: Any) -> Any:
        return self.evaluate(op, operands, scalars)

    return method


for _name, _spec in OPS.items():
    if not _spec.fused:
        setattr(OracleBackend, _name, _evaluated(_name))


def sibling(backend: Backend) -> Backend:
    """The same backend in its most precise mode, where rounding cannot hide an error; itself where
    it is judged in an exact mode, or has no other.
    """
    if backend.numerics != "native":
        return backend
    best: Numerics = next(n for n in ("float64", "float32", "native") if n in backend.numerics_modes)
    if best == backend.numerics:
        return backend
    return type(backend)(numerics=best, **{o.name: getattr(backend, o.name) for o in backend.options})


def new_cache(model: Model, sequences: int, capacity: int, rewindable: int = 8, start: int = 0) -> Cache:
    """A cache whose sequences stand at position ``start``, over rows of zeros."""
    cache = Cache(model.backend, model.config, sequences, capacity, rewindable=rewindable)
    cache.advance(np.arange(sequences), np.full(sequences, start))
    return cache


def feed(model: Model, cache: Cache, ids: Host, counts: Sequence[int] | None = None) -> Host:
    """Run one step; logits [n, S, vocab] on the host."""
    step = Step(cache, ids, counts=counts)
    h = model.forward(step)
    cache.advance(step.sequences, step.ends)
    return np.asarray(model.backend.to_numpy(model.logits(h))).reshape(*ids.shape, -1)


def feed_drafts(model: Model, cache: Cache, ids: Host, following: Host) -> Host:
    """Run one step and the MTP block on the tokens that follow; draft logits [n, S, vocab] on the
    host.
    """
    step = Step(cache, ids)
    h = model.forward(step)
    model.logits(h)  # as in decoding, so that what the heads keep is kept
    drafts = model.mtp(h, model.backend.from_numpy(np.ascontiguousarray(following.reshape(-1), np.int32)), step)
    cache.advance(step.sequences, step.ends)
    return np.asarray(model.backend.to_numpy(model.logits(drafts, mtp=True))).reshape(*ids.shape, -1)


def full(model: Model, ids: Host) -> Host:
    """Logits of one prefill."""
    return feed(model, new_cache(model, len(ids), max(ids.shape[1], 1)), ids)


def some_ids(shape: tuple[int, ...], seed: int) -> Host:
    """Token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def apart(got: Host, want: Host) -> Host:
    """Distance of two vectors relative to the length of the second, per position."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    return np.asarray(
        np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), np.finfo(np.float64).tiny)
    )


@functools.cache
def tolerance(numerics: Numerics, ratios: tuple[int, ...]) -> float:
    """How far apart the logits of two correct runs may lie: as the ops' budgets, from the oracle's
    response to the roundings that the contract allows.

    A model of these layers runs on the oracle, exactly and with every op perturbed; the largest
    distance at any position, times the one safety factor: 6e-14 for one layer in float64. In native
    mode it is the noise that BF16 and FP8 make of one rounding: 0.2 for one layer, and no bound at
    all for three.
    """
    source, ids = weights(ratios), some_ids((1, 150), 0)
    exact = full(Model(source, OracleBackend(numerics=numerics)), ids)
    perturbed = [full(Model(source, OracleBackend(numerics=numerics, perturbation=i)), ids) for i in range(3)]
    return SAFETY * float(max(apart(p, exact).max() for p in perturbed))


@dataclass
class Stage:
    """Where laws are tried: ``own``, the backend as it is judged, and ``exact``, the same in its
    most precise mode.
    """

    own: Backend
    exact: Backend

    def __post_init__(self) -> None:
        self._models: dict[tuple[Backend, RandomWeights], Model] = {}

    @classmethod
    def of(cls, backend: Backend) -> Stage:
        """The stage of a backend."""
        return cls(backend, sibling(backend))

    @property
    def noisy(self) -> bool:
        """The backend has no exact mode: models have one layer, and bounds are those of BF16
        noise.
        """
        return self.exact.numerics == "native"

    def layers(self, ratios: Sequence[int]) -> tuple[int, ...]:
        """The layers that a law is tried with: the last one alone where noise allows no more."""
        return tuple(ratios[-1:] if self.noisy else ratios)

    def tolerance(self, ratios: Sequence[int]) -> float:
        """Of the precise mode."""
        return tolerance(self.exact.numerics, self.layers(ratios))

    def model(self, source: RandomWeights, backend: Backend | None = None) -> Model:
        """A random model on a backend (else the precise one), loaded once."""
        key = (backend or self.exact, source)
        if key not in self._models:
            self._models[key] = Model(source, key[0])
        return self._models[key]

    @functools.cached_property
    def oracle(self) -> OracleBackend:
        """The oracle in the precise mode."""
        return OracleBackend(numerics=self.exact.numerics)
