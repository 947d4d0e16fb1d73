"""What the planner says against what happens: cache and touched bytes, and peak memory of a process
of its own.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import create
from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.contract.registry import create as create_backend
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step
from dsv4_core.planning.counting import total
from dsv4_core.planning.plan import Graph

MIDDLE = replace(  # layer sizes at which weights and cache outweigh what an interpreter needs
    PRESETS["flash"],
    num_hidden_layers=3,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128, 0),
    hidden_size=2048,
    num_attention_heads=16,
    n_routed_experts=16,
    moe_intermediate_size=1024,
    vocab_size=16384,
)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "middle"
    create(path, MIDDLE, seed=5)
    return path


def touched(checkpoint, experts) -> int:
    """Bytes of the tensors that one token's forward reads: of the embedding a row, and ``experts``
    matrices of experts.
    """
    size = checkpoint.config.hidden_size * 2 + experts * checkpoint.weight("layers.0.ffn.experts.0.w1").nbytes
    for name in checkpoint.names:
        if (
            ".experts." not in name
            and name != "embed.weight"
            and not name.startswith("mtp.")
            and not name.endswith("tid2eid")
        ):
            size += checkpoint.array(name).nbytes
    return size


@pytest.mark.parametrize("where", ["embedded", "middle"])
def test_bytes_touched_by_a_token(where, request):
    """The 256th token: it closes windows of 4 and of 128, and the indexer has rows to choose from,
    so that every kind of weight is read.
    """
    checkpoint = Checkpoint(embedded() if where == "embedded" else request.getfixturevalue("middle"))
    backend, used = create_backend("reference"), []
    plain = backend.expert_linear
    backend.expert_linear = lambda x, w, offsets: (
        used.append(np.count_nonzero(np.diff(offsets))) or plain(x, w, offsets)
    )
    cache = Cache(backend, checkpoint.config, 1, 256)
    cache.lengths[:] = cache.furthest[:] = 255
    model = Model(checkpoint, backend)
    model.logits(model.forward(Step(cache, np.array([[5]]))))
    fmt = checkpoint.weight("layers.0.ffn.experts.0.w1").format
    planned = total(Graph(checkpoint.config, like=backend, expert_format=fmt).step(1, 1, 255)).weights
    assert planned == pytest.approx(touched(checkpoint, sum(used)), rel=0.02)


@pytest.mark.parametrize("numerics", ["native", "float32"])
def test_cache_bytes_exactly(numerics):
    config = Checkpoint(embedded()).config
    real = Cache(create_backend("reference", numerics=numerics), config, 1, config.max_position_embeddings)
    assert Graph(config, numerics=numerics).cache_bytes(config.max_position_embeddings) == real.nbytes


CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.contract.registry import create
from dsv4_core.planning.rehearse import resident
from dsv4_core.graph.step import Step
from dsv4_core.checkpoint.weights import Checkpoint

def run(path, prompt, tokens, capacity):
    checkpoint = Checkpoint(path)
    model = Model(checkpoint, create("reference", weight_cache=0))
    cache = Cache(model.backend, checkpoint.config, 1, capacity)
    for array in [a for layer in cache.layers for a in vars(layer).values() if hasattr(a, "fill")]:
        array.fill(0)  # every page of the cache, as a full one would have
    for n in [prompt] + [1] * tokens:
        step = Step(cache, np.arange(n)[None] % checkpoint.config.vocab_size)
        h = model.forward(step)
        cache.advance(step.sequences, step.ends)
        model.logits(h[n - 1 :])
    return model, cache

run(sys.argv[1], 2, 1, 64)  # libraries, their buffers and the allocator, warm
before = resident()
Path("/proc/self/clear_refs").write_text("5")
kept = run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
print(json.dumps({"before": before, "peak": resident("VmHWM"), "cache": kept[1].nbytes}))
"""


def test_peak_memory_of_a_process(middle, tmp_path):
    """Weights that are touched (after a prompt of 64 all experts are), the cache, and the
    activations of a step.
    """
    prompt, tokens, capacity = 64, 2, 1 << 17
    create(tmp_path / "tiny", PRESETS["tiny"], seed=1)
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(tmp_path / "tiny"),
        str(middle),
        str(prompt),
        str(tokens),
        str(capacity),
    ]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    graph = Graph(MIDDLE, like=create_backend("reference"))
    step = total(graph.step(1, prompt, 0, capacity=capacity))
    planned = step.weights + found["cache"] + graph.planner.peak["activation"]
    assert found["cache"] == Graph(MIDDLE).cache_bytes(capacity)
    assert planned == pytest.approx(found["peak"] - found["before"], rel=0.1)


def test_the_embedded_model_runs_as_many_tokens_as_planned():
    """The planner's step is the one that generation makes: the same ops, as often."""
    checkpoint, calls = Checkpoint(embedded()), []
    backend = create_backend("reference")
    plain = backend.linear
    backend.linear = lambda *args, **scalars: calls.append("linear") or plain(*args, **scalars)
    next(generate(Model(checkpoint, backend), [[1, 2, 3]], max_tokens=2))
    entries = Graph(checkpoint.config, like=backend).step(1, 3, 0)
    assert len(calls) == sum(entry.op == "linear" for entry in entries)
