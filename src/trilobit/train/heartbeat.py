"""Whether the other ranks are alive, by a thread that asks a store they all can reach.

Every rank counts up a number of its own there, and watches that of the next rank in a ring: four small messages a rank and
beat, however many ranks there are. A number that stands still for SILENCE seconds is a rank that is dead, stopped or cut off;
whoever sees it writes the reason down, and every rank that reads it ends its process with that reason one beat later, whatever
collective its main thread is waiting in, unless that has ended by itself. A rank that leaves with an error says so itself. A
store that does not answer for as long is missed by a second thread, which asks nobody.

    noticed after at most   SILENCE + 3 · BEAT = 55 s

A rank whose main thread hangs while its process lives goes on beating: that is noticed where the others wait for it in a
collective, after meeting.COLLECTIVE_MINUTES.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BEAT, SILENCE = 5.0, 40.0
"""Seconds between two beats; seconds of silence after which a rank counts as dead."""
LOST = 75
"""Exit code of a process whose run lost a rank."""


class Heartbeat:
    """Beats for one rank until it is closed. `store`: a connection of its own, as the thread waits in it.

    lost: called, from the thread, with the reason. By default it is said and the process ends.
    """

    def __init__(
        self, store: Any, rank: int, size: int, say: Callable[[str], None], lost: Callable[[str], None] | None = None,
        beat: float | None = None, silence: float | None = None,
    ):  # fmt: skip
        self.store, self.rank, self.size, self.say = store, rank, size, say
        self.lost = lost or self._end
        self.beat, self.silence = BEAT if beat is None else beat, SILENCE if silence is None else silence
        self.watched = (rank + 1) % size
        self._stop, self._beats = threading.Event(), 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()
        threading.Thread(target=self._watch_store, daemon=True, name="heartbeat-store").start()

    def close(self, farewell: str = "") -> None:
        """Stop. farewell: why this rank leaves early; empty when the run is over for all."""
        self._stop.set()
        self._thread.join(timeout=self.beat + 5)
        with suppress(RuntimeError):  # the store may be gone before us
            self.store.set(f"beat/{self.rank}", "done")
            if farewell:
                self.store.set("lost", f"rank {self.rank} left: {farewell}")

    def wait_for_all(self) -> None:
        """After `close`, while the others close theirs: no longer than it takes them to notice a farewell."""
        end = time.monotonic() + 3 * self.beat
        others = [f"beat/{rank}" for rank in range(self.size) if rank != self.rank]
        with suppress(RuntimeError):
            while time.monotonic() < end and not all(
                self.store.check([key]) and self.store.get(key) == b"done" for key in others
            ):
                time.sleep(0.05)

    def _run(self) -> None:
        count, seen, since, reason = 0, b"", time.monotonic(), ""
        while not self._stop.wait(self.beat if count else 0):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                found = self.store.get(f"beat/{self.watched}") if self.store.check([f"beat/{self.watched}"]) else b""
                now = time.monotonic()
                if found != seen:
                    seen, since = found, now
                if reason:
                    return self.lost(reason)
                if found != b"done" and now - since > self.silence:
                    self.store.set("lost", f"rank {self.watched} has given no sign of life for {now - since:.0f} s")
                if self.store.check(["lost"]):
                    reason = self.store.get("lost").decode()
                self._beats = count
            except RuntimeError as error:
                if not self._stop.is_set():
                    return self.lost(f"the store that all ranks share cannot be reached any more ({first_line(error)})")

    def _watch_store(self) -> None:
        """End if the other thread has not come back from the store for too long. Counts its own looks, not the clock: a process
        that was stopped and goes on has not been waiting."""
        seen, missed = -1, 0
        while not self._stop.wait(self.beat):
            seen, missed = self._beats, missed + 1 if self._beats == seen else 0
            if missed * self.beat > self.silence + self.beat:
                return self.lost(f"the store that all ranks share has not answered for {missed * self.beat:.0f} s")

    def _end(self, reason: str) -> None:
        with suppress(OSError, RuntimeError, ValueError):
            self.say(f"rank {self.rank} ends: {reason}. {AGAIN}")
        os._exit(LOST)


AGAIN = "The run continues from its last checkpoint with --resume; torchrun --max-restarts N does that by itself."


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
