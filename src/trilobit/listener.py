"""How long work tells whoever started it what is going on. Nothing below the command line prints."""

import time
from collections.abc import Callable
from typing import Any


class Listener:
    """Hears notes (choices and their reasons, tables) and rows of numbers. This one ignores them."""

    def note(self, text: str) -> None:
        """A line or table for the user."""

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        """A row of log.jsonl, as it is written."""

    def progress(self, what: str, done: int, total: int, seconds: float) -> None:
        """How far something got that took `seconds` until now. total is 0 where it is not known."""

    def stream(self, text: str) -> None:
        """A piece of generated text."""


SILENT = Listener()


def timed(listener: Listener, what: str) -> Callable[[int, int], None]:
    """Tells a listener how far something got, (done, total), and how long it took since now."""
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        listener.progress(what, done, total, time.perf_counter() - start)

    return progress
