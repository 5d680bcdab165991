"""How long work tells whoever started it what is going on. Nothing below the command line prints."""

from typing import Any


class Listener:
    """Hears notes (choices and their reasons, tables) and rows of numbers. This one ignores them."""

    def note(self, text: str) -> None:
        """A line or table for the user."""

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        """A row of log.jsonl, as it is written."""

    def stream(self, text: str) -> None:
        """A piece of generated text."""


SILENT = Listener()
