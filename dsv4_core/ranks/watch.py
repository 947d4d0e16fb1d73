"""Ranks that watch each other: a lost, stopped or failed rank ends all others, with its number and
the cause.

Every rank writes a counter to a shared store twice a second, from a thread of its own, and reads
those of the others. A collective that a peer left never returns, so the thread itself ends the
process. What a rank wrote last says how it ended: nothing new (it was killed, stopped, or cut off),
its error, or that it was done.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from dsv4_core.contract.backend import BackendError
from dsv4_core.files.reading import FileError, json_text
from dsv4_core.files.words import one_line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import Self

    from dsv4_core.contract.collectives import Store

BEAT = 0.5  # seconds between two signs of life
SILENCE = 12.0  # without one, a rank is lost: over the longest that a call may keep Python's lock, well under 30
SUSPECT = 4.0  # the same, once a connection to some rank has broken
JOIN = 25.0  # to wait for ranks that have not started
FAREWELL = 4.0  # the rank that holds the store waits so long for the others to read why
EXIT = 3  # status of a rank that ends because of another


class RankError(BackendError):
    """Another rank is lost, has failed, or was started differently; names it and the cause."""


def name_of(holder: int | None) -> str:
    """Who holds the ranks' store: a rank, or (None) the launcher."""
    return "the launcher" if holder is None else f"rank {holder}"


class Watch:
    """One rank's view of all; ``holder``: the rank in whose process the store lives, None where it
    lives elsewhere.
    """

    def __init__(
        self, store: Store, *, rank: int, ranks: int, holder: int | None, place: str, join: float = JOIN
    ) -> None:
        """Announce this rank at ``place`` (host and process) and wait for the others; raise
        ``RankError`` naming those that do not come.
        """
        self.store, self.rank, self.ranks, self.holder = store, rank, ranks, holder
        self.suspect = False
        self.state = "0"
        self.verdict: str | None = None
        self.agreements = 0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        with self._storing():
            store.set(self._key("size", rank), str(ranks))
            store.set(self._key("place", rank), place)
            store.set(self._key("beat", rank), self.state)
        try:
            self._meet(join)
        except RankError:
            if holder == rank:
                time.sleep(FAREWELL)  # so that the others find out, too, what is wrong
            raise
        for run in (self._watch, self._guard):
            threading.Thread(target=run, name=f"dsv4{run.__name__}", daemon=True).start()

    def _meet(self, join: float) -> None:
        """Wait for all ranks; raise ``RankError`` naming those that do not come, or were started
        for another number.
        """
        until = time.monotonic() + join
        while True:
            missing = self._missing("beat", 0.0)
            self._hold_sizes()
            if not missing:
                break
            if time.monotonic() > until:
                which = ", ".join(map(str, missing))
                raise RankError(
                    f"rank {which} of {self.ranks} did not start within {join:.0f} s; start every rank with the same "
                    "MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
                )
            time.sleep(0.05)
        with self._storing():
            self.places = [
                one_line(value.decode(errors="replace")) for value in self.store.multi_get(self._keys("place"))
            ]

    def _hold_sizes(self) -> None:
        """Raise ``RankError`` where a rank that has come was started for another number of
        ranks.
        """
        with self._storing():
            here = [r for r, key in enumerate(self._keys("size")) if self.store.check([key])]
            said = self.store.multi_get([self._key("size", r) for r in here])
        for r, size in zip(here, said, strict=True):
            stated = one_line(size.decode(errors="replace"), 60)
            if not (stated.isascii() and stated.isdigit()):
                raise RankError(
                    f"rank {r} wrote {stated!r} for its number of ranks: it was started with a secret "
                    f"(DSV4_STORE_KEY, --store-key-file) and rank {self.rank} without, or a stranger writes there"
                )
            if int(stated) != self.ranks:
                raise RankError(
                    f"rank {r} was started with WORLD_SIZE = {stated}, rank {self.rank} with {self.ranks}; give all the same"
                )

    def agree(self, what: Mapping[str, Any]) -> None:
        """Hold what this rank was started with (name -> anything that JSON can write) against the
        others'.

        Raises ``RankError`` naming the ranks that differ from rank 0, and in what.
        """
        self.agreements += 1  # each under a name of its own: the store keeps what was said before
        turn = f"agree {self.agreements}"
        try:
            heard = enumerate(self.collect(turn, json.dumps(what)))
            said = [
                json_text(value, dict[str, Any], f"what rank {r} said", "start all ranks alike") for r, value in heard
            ]
        except FileError as error:
            raise RankError(str(error)) from error
        for name, first in said[0].items():
            others = [r for r in range(self.ranks) if said[r].get(name) != first]
            if not others:
                continue
            both = [said[others[0]].get(name), first]
            if all(isinstance(one, dict) for one in both):  # only what differs
                keys = [key for key in both[1] if both[0].get(key) != both[1][key]]
                both = [{key: one.get(key) for key in keys} for one in both]
            if all(isinstance(one, str) for one in both):
                words = [one.split(", ") for one in both]
                if len(words[0]) == len(words[1]):
                    both = [", ".join(a for a, b in zip(x, y, strict=True) if a != b) for x, y in (words, words[::-1])]
            who = ", ".join(f"{r} ({self.places[r]})" for r in others)
            raise RankError(
                printable(
                    f"rank {who} has another {name} than rank 0 ({self.places[0]}): {both[0]} instead of {both[1]}; give all the same"
                )
            )

    def collect(self, what: str, mine: str) -> list[str]:
        """Give what every rank has said under a name, once all have."""
        self.store.set(self._key(what, self.rank), mine)
        while self._missing(what, 1.0):  # a rank that never comes ends this one through the watch
            pass
        return [value.decode(errors="replace") for value in self.store.multi_get(self._keys(what))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """After an error say so, that no other rank waits for this one."""
        if error is not None:
            self.fail(str(error).splitlines()[0] if isinstance(error, BackendError | ValueError) else repr(error))

    def broken(self) -> None:
        """Note that a connection broke: silence counts sooner now. Gives the watch time to find out
        whose, then returns.
        """
        self.suspect = True
        self._stopping.wait(SILENCE + SUSPECT)

    def fail(self, why: str) -> None:
        """Tell the others that this rank ends with an error, and see that it does end."""
        self._last_resort(2)
        self._say(f"failed: {why}")
        if self.holder == self.rank:
            self._wait_for_others(FAREWELL)

    def done(self) -> None:
        """Tell the others that this rank has finished, and wait until they have."""
        stuck = self._last_resort(EXIT, SILENCE + SUSPECT)
        self._say("done")
        self._stopping.set()
        self._wait_for_others(SILENCE)
        stuck.cancel()

    def _key(self, what: str, rank: int) -> str:
        return f"dsv4/{what}/{rank}"

    def _keys(self, what: str) -> list[str]:
        return [self._key(what, r) for r in range(self.ranks)]

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise RankError(f"{name_of(self.holder)}, which holds the ranks' store, was lost: {first}") from error

    def _missing(self, what: str, seconds: float) -> list[int]:
        until = time.monotonic() + seconds
        while True:
            with self._storing():
                missing = [r for r, key in enumerate(self._keys(what)) if not self.store.check([key])]
            if not missing or time.monotonic() > until:
                return missing
            time.sleep(0.05)

    def _say(self, state: str) -> None:
        with self._lock, contextlib.suppress(RankError), self._storing():
            self.state = state
            self.store.set(self._key("beat", self.rank), state)

    def _watch(self) -> None:
        before = time.monotonic()  # its own: the guard sets ``_looked``, too, and may wake first
        seen = [("", before)] * self.ranks
        count = 0
        while not self._stopping.is_set():
            try:
                with self._storing(), self._lock:
                    if self.state.isdigit():
                        count += 1
                        self.state = str(count)
                        self.store.set(self._key("beat", self.rank), self.state)
                    said = self.store.multi_get(self._keys("beat"))
                    states = [one_line(value.decode(errors="replace")) for value in said]
            except RankError as lost:
                self._end(str(lost))
                return
            now = self._looked = time.monotonic()
            asleep = now - before > SUSPECT  # this process itself was stopped, and saw nothing of the others
            before = now
            for r, state in enumerate(states):
                if asleep or state != seen[r][0]:
                    seen[r] = state, now
            if verdict := self._judge(states, [now - at for _, at in seen]):
                self._end(verdict)
                return
            time.sleep(BEAT)

    def _judge(self, states: list[str], silent: list[float]) -> str | None:
        limit = SUSPECT if self.suspect else SILENCE
        others = [r for r in range(self.ranks) if r != self.rank]
        for r in others:
            if states[r].startswith("failed: "):
                return f"rank {r} ({self.places[r]}) failed: {states[r][8:]}"
            if states[r].startswith("ended: "):
                why = states[r][7:]
                return why if why.startswith(("rank ", "the launcher")) else f"rank {r} ({self.places[r]}) ended: {why}"
        for r in others:
            if states[r] != "done" and silent[r] > limit:
                return f"rank {r} ({self.places[r]}) was lost: no sign of life for {silent[r]:.0f} s (killed, stopped or cut off)"
        return None

    def _end(self, verdict: str) -> None:
        """End this process because of another rank."""
        if self._stopping.is_set() or not self.state.isdigit():  # it is ending by itself
            return
        verdict = one_line(verdict, 2000)
        self.verdict = verdict
        print(f"dsv4: rank {self.rank} ends: {verdict}", file=sys.stderr, flush=True)
        self._last_resort(EXIT)  # the store may have stopped answering
        self._say(f"ended: {verdict}")
        if self.holder == self.rank:
            self._wait_for_others(FAREWELL)
        os._exit(EXIT)  # the main thread may be in a collective that never returns

    def _wait_for_others(self, seconds: float) -> None:
        """Wait until the others have said how they end; the rank that holds the store a little
        longer, for their last words.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                states = [value.decode(errors="replace") for value in self.store.multi_get(self._keys("beat"))]
            except Exception:  # noqa: BLE001  the rank that held the store has gone, so everybody has been done
                return
            if not any(state.isdigit() for r, state in enumerate(states) if r != self.rank):
                time.sleep(2 * BEAT if self.holder == self.rank else 0)
                return
            time.sleep(BEAT / 5)

    def _guard(self) -> None:
        """End the process where the store does not answer at all, so that the watch itself
        hangs.
        """
        waited = time.monotonic()
        while not self._stopping.wait(BEAT):
            before, waited = waited, time.monotonic()
            if waited - before > SUSPECT:  # this process itself was stopped
                self._looked = waited
            if time.monotonic() - self._looked > SILENCE + SUSPECT and self.verdict is None and self.state.isdigit():
                holder = "the launcher" if self.holder is None else f"rank {self.holder} ({self.places[self.holder]})"
                text = f"{holder} was lost: its store has not answered for {SILENCE + SUSPECT:.0f} s (killed, stopped or cut off)"
                print(f"dsv4: rank {self.rank} ends: {text}", file=sys.stderr, flush=True)
                os._exit(EXIT)

    def _last_resort(self, status: int, seconds: float = 2 * FAREWELL) -> threading.Timer:
        """End the process in a while, should leaving it hang in the store or in a library's
        teardown.
        """
        timer = threading.Timer(seconds, os._exit, (status,))
        timer.daemon = True
        timer.start()
        return timer
