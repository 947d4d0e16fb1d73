"""Prometheus metrics of one server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from dsv4_core.graph.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts of the engine, copied after each step, and times of requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dsv4_requests", "Requests that ended, by route and status", ["route", "status"], registry=self.registry
        )
        self.first = Histogram(
            "dsv4_time_to_first_token_seconds", "From a request's arrival", buckets=SECONDS, registry=self.registry
        )
        self.between = Histogram(
            "dsv4_time_between_tokens_seconds", "Within a request", buckets=SECONDS, registry=self.registry
        )
        self.step = Histogram("dsv4_step_seconds", "One step of the engine", buckets=SECONDS, registry=self.registry)
        self.rate = Gauge("dsv4_tokens_per_second", "Generated, over the last seconds", registry=self.registry)
        names = {"waiting": "Requests in the queue", "running": "Requests in slots", "free": "Slots that are free"}
        self._now = {n: Gauge(f"dsv4_{n}", text, registry=self.registry) for n, text in names.items()}
        counts = {
            "steps": "Steps of the engine",
            "rows": "Tokens that were fed",
            "prompt_tokens": "Tokens of prompts",
            "hit_tokens": "Of them, not computed again",
            "generated": "Tokens generated",
            "drafted": "Drafts proposed",
            "accepted": "Drafts accepted",
        }
        self._counts = {n: Counter(f"dsv4_{n}", text, registry=self.registry) for n, text in counts.items()}
        self._seen = dict.fromkeys(counts, 0)
        self._window = (time.monotonic(), 0)

    def observe(self, engine: Engine, seconds: float) -> None:
        """Take over the engine's counts after a step."""
        self.step.observe(seconds)
        self.copy(engine)

    def copy(self, engine: Engine) -> None:
        """Take over the engine's counts."""
        stats = engine.stats
        for name, gauge in self._now.items():
            gauge.set(getattr(stats, name))
        for name, counter in self._counts.items():
            value = getattr(stats, name)
            counter.inc(value - self._seen[name])
            self._seen[name] = value
        now, (then, before) = time.monotonic(), self._window
        if now - then >= 1:
            self.rate.set((stats.generated - before) / (now - then))
            self._window = (now, stats.generated)

    def text(self) -> bytes:
        """All of them in Prometheus' form."""
        return generate_latest(self.registry)
