"""Starting ranks: one set of processes a world size runs many jobs, whose results the tests
share.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from dsv4_conformance.model import golden

from dsv4_core.checkpoint import create
from dsv4_core.checkpoint.config import PRESETS

dist = pytest.importorskip("torch.distributed")
HERE = Path(__file__).parent
FACTORINGS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}
SIMULATED = {(4, 1): "910C", (2, 2): "910B", (1, 4): "950"}
"""Chips of Ascend whose ops four ranks run, simulated."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, ranks: int, port: int, host: str = "127.0.0.1", **more: str) -> dict[str, str]:
    """What torchrun would set, without torchrun."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": host, "MASTER_PORT": port}
    return (
        kept
        | {k: str(v) for k, v in mine.items()}
        | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        | {"DSV4_STORE_KEY": "a secret of these tests"}
        | more
    )


def wide_checkpoint(path: Path) -> Path:
    """Write a model large enough that output projection and shared expert are cut between 4 ranks,
    not gathered or left to one.
    """
    config = replace(PRESETS["tiny"], compress_ratios=(0, 4, 128, 0), num_hidden_layers=3, max_position_embeddings=512)
    config = replace(
        config, num_attention_heads=4, o_groups=4, o_lora_rank=128, moe_intermediate_size=512, vocab_size=512
    )
    create.create(path, config, seed=7)
    return path


def jobs_of(ranks: int, wide: Path) -> list[dict]:
    jobs = []
    for tp, ep in FACTORINGS[ranks]:

        def add(
            model, backend="reference", numerics="float64", *, variant="", batch=3, text=0, tp=tp, ep=ep, stalls=False, **options
        ):  # fmt: skip
            path = wide if model == "wide" else golden.checkpoint_path(model)
            rng = np.random.default_rng(batch)  # the same for every split, so that one rank computes it once
            size = 251 if model == "tiny-flash" or variant == "odd" else 512
            jobs.append(
                {
                    "name": f"{model}-{backend}-{numerics}-{variant or 'whole'}-{batch}-tp{tp}-ep{ep}{'-stalls' * stalls}", "stalls": stalls,
                    "options": options, "model": model, "checkpoint": str(path), "backend": backend, "numerics": numerics, "variant": variant,
                    "tp": tp, "ep": ep, "prefill": 133, "chunk": 80, "generate": text,
                    "tokens": rng.integers(2, size, (batch, 135)).tolist(),
                }
            )  # fmt: skip

        add("tiny-pro", text=5)
        add("wide")
        add("tiny-pro", "torch", "float32")
        add("tiny-pro", "reference", "native")
        add("wide", "torch", "native")
        if ep > 1:  # as where a host read waits for a device
            add("tiny-pro", text=5, stalls=True)
            add("tiny-flash", "torch", "native", batch=1, stalls=True)
        if tp < 4:  # two o_groups
            add("tiny-flash", batch=1)  # with ep, some ranks have no token
            add("tiny-flash", variant="odd", batch=2)
            add("tiny-jargon", numerics="float32", text=5)
            add("tiny-jargon", numerics="native", variant="distance")
        if chip := SIMULATED.get((tp, ep)):
            add("wide", "ascend", "native", stalls=ep > 1, simulate=chip)
            if tp < 4:
                add("tiny-jargon", "ascend", "native", variant="distance", simulate=chip)
        add("wide", variant="odd", batch=2)
        add("tiny-pro", variant="one_rank", batch=2)
    return jobs


def run_ranks(ranks: int, jobs: list[dict], folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", folder],
            env=environment(r, ranks, store.port, TORCHELASTIC_USE_AGENT_STORE="True"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(ranks)
    ]
    said = [process.communicate(timeout=570)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)
