"""What the reference says of the embedded checkpoint: stored float64 logits, and how far its native
mode lies from them.

    python -m dsv4_conformance.model.stored_logits --backend NAME     writes
    ``data/native/tiny-jargon.safetensors.xz`` again

``exact`` [2, 160, vocab] F16 holds multiples of 1/32: float64 logits of positions 160 .. 319 of
both recorded prompts, rounded. Native noise is 0.3 per logit, so that the rounding (0.009) adds a
two-thousandth to a distance, the backend's and the reference's alike. ``kl`` and ``l2`` [2, 160]
F32: the native mode's distances, the mean over ``CHUNKINGS`` of the same text, because the distance
of one run is itself a matter of chance (a tenth in KL). ``w8a8_int8_kl`` and ``w8a8_int8_l2``, in a
file of their own: the same of the checkpoint as `dsv4 convert --to w8a8-int8` makes it.
"""

from __future__ import annotations

import functools
import lzma
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4_conformance.files import tensorfile
from dsv4_conformance.model import golden
from dsv4_core.files import writing
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.graph.model import Model

FILE = Path(__file__).parent.parent / "data" / "native" / "tiny-jargon.safetensors.xz"
INT8_FILE = FILE.with_name("tiny-jargon-w8a8-int8.safetensors.xz")
FIRST = 160  # of the positions that are judged: every kind of layer has rows by then
UNIT = 1 / 32
CHUNKINGS = (
    (300, *[1] * 20),
    (320,),
    (160, 160),
    (100, 100, 100, 20),
    (64,) * 5,
    (128, 128, 64),
    (37,) * 8 + (24,),
    (250, 70),
)


def teacher_forced(model: Model, chunks: Sequence[int]) -> Host:
    """Logits [2, 320, vocab] of the recorded prompts, fed in chunks."""
    ids = golden.load("tiny-jargon", "golden")["prompt"]
    cache, parts, begin = Cache(model.backend, model.config, len(ids), ids.shape[1], rewindable=0), [], 0
    for n in chunks:
        step = Step(cache, ids[:, begin : begin + n])
        h = model.forward(step)
        cache.advance(step.sequences, step.ends)
        parts.append(np.asarray(model.backend.to_numpy(model.logits(h))).reshape(len(ids), n, -1))
        begin += n
    return np.concatenate(parts, axis=1)


def distances(logits: Host, exact: Host) -> tuple[Host, Host]:
    """Per position: KL of the next-token distribution from the exact one, and relative L2 of the
    logits.
    """
    x, y = logits.astype(np.float64), exact.astype(np.float64)
    log_q, log_p = (z - np.logaddexp.reduce(z, -1, keepdims=True) for z in (x, y))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1), np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)


@functools.cache
def load() -> dict[str, Host]:
    """Read the stored tensors by name, read-only."""
    return {
        name: array
        for file in (FILE, INT8_FILE)
        for name, array in tensorfile.decode(lzma.decompress(file.read_bytes())).items()
    }


def rounded(logits: Host) -> Host:
    """Logits of the judged positions as they are stored."""
    return (np.rint(logits[:, FIRST:].astype(np.float64) / UNIT) * UNIT).astype(np.float16)


def main(backend: str) -> None:
    """Compute and write."""
    import tempfile

    from dsv4_core.checkpoint.convert import Options, convert
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.contract import registry
    from dsv4_core.graph.model import Model

    checkpoint = Checkpoint(golden.checkpoint_path("tiny-jargon"))
    exact = rounded(teacher_forced(Model(checkpoint, registry.create(backend, numerics="float64")), CHUNKINGS[0]))
    FILE.parent.mkdir(exist_ok=True)
    write(FILE, backend, checkpoint, exact, "", {"exact": exact})
    with tempfile.TemporaryDirectory() as folder:
        convert(checkpoint.path, Path(folder) / "w8a8", Options(int8=True))
        write(INT8_FILE, backend, Checkpoint(Path(folder) / "w8a8"), exact, "w8a8_int8_", {})


def write(file: Path, backend: str, checkpoint: Checkpoint, exact: Host, prefix: str, others: dict[str, Host]) -> None:
    """Measure the native mode's distances on a checkpoint and store them."""
    from dsv4_core.contract import registry
    from dsv4_core.graph.model import Model

    native = Model(checkpoint, registry.create(backend, numerics="native"))
    runs = [distances(teacher_forced(native, chunks)[:, FIRST:], exact) for chunks in CHUNKINGS]
    kl, l2 = (np.mean([r[i] for r in runs], axis=0).astype(np.float32) for i in range(2))
    data = lzma.compress(tensorfile.encode({**others, f"{prefix}kl": kl, f"{prefix}l2": l2}), preset=9)
    writing.write(file, data)
    print(f"{file}: {len(data)} bytes, KL {kl.mean():.4f}, L2 {l2.mean():.4f}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Write the stored logits again.")
    parser.add_argument("--backend", required=True)
    main(parser.parse_args().backend)
