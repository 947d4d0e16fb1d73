"""Time dsv4 against llama.cpp on a CPU: the same weights in the published layout, the same tokens
and threads, alternating.

    python benchmarks/vs_llama_cpp.py DIR prepare
    python benchmarks/vs_llama_cpp.py DIR decode --contexts 0,1024 --batches 1,4
    python benchmarks/vs_llama_cpp.py DIR prefill --prompts 1024

``prepare`` fills DIR: the sources of llama.cpp that the package ``llama-cpp-python`` carries, built
here for this CPU (minutes); a random checkpoint in the published layout (FP8, FP4 experts); and
what llama.cpp's own converter makes of it (experts in MXFP4, the same codes and scales; FP8 weights
in Q8_0). The converter knows no vocabulary but published ones, so it is told to write none.

Each side runs in a process of its own, through its library's calls (llama.cpp's by the binding of
the same package), and waits while the other one runs. Both are given the ids of every step and end
it with the logits on the host. Runs alternate: a few decode steps, or a prompt, of one side, then
of the other. Printed: medians of the runs, their ratio, how far the logits are apart (llama.cpp
multiplies by activations in 8 bits), and the bounds: bytes of weights that a step reads against the
memory bandwidth, and operations of a prompt against the GEMM peak, both measured in the same
process.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path
from typing import Any, Protocol

PACKAGE = "llama-cpp-python==0.3.36"
MODEL: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "head_dim": 128, "qk_rope_head_dim": 64,
    "q_lora_rank": 256, "o_groups": 4, "o_lora_rank": 256, "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    "num_hash_layers": 1, "index_n_heads": 16, "index_head_dim": 128, "index_topk": 128, "compress_ratios": (0, 0, 4, 128, 4, 128),
    "num_nextn_predict_layers": 0, "routed_scaling_factor": 1.5,
}  # fmt: skip
CPUINFO = Path("/proc/cpuinfo").read_text()
# Where a CPU has AMX this version of llama.cpp repacks weights for it, finds no way to multiply
# some that have three axes, and ends in an assertion; there it runs without repacking (its own
# option --no-repack).
AMX = " amx_tile" in CPUINFO
CONVERT = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
from conversion.deepseek import DeepseekV4Model
def none(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
DeepseekV4Model.set_vocab = none
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def numbers(text: str) -> list[int]:
    """Read ``0,1024``."""
    return [int(part) for part in text.split(",")]


parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument(
    "dir", type=Path, help="folder for llama.cpp, the checkpoint and what was made of it; not in the repository"
)
parser.add_argument("what", choices=("prepare", "decode", "prefill"))
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--runs", type=int, default=5, help="alternated runs of each side")
parser.add_argument("--steps", type=int, default=16, help="decode steps of a run")
parser.add_argument("--contexts", type=numbers, default=[0, 1024, 8192], help="tokens before the decode steps")
parser.add_argument("--batches", type=numbers, default=[1, 4], help="sequences side by side, in decode")
parser.add_argument("--prompts", type=numbers, default=[1024, 8192], help="tokens of a prefill")
parser.add_argument(
    "--chunk", type=int, default=2048, help="tokens of one of dsv4's prefill steps (llama.cpp: its own defaults)"
)
parser.add_argument(
    "--clock",
    choices=("wall", "cpu"),
    default="wall",
    help="cpu, with --threads 1: seconds of this process, for a busy machine",
)
parser.add_argument("--side", choices=("dsv4", "llama.cpp"), help=argparse.SUPPRESS)  # a child that obeys commands
args = parser.parse_args()
clock = time.process_time if args.clock == "cpu" else time.perf_counter
LIBRARY, CHECKPOINT, GGUF = args.dir / "build" / "bin", args.dir / "checkpoint", args.dir / "model.gguf"
SOURCES = args.dir / PACKAGE.replace("==", "-").replace("llama-cpp-python", "llama_cpp_python")
VENDORED = SOURCES / "vendor" / "llama.cpp"
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read once, when the libraries load
    os.environ[variable] = str(args.threads)

import numpy as np  # noqa: E402


class Side(Protocol):
    """One side of the race: a model and one cache. Sequences begin empty."""

    def reset(self, batch: int, room: int) -> None:
        """Forget all; make room for so many tokens of so many sequences."""

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Feed ``ids`` [batch, S]; give the last tokens' logits [batch, vocab] on the host."""


class Dsv4:
    """dsv4's torch backend, in native numerics."""

    def __init__(self) -> None:
        from dsv4_core.checkpoint.weights import Checkpoint
        from dsv4_core.contract.registry import create
        from dsv4_core.graph.model import Model

        self.backend = create("torch", numerics="native", threads=args.threads)
        self.model = Model(Checkpoint(CHECKPOINT), self.backend)

    def reset(self, batch: int, room: int) -> None:
        """As ``Side`` says."""
        from dsv4_core.graph.cache import Cache
        from dsv4_core.graph.replay import Replay

        self.cache = Cache(self.backend, self.model.config, batch, room, rewindable=0)
        self.replay = Replay(self.model, self.cache)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """As ``Side`` says."""
        from dsv4_core.graph.generate import prefill
        from dsv4_core.graph.step import Step

        if ids.shape[1] > 1:
            logits = self.model.logits(prefill(self.model, self.cache, ids, chunk=args.chunk).streams)
        else:
            step = Step(self.cache, ids)
            logits = self.replay.logits(step)
            self.cache.advance(step.sequences, step.ends)
        return self.backend.to_numpy(logits)


class LlamaCpp:
    """llama.cpp by its C interface, with its default context parameters."""

    def __init__(self) -> None:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARY.absolute())
        package = types.ModuleType(
            "llama_cpp"
        )  # the binding alone: the package around it wants more than it needs here
        package.__path__ = [str(SOURCES / "llama_cpp")]
        sys.modules["llama_cpp"] = package
        self.api = importlib.import_module("llama_cpp.llama_cpp")
        self.api.llama_backend_init()
        self.quiet = self.api.llama_log_callback(
            lambda level, text, _: sys.stderr.write(text.decode()) if level == 4 else None
        )
        self.api.llama_log_set(self.quiet, None)
        wanted = self.api.llama_model_default_params()
        wanted.use_extra_bufts = not AMX
        self.model = self.api.llama_model_load_from_file(str(GGUF).encode(), wanted)
        if not self.model:
            sys.exit(f"llama.cpp does not load {GGUF}")
        self.context = None

    def reset(self, batch: int, room: int) -> None:
        """As ``Side`` says."""
        if self.context:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
        wanted = self.api.llama_context_default_params()
        wanted.n_ctx = batch * -(-room // 256) * 256
        wanted.n_seq_max, wanted.n_threads, wanted.n_threads_batch = batch, args.threads, args.threads
        self.context = self.api.llama_init_from_model(self.model, wanted)
        if not self.context:
            sys.exit("llama.cpp makes no context")
        self.most = self.api.llama_n_batch(self.context)
        self.batch = self.api.llama_batch_init(max(self.most, batch), 0, 1)
        self.length = 0

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """As ``Side`` says."""
        batch, total = ids.shape
        step = max(1, self.most // batch)
        for start in range(0, total, step):
            part, n = ids[:, start : start + step], 0
            for b in range(batch):
                for s in range(part.shape[1]):
                    self.batch.token[n], self.batch.pos[n] = int(part[b, s]), self.length + s
                    self.batch.n_seq_id[n], self.batch.seq_id[n][0] = 1, b
                    self.batch.logits[n] = start + s == total - 1
                    n += 1
            self.batch.n_tokens = n
            self.length += part.shape[1]
            if status := self.api.llama_decode(self.context, self.batch):
                sys.exit(f"llama.cpp: llama_decode gives {status}")
        at = range(part.shape[1] - 1, n, part.shape[1])
        rows = [
            np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (MODEL["vocab_size"],)) for i in at
        ]
        return np.stack(rows)


def serve(side: Side) -> None:
    """Obey commands: a line of JSON each, answered by one."""
    seed = np.random.default_rng(1)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "reset":
            seed = np.random.default_rng(order["batch"])
            side.reset(order["batch"], order["room"])
            answer: dict[str, Any] = {}
        else:
            times, logits = [], np.zeros(0)
            for _ in range(order["times"]):
                ids = seed.integers(0, MODEL["vocab_size"], (order["batch"], order["tokens"]))
                began = clock()
                logits = side.feed(ids)
                times.append(clock() - began)
            answer = {"seconds": times, "logits": np.asarray(logits, np.float32)[:, ::64].ravel().tolist()}
        print(json.dumps(answer), flush=True)


class Child:
    """A side in a process of its own, which sleeps while it has nothing to do."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, str(args.dir), "decode", "--side", name, "--threads", str(args.threads)]
        self.process = subprocess.Popen(
            [*command, "--chunk", str(args.chunk), "--clock", args.clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its end."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("a side ended; see above")
        return json.loads(answer)


def prepare() -> None:
    """Fetch, build, write, convert: what is there already is kept."""
    needed = [name for name in ("transformers", "sentencepiece", "gguf") if importlib.util.find_spec(name) is None]
    if needed:
        sys.exit(f"llama.cpp's converter needs {', '.join(needed)}: pip install {' '.join(needed)}")
    args.dir.mkdir(parents=True, exist_ok=True)
    if not SOURCES.exists():
        run("pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", args.dir, PACKAGE, module=True)
        with tarfile.open(SOURCES.with_name(SOURCES.name + ".tar.gz")) as archive:
            archive.extractall(args.dir, filter="data")
    if not (LIBRARY / "libllama.so").exists():
        settings = (
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_OPENSSL=OFF",
        )
        run("cmake", "-S", VENDORED, "-B", args.dir / "build", *settings)
        run("cmake", "--build", args.dir / "build", "--target", "llama", "-j", args.threads)
    if not (CHECKPOINT / "config.json").exists():
        from dsv4_core.checkpoint.config import ModelConfig
        from dsv4_core.checkpoint.create import create

        create(CHECKPOINT, ModelConfig(**MODEL), seed=1)
    if not GGUF.exists():
        making = GGUF.with_suffix(".part")
        run("-c", CONVERT, VENDORED, CHECKPOINT, "--outfile", making, python=True)
        making.rename(GGUF)
    for path in (CHECKPOINT, GGUF):
        size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
        print(f"{path}: {size / 1e6:.0f} MB")


def run(*command: object, python: bool = False, module: bool = False) -> None:
    """Run a command, or end with its status."""
    words = [*([sys.executable, "-m"] if module else [sys.executable] if python else []), *map(str, command)]
    if status := subprocess.run(words, check=False).returncode:
        sys.exit(f"{words[:4]} gave {status}")


def bounds() -> tuple[float, float]:
    """Bytes a second that all threads together read, and operations a second of a product of BF16
    matrices.
    """
    import torch

    torch.set_num_threads(args.threads)
    block, square = torch.ones(64 << 20), torch.ones((2048, 2048), dtype=torch.bfloat16)
    return block.numel() * 4 / best(block.sum), 2 * 2048**3 / best(lambda: torch.nn.functional.linear(square, square))


def best(body: Any) -> float:
    """Seconds of the fastest of seven calls."""
    times = []
    for _ in range(7):
        began = clock()
        body()
        times.append(clock() - began)
    return min(times)


def work(batch: int, tokens: int) -> tuple[float, float]:
    """Bytes of weights that a decode step of ``batch`` sequences reads at most, and operations of a
    prompt's products with weights and of its attention over what each token sees.
    """
    from dsv4_core.checkpoint.weights import Checkpoint

    c, read, used = Checkpoint(CHECKPOINT).config, 0.0, 0.0
    checkpoint = Checkpoint(CHECKPOINT)
    chosen = c.num_experts_per_tok / c.n_routed_experts
    for name in checkpoint.names:
        array = checkpoint.array(name)
        if array.ndim != 2 or "tid2eid" in name or name == "embed.weight" or name.endswith("ape"):
            continue
        expert = ".experts." in name and "shared" not in name
        read += array.nbytes * (1 - (1 - chosen) ** batch if expert else 1)
        values = array.size * (2 if expert else 1)  # two FP4 codes a byte
        used += 0 if name == "head.weight" or name.endswith("scale") else values * (chosen if expert else 1)
    seen = sum(
        min(c.sliding_window, tokens) + (min(c.index_topk, tokens // 8) if m == 4 else tokens / 256 if m else 0)
        for m in c.compress_ratios
    )
    return read, 2 * tokens * used + 4 * tokens * seen * c.num_attention_heads * c.head_dim


def race(sides: dict[str, Child], times: int, batch: int, tokens: int, warm: int) -> dict[str, float]:
    """Median seconds of a step of each side over all runs, after ``warm`` steps; ends where the
    logits are too far apart.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm):
        last = {name: side.ask(do="feed", batch=batch, tokens=tokens, times=1) for name, side in sides.items()}
    for _ in range(args.runs):
        for name, side in sides.items():
            last[name] = side.ask(do="feed", batch=batch, tokens=tokens, times=times)
            seconds[name].append(statistics.median(last[name]["seconds"]))
    a, b = (np.array(last[name]["logits"]) for name in ("dsv4", "llama.cpp"))
    apart = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    spread = "; ".join(f"{name} {min(s) * 1e3:.2f} to {max(s) * 1e3:.2f} ms" for name, s in seconds.items())
    print(f"    runs: {spread}; logits {apart:.2f} apart", flush=True)
    if not apart < 0.7:  # random weights are chaotic, and these are two quantisations; unrelated logits are 1.4 apart
        sys.exit("the two sides' logits are unrelated: not the same model")
    return {name: statistics.median(s) for name, s in seconds.items()}


def main() -> None:
    """Prepare, obey, or race."""
    if args.what == "prepare":
        prepare()
        return
    if args.side:
        serve(Dsv4() if args.side == "dsv4" else LlamaCpp())
        return
    if not (GGUF.exists() and (LIBRARY / "libllama.so").exists()):
        sys.exit(f"{args.dir} is not prepared; run: python {sys.argv[0]} {args.dir} prepare")
    cpu = next((line.split(": ")[1] for line in CPUINFO.splitlines() if "model name" in line), platform.machine())
    print(
        f"dsv4 --backend torch (native) against llama.cpp of {PACKAGE}, {args.threads} threads, {datetime.datetime.now(datetime.UTC).date()}"
    )
    print(
        f"  seconds of {'the clock' if args.clock == 'wall' else 'the processor'}; load of the machine {os.getloadavg()[0]:.1f} at the start"
    )
    print(f"  {cpu}; hidden 1024, 6 layers, 16 experts of which 4; medians of {args.runs} alternating runs")
    if AMX:
        print(
            "  llama.cpp runs without repacked weights (--no-repack): with them it ends in an assertion on a CPU with AMX"
        )
    bandwidth, peak = bounds()
    print(f"  memory {bandwidth / 1e9:.1f} GB/s, BF16 product {peak / 1e9:.0f} GFLOP/s", flush=True)
    sides = {name: Child(name) for name in ("dsv4", "llama.cpp")}
    if args.what == "decode":
        for context in args.contexts:
            for batch in args.batches:
                for side in sides.values():
                    side.ask(do="reset", batch=batch, room=context + 3 + args.runs * args.steps)
                    if context:
                        side.ask(do="feed", batch=batch, tokens=context, times=1)
                found = race(sides, args.steps, batch, 1, warm=3)
                ours, theirs = found["dsv4"], found["llama.cpp"]
                bandwidth = max(bandwidth, bounds()[0])  # other machines' programs share the memory, now more, now less
                bound = work(batch, 1)[0] / bandwidth
                print(
                    f"  decode after {context:5}, batch {batch}: dsv4 {batch / ours:7.1f} tokens/s, llama.cpp {batch / theirs:7.1f}: "
                    f"{theirs / ours:.2f}x; dsv4 at {bound / ours:.0%} of the bound by {bandwidth / 1e9:.1f} GB/s, llama.cpp {bound / theirs:.0%}",
                    flush=True,
                )
    else:
        for tokens in args.prompts:
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(args.runs + 1):  # one more: first use
                for name, side in sides.items():
                    side.ask(do="reset", batch=1, room=tokens)
                    answer = side.ask(do="feed", batch=1, tokens=tokens, times=1)
                    if turn:
                        seconds[name] += answer["seconds"]
            ours, theirs = (statistics.median(seconds[name]) for name in ("dsv4", "llama.cpp"))
            operations = work(1, tokens)[1]
            print(
                f"  prefill {tokens:5}: dsv4 {tokens / ours:7.1f} tokens/s, llama.cpp {tokens / theirs:7.1f}: {theirs / ours:.2f}x; "
                f"dsv4 at {operations / ours / peak:.0%} of the GEMM peak, llama.cpp {operations / theirs / peak:.0%}",
                flush=True,
            )
    for side in sides.values():
        assert side.process.stdin
        side.process.stdin.close()
        side.process.wait()


if __name__ == "__main__":
    main()
