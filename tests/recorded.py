"""Models over recorded checkpoints, loaded once, and how tests run and compare them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from dsv4_conformance.model import golden

from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from dsv4_core.graph.cache import Cache

RECORDED = ("tiny-flash", "tiny-pro", "tiny-jargon")


@functools.cache
def load_model(name: str, numerics: str, backend: str = "reference") -> Model:
    return Model(Checkpoint(golden.checkpoint_path(name)), registry.create(backend, numerics=numerics))


@functools.cache
def vectors(name: str, kind: str) -> dict[str, np.ndarray]:
    return golden.load(name, kind)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(got) - want) / np.linalg.norm(np.float64(want)))


def feed(model: Model, cache: Cache, ids: np.ndarray, **step_options) -> np.ndarray:
    """Run one step and advance; give logits [n, S, vocab]."""
    step = Step(cache, ids, **step_options)
    h = model.forward(step)
    cache.advance(step.sequences, step.ends)
    return model.backend.to_numpy(model.logits(h)).reshape(*ids.shape, -1)
