"""Laws of serving: what one request is told does not depend on the others, on slots, on what a slot
held, or on drafts.

They run the engine on the backend, in the mode that is judged, and compare tokens and
log-probabilities bit by bit with the same request alone in an engine that is new. A schedule is a
list of moves, so that Hypothesis draws and shrinks it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dsv4_conformance.laws.small_model import VOCAB, some_ids, weights
from dsv4_core.graph.cache import SHARED as SHARED_TOKENS
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.engine import Engine, Event, Request
from dsv4_core.graph.sampling import Chosen, Sampling, packed_bits
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_conformance.laws.small_model import Stage
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.graph.model import Model

CAPACITY = 400
SHARED = 300  # tokens that the prompts of a schedule may begin with alike: two marks at which a prefix is kept
WISHES = (  # greedy, by the backend, by the host
    Sampling(),
    Sampling(1.0, 0.9),
    Sampling(1.0, top_k=5, min_p=0.01, frequency_penalty=0.5, bias={3: 1.0}, logprobs=3),
    Sampling(logprobs=2),
)


def asked(prompts: Sequence[int], seed: int) -> list[Request]:
    """Requests with prompts of these lengths; every other one begins as the others do. Sampled in
    turn in each way.
    """
    shared = some_ids((1, SHARED), seed)[0].tolist()
    requests = []
    for i, length in enumerate(prompts):
        own = some_ids((1, max(1, length)), seed + 1 + i)[0].tolist()
        ids = own if i % 2 else [*shared[: max(0, length - 5)], *own[: min(5, max(1, length))]]
        requests.append(Request(tuple(ids), 2 + (i + seed) % 7, replace(WISHES[i % len(WISHES)], seed=i)))
    return requests


def alone(model: Model, request: Request) -> list[Chosen]:
    """What a request is told by an engine that has nothing else to do and nothing to remember."""
    engine = Engine(model, slots=1, capacity=CAPACITY, reuse=False)
    engine.submit(replace(request, draft=False))
    return [event.chosen for event in _rest(engine) if event.chosen]


def _rest(engine: Engine) -> list[Event]:
    events: list[Event] = []
    for _ in range(10000):
        if engine.idle:
            return events
        events += engine.step()
    raise AssertionError("the engine is not idle after 10000 steps")


def _told(events: Sequence[Event], name: int) -> list[Chosen]:
    return [event.chosen for event in events if event.id == name and event.chosen]


def _account(engine: Engine) -> str | None:
    """Slots are free or run a request, and hold no more than they may."""
    stats, lengths = engine.stats, engine.cache.lengths
    if stats.running + stats.free != engine.slots:
        return f"{stats.running} slots in use and {stats.free} free of {engine.slots}"
    if lengths.size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= CAPACITY:
        return f"a slot holds {int(lengths.max())} tokens; it has room for {CAPACITY}"
    return None


def scheduled(model: Model, requests: Sequence[Request], engine: Engine, moves: Sequence[int]) -> str | None:
    """Submit, step and cancel as ``moves`` say (0: step, 1: submit the next, 2: cancel the newest),
    then run to the end.

    Every request that was not cancelled is told what it is told alone, a cancelled one a beginning
    of it.
    """
    expected = [alone(model, request) for request in requests]
    names: list[int] = []
    cancelled: set[int] = set()
    events: list[Event] = []
    for move in moves:
        if move == 1 and len(names) < len(requests):
            names.append(engine.submit(requests[len(names)]))
        elif move == 2 and names:
            cancelled.add(names[-1])
            engine.cancel(names[-1])
        else:
            events += engine.step()
        if problem := _account(engine):
            return problem
    names += [engine.submit(request) for request in requests[len(names) :]]
    events += _rest(engine)
    if problem := _account(engine):
        return problem
    if engine.stats.free != engine.slots:
        return f"{engine.slots - engine.stats.free} slots are not free in the end"
    for i, name in enumerate(names):
        got, want = _told(events, name), expected[i]
        if errors := [event.error for event in events if event.id == name and event.error]:
            return f"request {i}: {errors[0]!r}"
        if got != (want[: len(got)] if name in cancelled else want):
            at = next((j for j, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
            return f"request {i} is told otherwise than alone from its token {at} on: {got[at : at + 1]} for {want[at : at + 1]}"
    return None


def in_company(
    stage: Stage, *, ratios: tuple[int, ...], prompts: list[int], moves: list[int], slots: int, chunk: int, seed: int
) -> str | None:
    """A request is told what it is told alone, whoever comes, goes or is cancelled, whatever its
    slot held before.
    """
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    engine = Engine(model, slots=slots, capacity=CAPACITY, chunk=chunk)
    return scheduled(model, asked(prompts, seed), engine, moves)


def drafts_do_not_show(
    stage: Stage, *, ratios: tuple[int, ...], prompts: list[int], moves: list[int], slots: int, chunk: int, seed: int
) -> str | None:
    """The same with drafts, of which each sequence accepts its own number; sampled requests too."""
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    engine = Engine(model, slots=slots, capacity=CAPACITY, chunk=chunk, drafts=True)
    return scheduled(model, asked(prompts, seed), engine, moves)


def taken_up_is_cold(
    stage: Stage, *, ratios: tuple[int, ...], prefix: int, first: int, own: int, further: int, seed: int
) -> str | None:
    """A prompt that begins as another's, which goes on meanwhile, is told what it is told cold; and
    a prefix is taken up.
    """
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    shared = some_ids((1, prefix), seed)[0].tolist()
    tails = [some_ids((1, n), seed + 1 + i)[0].tolist() for i, n in enumerate((first, own))]
    donor, taker = (Request((*shared, *tail), 30, Sampling(logprobs=2)) for tail in tails)
    engine = Engine(model, slots=2, capacity=CAPACITY, chunk=50)
    events: list[Event] = []
    names = [engine.submit(donor)]
    while engine.stats.generated < 1 + further % 20:
        events += engine.step()
    names.append(engine.submit(taker))
    events += _rest(engine)
    expected = (len(donor.prompt) - 1) // 128 * 128
    if expected <= prefix and expected < len(taker.prompt) and engine.stats.hit_tokens != expected:
        return f"{engine.stats.hit_tokens} tokens were taken up; {expected} could be"
    for name, request, who in zip(names, (donor, taker), ("the donor", "the taker"), strict=True):
        if _told(events, name) != alone(model, request):
            return f"prefix of {prefix}, donor {further % 20} tokens further: {who} is told otherwise than cold"
    return None


def forked_is_cold(
    stage: Stage, *, ratios: tuple[int, ...], blocks: int, junk: int, further: int, seed: int
) -> str | None:
    """A sequence made of a snapshot at a multiple of 128, and of a donor that went on since,
    continues as one that was fed.
    """
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    prefix, tail = SHARED_TOKENS * (1 + blocks % 2), 1 + further % 20
    ids, own = some_ids((1, prefix + tail), seed), some_ids((1, junk + 5), seed + 1)
    cache = Cache(model.backend, model.config, 2, CAPACITY)

    def fed(sequence: int, part: Host) -> Host:
        step = Step(cache, part, [sequence])
        logits = np.array(model.backend.to_numpy(model.logits(model.forward(step))))
        cache.advance(step.sequences, step.ends)
        return logits

    fed(0, ids[:, :prefix])
    taken = cache.snapshot(0)
    fed(0, own[:, :tail])  # the donor goes on, and so does, elsewhere, what the slot held before
    if junk:
        fed(1, own[:, :junk])
    cache.restore(1, taken, donor=0)
    got = fed(1, ids[:, prefix:])
    cache.rewind(0, 0)
    fed(0, ids[:, :prefix])
    want = fed(0, ids[:, prefix:])
    if not np.array_equal(got, want):
        at = int(np.flatnonzero((got != want).any(-1))[0])
        return f"a fork at {prefix} tokens differs from its token {at} on"
    return None


def seed_decides(
    stage: Stage, *, ratios: tuple[int, ...], prompt: int, copies: int, slots: int, seed: int
) -> str | None:
    """A sampled request with a seed says one thing: many times at once, in any slot, among others
    of other seeds.
    """
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    ids = tuple(some_ids((1, prompt), seed)[0].tolist())
    for wish in WISHES[1:3]:
        request = Request(ids, 6, replace(wish, temperature=1.0, seed=(seed, 1)))
        engine = Engine(model, slots=slots, capacity=CAPACITY)
        names, want = [], alone(model, request)
        for i in range(copies):
            engine.submit(replace(request, sampling=replace(request.sampling, seed=(seed, 2 + i))))
            names.append(engine.submit(request))
        events = _rest(engine)
        for name in names:
            if (got := _told(events, name)) != want:
                return f"seed {(seed, 1)} says {[c.token for c in got]} as request {name} and {[c.token for c in want]} alone"
    return None


def nobody_starves(
    stage: Stage, *, ratios: tuple[int, ...], prompts: list[int], slots: int, chunk: int, seed: int
) -> str | None:
    """Requests begin in the order in which they came; who has begun gets a token a step, whatever
    prompts are read meanwhile.

    So each waits no longer than those before it need one after the other.
    """
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    requests = [replace(request, sampling=Sampling()) for request in asked(prompts, seed)]
    engine = Engine(model, slots=slots, capacity=CAPACITY, chunk=chunk, reuse=False)
    names = [engine.submit(request) for request in requests]
    needs = [-(-len(request.prompt) // chunk) + request.max_tokens + 1 for request in requests]
    begun: set[int] = set()
    over: set[int] = set()
    for count in range(1, sum(needs) + 1):
        events = engine.step()
        heard = {event.id for event in events if event.chosen}
        if quiet := begun - over - heard:
            return f"request {min(quiet)} got no token in step {count}"
        begun |= heard
        over |= {event.id for event in events if event.finish}
        late = [i for i, name in enumerate(names) if name not in begun and count > sum(needs[: i + 1])]
        if late:
            return (
                f"request {late[0]} has no token after {count} steps; those up to it need {sum(needs[: late[0] + 1])}"
            )
        if engine.idle:
            break
    return None if len(begun) == len(names) else f"{len(names) - len(begun)} requests never began"


class _Only:
    """Allows some ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.told = set(ids), list[int]()

    def free(self) -> int:
        return 0

    def allowed(self) -> Host:
        return packed_bits(sorted(self.ids), VOCAB)

    def accept(self, token: int) -> None:
        self.told.append(token)


def mask_holds(stage: Stage, *, ratios: tuple[int, ...], prompt: int, allowed: list[int], seed: int) -> str | None:
    """No forbidden token is chosen, greedily or sampled; a mask that allows all changes nothing."""
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    ids = tuple(some_ids((1, prompt), seed)[0].tolist())
    engine = Engine(model, slots=4, capacity=CAPACITY)
    some, everything = sorted({a % VOCAB for a in allowed} or {0}), range(VOCAB)
    wishes = (Sampling(logprobs=1), Sampling(1.0, seed=seed, logprobs=1))
    masks = [_Only(some), _Only(some), _Only(everything), _Only(everything)]
    requests = [Request(ids, 6, wish, constraint=mask) for wish, mask in zip((*wishes, *wishes), masks, strict=True)]
    names = [engine.submit(request) for request in requests]
    events = _rest(engine)
    for name, request, mask in zip(names, requests, masks, strict=True):
        told = _told(events, name)
        if [c.token for c in told] != mask.told:
            return f"the constraint heard {mask.told} of {[c.token for c in told]}"
        if forbidden := {c.token for c in told} - mask.ids:
            return f"token {min(forbidden)} was chosen; allowed were {sorted(mask.ids)}"
        if len(mask.ids) == VOCAB and told != alone(model, replace(request, constraint=None)):
            return "a mask that allows every token changed what was told"
    return None


def refusals_change_nothing(stage: Stage, *, ratios: tuple[int, ...], prompt: int, seed: int) -> str | None:
    """What the engine refuses is an error, and leaves it as it was."""
    model = stage.model(weights(stage.layers(ratios)), stage.own)
    ids = tuple(some_ids((1, prompt), seed)[0].tolist())
    good = Request(ids, 5, Sampling(logprobs=1))
    engine = Engine(model, slots=1, capacity=CAPACITY)
    name = engine.submit(good)
    events = engine.step()
    before = engine.cache.lengths.copy()
    for bad in ((), (VOCAB,), (-1,), ids * (CAPACITY // prompt + 1)):
        try:
            engine.submit(Request(tuple(bad), 5))
        except ValueError:
            continue
        return f"a prompt of {len(bad)} tokens, the first {bad[:1]}, is taken"
    if not np.array_equal(before, engine.cache.lengths):
        return "a refusal changed the cache"
    events += _rest(engine)
    return None if _told(events, name) == alone(model, good) else "a refusal changed what a request is told"
