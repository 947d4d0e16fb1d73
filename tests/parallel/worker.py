"""One rank of a test: reads jobs.json, runs each job on its place among the ranks, and the first
rank writes what came out.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from dsv4_conformance.model import golden, stored_logits

from dsv4_core.checkpoint.rank_part import Place, ShardedSource, share
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.contract.rendezvous import Rendezvous
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.generate import generate, speculate
from dsv4_core.graph.model import ALONE, Model
from dsv4_core.graph.step import Step
from dsv4_core.ranks.exchange import Ranks, report
from dsv4_core.ranks.watch import Watch

VOCABULARY = 251  # a prime: no tp divides it


class OneRanksExperts:
    """A checkpoint whose every token goes to the first experts."""

    def __init__(self, source):
        self.source, self.config = source, source.config
        self.weight, self.experts = source.weight, source.experts

    def array(self, name):
        array = self.source.array(name)
        chosen = np.arange(self.config.num_experts_per_tok)
        if name.endswith("gate.bias"):
            return np.where(np.isin(np.arange(len(array)), chosen), np.float32(100), array)
        return np.broadcast_to(chosen, array.shape) if name.endswith("tid2eid") else array


class OddVocabulary:
    """A checkpoint with fewer token ids."""

    def __init__(self, source):
        self.source, self.config = source, replace(source.config, vocab_size=VOCABULARY)
        self.experts = source.experts

    def array(self, name):
        array = self.source.array(name)
        return array[:VOCABULARY] if name.endswith("tid2eid") else array

    def weight(self, name):
        weight = self.source.weight(name)
        return weight[:VOCABULARY] if name in {"embed", "head"} else weight


def recorded_prompts(model):
    """Logits [2, 160, vocab] of the positions that the suite's native gate judges."""
    ids = golden.load("tiny-jargon", "golden")["prompt"]
    mine, parts = model.parallel.mine(ids), []
    cache = Cache(model.backend, model.config, len(mine), ids.shape[1], rewindable=0)
    for begin in range(0, ids.shape[1], 64):
        step = Step(cache, mine[:, begin : begin + 64])
        h = model.forward(step)
        cache.advance(step.sequences, step.ends)
        parts.append(model.backend.to_numpy(model.logits(h)).reshape(len(mine), step.seq, model.config.vocab_size))
    return model.parallel.joined(np.concatenate(parts, axis=1)[:, stored_logits.FIRST :])


VARIANTS = {
    "distance": lambda source: source,
    "": lambda source: source,
    "one_rank": OneRanksExperts,
    "odd": OddVocabulary,
}


def run(job, ranks=None, backend=None):
    """Give what one job computes: on several ranks, or with ``ranks`` None on this process
    alone.
    """
    backend = backend or registry.create(job["backend"], numerics=job["numerics"], **job["options"])
    checkpoint = Checkpoint(job["checkpoint"])
    source, parallel = VARIANTS[job["variant"]](checkpoint), ALONE
    if ranks:
        source = ShardedSource(source, ranks.place)
        quantised = isinstance(checkpoint.weight("layers.0.ffn.experts.0.w1"), ScaledArray)
        parallel = ranks.parallel(source.config, quantised=quantised)
    model = Model(source, backend, parallel=parallel)
    if job["variant"] == "distance":
        return {"logits": recorded_prompts(model)}
    results = teacher_forced(model, np.array(job["tokens"]), prefill=job["prefill"], chunk=job["chunk"], mtp=True)
    if job["generate"]:
        prompts = [row[: 9 + 4 * i] for i, row in enumerate(job["tokens"])]
        steps = list(generate(model, prompts, max_tokens=job["generate"], stop=()))
        results["generated"] = np.array(steps)
        results["speculated"] = np.array(list(speculate(model, prompts[0], max_tokens=job["generate"])))
    if ranks:
        place, traffic = ranks.place, ranks.traffic
        specs = [checkpoint.spec(name) for name in checkpoint.names]
        for prefix in [f"layers.{i}" for i in range(source.config.num_hidden_layers)] + ["mtp.0"]:
            for projection in ("w1", "w2", "w3"):
                list(source.experts(f"{prefix}.ffn", projection))  # every expert of this rank, routed to or not
        figures = {
            "read": sum(source.read.values()),
            "share": share(checkpoint.config, place, specs),
            "tokens": traffic.tokens,
            "copies": traffic.copies,
            "returned": traffic.returned,
            "dispatched": traffic.sent["expert dispatch"],
            "combined": traffic.sent["expert combine"],
            "summed": traffic.sent["expert sum"],
            "lines": report(ranks, source.config, seconds=1.0),
        }
        results["figures"] = np.array(
            [json.loads(text) for text in ranks.watch.collect(job["name"], json.dumps(figures))]
        )
    return results


def main(folder):
    where = Rendezvous.from_environment()
    jobs = json.loads((folder / "jobs.json").read_text())
    watch = None
    for job in jobs:
        began = time.perf_counter()
        backend = registry.create(job["backend"], numerics=job["numerics"], **job["options"])
        world = backend.process_group(where)
        world.host_reads_stall = job["stalls"]
        watch = watch or Watch(world.store, rank=where.rank, ranks=where.ranks, holder=None, place=where.place)
        ranks = Ranks(backend, Place(job["tp"], job["ep"], where.rank), world, watch)
        results = run(job, ranks, backend)
        if where.rank == 0:
            np.savez(folder / f"{job['name']}.npz", **results)
            print(job["name"], f"{time.perf_counter() - began:.1f} s", flush=True)
    watch.done()
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
