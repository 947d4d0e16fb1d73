"""Inside vLLM and by itself dsv4 gives the same: tokens and log-probabilities, bit by bit, in
batch-invariant mode.

    python prove.py [--model DIR] [--prompts 32] [--longest 600] [--at-once 8] [--report FILE] [PART
    ...]

Run it in an environment that ``environment.sh`` made. Each part runs in a process of its own:
``company`` (prompts of many lengths arrive while others run, every fifth is given up and asked
again), ``shared`` (prefix caching: prompts that begin alike), ``preempted`` (short prompts that
grow, with so few blocks that vLLM must take some back), ``drafted`` (speculation), ``ranks`` (two
processes), ``vendor`` (a third party's backend), ``refused``, ``served`` (vLLM's OpenAI server,
asked by the openai client) and ``overhead`` (a step inside vLLM against one of dsv4's engine). Exit
status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
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
PARTS = ("company", "shared", "preempted", "drafted", "ranks", "vendor", "refused", "served", "overhead")
RECORDED = ("company", "shared", "preempted", "drafted")
"""Parts that a model without a tokenizer, whose weights are random, is run through, too."""
Told = list[tuple[int, float]]
"""Of one request: tokens and their log-probabilities, float32."""
HOW: dict[str, dict[str, Any]] = {
    "reference": {"options": {"batch_invariant": True}},
    "torch": {},
    "derived": {"numerics": "float32"},  # not batch invariant: noise too small for another token
}


def prompts(count: int, longest: int, vocab: int, shortest: int = 1) -> list[list[int]]:
    """Random ids (control tokens left out) of lengths from ``shortest`` to ``longest``, both among
    them.
    """
    rng = np.random.default_rng(0)
    lengths = np.unique(np.geomspace(shortest, longest, count).astype(int)).tolist()
    lengths += rng.integers(shortest, longest + 1, count - len(lengths)).tolist()
    return [rng.integers(10, vocab, length).tolist() for length in lengths]


def alone(model: Path, ids: list[list[int]], tokens: int, backend: str, tp: int = 1) -> list[Told]:
    """What dsv4 gives for each prompt by itself; log-probabilities by the function that vLLM
    uses.
    """
    import torch

    import dsv4_core as dsv4
    from dsv4_core.graph.evaluate import teacher_forced

    told = []
    how = {**HOW[backend]}
    with dsv4.load(model, backend=backend, tp=tp, **how.pop("options", {}), **how) as session:
        for one in ids:
            out = list(session.generate(one, max_tokens=tokens, ignore_eos=True).run().tokens[0])
            raw = teacher_forced(session.model, np.array([[*one, *out[:-1]]]), prefill=len(one))["logits"][0]
            lines = torch.from_numpy(raw.astype(np.float32)).log_softmax(dim=-1, dtype=torch.float32)
            told.append([(token, float(line[token])) for token, line in zip(out, lines, strict=True)])
    return told


def engine(model: Path, backend: str, at_once: int, **more: Any) -> Any:
    """Give vLLM's engine with dsv4 in it. Fewer tokens a step than a long prompt has: it is read in
    chunks.
    """
    from vllm import EngineArgs, LLMEngine

    arguments: dict[str, Any] = {
        "model": str(model),
        "max_num_seqs": at_once,
        "max_model_len": 1024,
        "max_num_batched_tokens": 300,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "additional_config": {"dsv4": {"backend": backend, **HOW[backend]}},
        **more,
    }
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


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


COUNTED = {
    "preemptions": "vllm:num_preemptions",
    "prompt tokens taken up": "vllm:prefix_cache_hits",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "drafts kept": "vllm:spec_decode_num_accepted_tokens",
}


def compared(
    given: argparse.Namespace, ids: list[list[int]], want: list[Told] | None = None, **more: Any
) -> dict[str, Any]:
    """Ask vLLM's engine; where it differs from what dsv4 gives alone: prompts by their number,
    tokens and log-probabilities apart.
    """
    backend = more.pop("backend", "reference")
    want = want or alone(given.model, ids, given.tokens, backend)
    made = engine(given.model, backend, given.at_once, **more)
    both = list(enumerate(zip(want, inside(made, ids, given.tokens), strict=True)))
    values = {m.name: getattr(m, "value", 0) for m in made.get_metrics()}
    found: dict[str, Any] = {
        "prompts": len(ids),
        "other tokens": [i for i, (a, b) in both if [t for t, _ in a] != [t for t, _ in b]],
        "other logprobs": [i for i, (a, b) in both if [p for _, p in a] != [p for _, p in b]],
        "lengths": [len(one) for one in ids],
        "tokens each": given.tokens,
        "at once": given.at_once,
    }
    apart = [abs(x - y) for _, (a, b) in both for (_, x), (_, y) in zip(a, b, strict=True)]
    found["logprobs apart"] = max(apart)
    found["holds"] = not (found["other tokens"] or found["other logprobs"])
    return found | {name: values[metric] for name, metric in COUNTED.items() if metric in values}


def vocabulary(given: argparse.Namespace) -> int:
    """How many ids the model has."""
    from dsv4_core.checkpoint.weights import Checkpoint

    return Checkpoint(given.model).config.vocab_size


def company(given: argparse.Namespace) -> dict[str, Any]:
    """Requests that come and go."""
    return compared(given, prompts(given.prompts, given.longest, vocabulary(given)))


def begun_alike(given: argparse.Namespace) -> list[list[int]]:
    """Prompts of two beginnings, cut anywhere, each with an ending of its own."""
    rng, vocab = np.random.default_rng(1), vocabulary(given)
    beginnings = rng.integers(10, vocab, (2, given.longest))
    cuts = rng.integers(1, given.longest, given.prompts)
    return [[*beginnings[i % 2, :cut].tolist(), *rng.integers(10, vocab, 9).tolist()] for i, cut in enumerate(cuts)]


def shared(given: argparse.Namespace) -> dict[str, Any]:
    """Prompts that begin alike, prefix caching on: pages that another request filled are taken
    up.
    """
    found = compared(given, begun_alike(given), enable_prefix_caching=True)
    return {**found, "holds": found["holds"] and found["prompt tokens taken up"] > 0}


def preempted(given: argparse.Namespace) -> dict[str, Any]:
    """All at once begin with a block each and grow into a second one, and few have one: vLLM takes
    blocks back and begins requests again. Prefix caching is on, as it is where nobody says.

    A block has 256 tokens here: vLLM's CPU platform sets them for this architecture, whatever is
    said.
    """
    given.prompts, given.tokens = given.at_once, 32
    ids = prompts(given.prompts, 250, vocabulary(given), shortest=236)
    few = {"max_model_len": 512, "num_gpu_blocks_override": given.at_once + 2}
    found = compared(given, ids, enable_prefix_caching=True, **few)
    return {**found, "holds": found["holds"] and found["preemptions"] > 0}


def drafted(given: argparse.Namespace) -> dict[str, Any]:
    """Drafts of the MTP block and of vLLM's n-grams: verified by dsv4, they change no token and no
    log-probability. Prefix caching is on.
    """
    ids = begun_alike(given)
    ids = [[*one, *one[-9:], *one[-9:]] for one in ids]  # for n-grams to find something
    want = alone(given.model, ids, given.tokens, "reference")
    ways = {
        "MTP": {"method": "custom_class", "model": "dsv4_vllm.proposer.MtpProposer", "num_speculative_tokens": 1},
        "n-grams": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    }
    found = {
        name: compared(given, ids, want, speculative_config=way, enable_prefix_caching=True)
        for name, way in ways.items()
    }
    return {**found, "holds": all(one["holds"] and one["drafted"] > 0 for one in found.values())}


def ranks(given: argparse.Namespace) -> dict[str, Any]:
    """Two processes on gloo, tensor parallel: what dsv4's own two ranks give."""
    given.prompts = min(given.prompts, 12)
    ids = prompts(given.prompts, given.longest, vocabulary(given))
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
        probe.close()
        words = ["own_rank", "--here", f"--model={given.model}", f"--longest={given.longest}"]
        words += [f"--prompts={given.prompts}", f"--tokens={given.tokens}"]
        started = [
            subprocess.Popen(
                [sys.executable, HERE / "prove.py", *words, f"--report={folder}/{rank}.json"],
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
            )
            for rank in range(2)
        ]
        if sum(process.wait() != 0 for process in started):
            sys.exit("dsv4's own ranks failed")
        want = [[(token, value) for token, value in one] for one in json.loads(Path(folder, "0.json").read_text())]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else vLLM wants a memory node for each process
    more = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_prefix_caching": True}
    return {**compared(given, ids, want, **more), "processes": 2}


def own_rank(given: argparse.Namespace) -> list[Told]:
    """One of dsv4's own two ranks, for ``ranks``."""
    return alone(given.model, prompts(given.prompts, given.longest, vocabulary(given)), given.tokens, "reference", tp=2)


def vendor(given: argparse.Namespace) -> dict[str, Any]:
    """A third party's backend (examples/derived_backend), which knows nothing of vLLM."""
    found = compared(given, begun_alike(given), backend="derived", enable_prefix_caching=True)
    return {**found, "backend": "derived, float32", "holds": not found["other tokens"]}


def refused(given: argparse.Namespace) -> dict[str, Any]:
    """What dsv4's graph does not do in vLLM is refused by name, before weights load."""
    from dsv4_vllm.model import refuse
    from vllm import EngineArgs

    ways: dict[str, dict[str, Any]] = {
        "mtp": {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        "a stranger's drafter": {
            "speculative_config": {"method": "custom_class", "model": "a.B", "num_speculative_tokens": 1}
        },
        "pipeline": {"pipeline_parallel_size": 2},
        "experts": {"enable_expert_parallel": True},
        "data": {"data_parallel_size": 2},
    }

    def answer(way: dict[str, Any]) -> str | None:
        try:
            refuse(EngineArgs(model=str(given.model), skip_tokenizer_init=True, **way).create_engine_config())
        except (ValueError, NotImplementedError) as error:  # the latter: vLLM itself, for pipelines
            return str(error)
        return None

    said = {name: answer(way) for name, way in ways.items()}
    return {**said, "holds": all(one and "not supported" in one for one in said.values())}


def served(given: argparse.Namespace) -> dict[str, Any]:
    """Completions, streamed too, and a chat by the OpenAI server of vLLM: ids as dsv4 gives them.

    vLLM writes chats of this architecture by an encoder of its own, whatever template is given, and
    thinks with effort high where a request does not say: so this one says.
    """
    import openai

    import dsv4_core as dsv4

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    how = {"dsv4": {"backend": "reference", **HOW["reference"]}}
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(given.model), "--port", str(port)]
    words += ["--enforce-eager", "--max-num-seqs", "4", "--max-model-len", "512"]
    words += ["--served-model-name", "m", "--generation-config", "vllm", "--additional-config", json.dumps(how)]
    turns = [{"role": "user", "content": "What is kludge?"}]
    ids = [0, 3, 50, 60]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([sys.executable, *words], stdout=log, stderr=log) as server,
    ):
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", timeout=300)
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    if server.poll() is not None:
                        log.seek(0)
                        sys.exit(log.read()[-6000:])
                    time.sleep(0.5)
            ask: dict[str, Any] = {"model": "m", "max_tokens": given.tokens, "temperature": 0}
            more = {"return_token_ids": True}
            whole = client.completions.create(**ask, prompt=ids, extra_body=more).choices[0].token_ids
            parts = client.completions.create(**ask, prompt=ids, stream=True, extra_body=more)
            streamed = [token for part in parts if part.choices for token in part.choices[0].token_ids or ()]
            plain = {**more, "chat_template_kwargs": {"thinking": False}}
            chat = client.chat.completions.create(**ask, messages=turns, extra_body=plain).choices[0].token_ids
        finally:
            server.terminate()
    with dsv4.load(given.model, backend="reference", **HOW["reference"]["options"]) as session:
        want = [list(session.generate(asked, max_tokens=given.tokens).run().tokens[0]) for asked in (ids, turns)]
    found = {"completion": whole, "streamed": streamed, "chat": chat, "dsv4": want}
    return {**found, "holds": [whole, chat] == want and streamed == whole}


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
    parser.add_argument("--model", type=Path, help="of it alone (default: the embedded one, and of tiny-flash a few)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--report", type=Path, help="written; with parts named, what it has of others stays")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process is the part's own
    given = parser.parse_args()
    if (unknown := set(given.parts) - set(PARTS)) and not given.here:
        parser.error(f"no part is called {min(unknown)!r}; parts: {', '.join(PARTS)}")
    if given.here:
        found = globals()[given.parts[0]](given)
        write(given.report, json.dumps(found))
        return
    parts = given.parts or PARTS
    runs = [(given.model, part) for part in parts]
    if given.model is None:
        from dsv4_conformance.model import golden

        from dsv4_core.checkpoint.weights import embedded

        runs = [(Path(embedded()), part) for part in parts]
        runs += [(golden.checkpoint_path("tiny-flash"), part) for part in parts if part in RECORDED]
    report: dict[str, Any] = {}
    if given.parts and given.report and given.report.exists():  # some parts again
        report = json.loads(given.report.read_text())
    report |= {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in ("dsv4", "vllm-cpu", "torch", "transformers", "numpy")},
    }
    environment = {**os.environ, "VLLM_PLUGINS": "dsv4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    numbers = [
        f"--{name}={getattr(given, name.replace('-', '_'))}" for name in ("prompts", "longest", "tokens", "at-once")
    ]
    for model, part in runs:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            words = [part, "--here", f"--model={model}", f"--report={out}", *numbers]
            began = time.perf_counter()
            done = subprocess.run([sys.executable, HERE / "prove.py", *words], env=environment, check=False)
            found = json.loads(out.read_text()) if done.returncode == 0 else {"holds": False}
            found["seconds"] = round(time.perf_counter() - began, 1)
        report.setdefault(model.name, {})[part] = found
        print(json.dumps({model.name: {part: found}}), flush=True)
    if given.report:
        write(given.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    sys.exit(not all(report[model.name][part]["holds"] for model, part in runs))


if __name__ == "__main__":
    main()
