"""Clients at random for as long as is asked: some leave, lie, flood or fail; the others are told
what they are told alone.

    python tests/serve/soak.py [--seconds 3600] [--clients 6] [--seed 0] [--report FILE]

Exit status 1 where a client was told otherwise, a slot was lost, or memory, threads or open files
went on growing.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent))
import test_harm
from conftest import Running, made

QUIET = [  # what harms nobody, one client at a time
    test_harm.leaves_without_the_reply,
    test_harm.sends_half,
    test_harm.meets_a_failing_device,
    test_harm.is_not_unicode,
    test_harm.speaks_no_http,
    test_harm.does_not_read,
]
SELDOM = [test_harm.sends_much, test_harm.sits_idle]


def leaves_somewhere(server, draw):
    """A stream that is left after some of its lines."""
    route = draw.choice(sorted(test_harm.STREAMS))
    body = {"model": test_harm.MODEL, "stream": True, **test_harm.STREAMS[route]}
    with httpx.stream("POST", f"{server.url}/v1/{route}", json=body, timeout=600) as reply:
        for _, _ in zip(range(draw.randrange(40)), reply.iter_lines(), strict=False):
            pass


def grown(process):
    """Megabytes, threads and open files."""
    return {
        "MB": round(process.memory_info().rss / 1e6, 1),
        "threads": process.num_threads(),
        "files": process.num_fds(),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    server = Running(made(queue=64))
    test_harm.fail_at_poison(server.app.worker.engine.model)
    alone = [test_harm.told(server, *ask) for ask in test_harm.ASKS]
    until, did, wrong = time.monotonic() + given.seconds, Counter(), []

    def client(number):
        draw = random.Random(given.seed * 1000 + number)
        while time.monotonic() < until:
            chance = draw.random()
            try:
                if chance < 0.5:
                    which = draw.randrange(len(alone))
                    if test_harm.told(server, *test_harm.ASKS[which]) != alone[which]:
                        wrong.append(f"request {which} was told otherwise")
                    did["compared"] += 1
                elif chance < 0.75:
                    leaves_somewhere(server, draw)
                    did["left"] += 1
                else:
                    happens = draw.choice(QUIET if chance < 0.99 else SELDOM)
                    happens(server)
                    did[happens.__name__] += 1
            except Exception as error:  # noqa: BLE001  whatever a client meets is reported
                wrong.append(repr(error)[:300])

    process, began = psutil.Process(os.getpid()), time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(given.clients)]
    for thread in threads:
        thread.start()
    samples = []
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(RuntimeError):
            threads[0].join(timeout=min(30.0, given.seconds / 20))
        for thread in threads:
            thread.join(timeout=0.01)
        samples.append(grown(process))
    server.idle()
    time.sleep(1)
    stats = server.app.worker.engine.stats
    late = samples[len(samples) // 2 :] or samples
    report = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "seconds": round(time.monotonic() - began),
        "clients": given.clients,
        "did": dict(did.most_common()),
        "ended": dict(stats.finished),
        "generated": stats.generated,
        "free slots": [stats.free, 4],
        "half way and at the end": [late[0], samples[-1]],
        "versions": {name: version(name) for name in ("dsv4", "starlette", "uvicorn")},
        "wrong": wrong[:20],
    }
    print(json.dumps(report, indent=1))
    if given.report:
        given.report.parent.mkdir(exist_ok=True, parents=True)
        given.report.write_text(json.dumps(report, indent=1) + "\n")
    grew = samples[-1]["MB"] - late[0]["MB"] > 200 or samples[-1]["files"] - late[0]["files"] > 100
    server.close()
    sys.exit(bool(wrong) or stats.free != 4 or grew)


if __name__ == "__main__":
    main()
