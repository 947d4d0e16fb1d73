"""A decode step as a tape of C kernels: all of it, the same bits, nothing stale, and what happens
where PyTorch is needed.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import TorchBackend, kept  # noqa: E402
from dsv4_backend_torch.tape import Recorded  # noqa: E402
from dsv4_conformance.laws.small_model import feed, new_cache, some_ids, weights  # noqa: E402

from dsv4_core.graph.model import Model  # noqa: E402
from dsv4_core.graph.replay import Replay  # noqa: E402
from dsv4_core.graph.step import Step  # noqa: E402

try:
    kept.library()
except kept.NotCompiledError as error:
    pytest.skip(str(error), allow_module_level=True)


def stage(numerics="native", prompt=20, **options):
    model = Model(weights((0, 4, 128)), TorchBackend(numerics=numerics, **options))
    cache = new_cache(model, 3, 400)
    feed(model, cache, some_ids((3, prompt), 0))
    return model, cache, Replay(model, cache)


def step(cache, sequences, token=3, seq=1):
    return Step(cache, np.full((len(sequences), seq), token), sequences=list(sequences))


def recordings(replay):
    return [r for r in replay._recorded.values() if r is not None]


@pytest.mark.parametrize("numerics", ["native", "float32"])
@pytest.mark.parametrize(("sequences", "seq"), [([0], 1), ([2, 0, 1], 1), ([1], 2), ([0, 2], 3)])
def test_a_step_of_a_few_tokens_is_all_on_the_tape(numerics, sequences, seq):
    model, cache, replay = stage(numerics)
    for token in range(4):
        at = step(cache, sequences, token, seq)
        got = replay.logits(at).clone()
        assert torch.equal(got, model.logits(model.forward(step(cache, sequences, token, seq))))
        cache.advance(at.sequences, at.ends)
    (recorded,) = recordings(replay)
    assert isinstance(recorded, Recorded)
    assert recorded.why == ""
    assert len(recorded._tape) > 100


def test_each_kernel_of_a_tape_is_timed_alone_and_leaves_the_step_as_it_was():
    _, cache, replay = stage()
    for token in range(3):
        at = step(cache, [0, 1], token)
        got = replay.logits(at).clone()
        if token < 2:
            cache.advance(at.sequences, at.ends)
    (recorded,) = recordings(replay)
    timed = recorded.timed(2)
    assert len(timed) == len(recorded._tape)
    assert {"gemv", "moe", "sparse_attn", "compress"} <= {name for name, _ in timed}
    assert all(0 < seconds < 60 for _, seconds in timed)
    assert torch.equal(replay.logits(at), got)


def test_a_context_grows_over_every_window_and_bucket():
    """Replayed over 300 tokens, the same bits as run: windows of 4 and 128 close, extents double,
    the ring goes round.
    """
    model, cache, replay = stage(prompt=90)
    other = new_cache(model, 3, 400)
    feed(model, other, some_ids((3, 90), 0))
    for token in range(300):
        a, b = step(cache, [1], token % 16), step(other, [1], token % 16)
        assert torch.equal(replay.logits(a), model.logits(model.forward(b))), token
        for each, at in ((cache, a), (other, b)):
            each.advance(at.sequences, at.ends)
    assert 0 < len(recordings(replay)) < 4
    assert [r.why for r in recordings(replay)] == [""] * len(recordings(replay))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            _, cache, replay = stage()
            for _ in range(3):
                logits = replay.logits(step(cache, [0, 1])).clone()
            found.append(logits)
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


def test_what_a_kernel_leaves_to_pytorch_is_run_by_it():
    """A value that is not finite ends the tape: the step is run again, and gives what PyTorch
    gives.
    """
    model, cache, replay = stage()
    for _ in range(3):
        replay.logits(step(cache, [0]))
    with torch.inference_mode():
        model.embed[3] = torch.nan
    got = replay.logits(step(cache, [0]))
    assert got.isnan().all()
    with torch.inference_mode():
        model.embed[3] = 0.25
    assert torch.equal(replay.logits(step(cache, [0])), model.logits(model.forward(step(cache, [0]))))


@pytest.mark.parametrize("options", [{"few_tokens_by": "torch"}, {"numerics": "float64"}], ids=str)
def test_without_kernels_a_step_is_run(options):
    model, cache, replay = stage(**options)
    for _ in range(3):
        assert torch.equal(replay.logits(step(cache, [0])), model.logits(model.forward(step(cache, [0]))))
    assert not any(isinstance(r, Recorded) for r in recordings(replay))


def test_a_step_that_pytorch_computes_in_part_is_run_each_time():
    model, cache, replay = stage()
    backend, right = model.backend, model.backend.hadamard
    backend.hadamard = lambda x: right(x + 0)
    for _ in range(4):
        assert torch.equal(replay.logits(step(cache, [0])), model.logits(model.forward(step(cache, [0]))))
    assert [r.why for r in recordings(replay)] == ["add"]


def test_what_a_tape_has_addresses_of_lives_as_long_as_it():
    backend = TorchBackend()
    tables = [torch.arange(64.0).reshape(16, 4)]
    recorded = backend.record(lambda ids: backend.embedding(ids, tables[0]))
    recorded(np.array([3], np.int32))
    tables.clear()
    for _ in range(50):
        torch.full((16, 4), 7.0)
    assert recorded(np.array([5], np.int32)).tolist() == [[20.0, 21.0, 22.0, 23.0]]


def test_other_shapes_and_dtypes_are_refused():
    backend = TorchBackend()
    table = torch.arange(64.0).reshape(16, 4)
    recorded = backend.record(lambda ids: backend.embedding(ids, table))
    recorded(np.array([3], np.int32))
    for other in (np.array([3.0], np.float32), np.array([3, 4], np.int32), np.array([[3]], np.int32)):
        with pytest.raises(ValueError, match=r"recorded with int32\[1\], not "):
            recorded(other)
