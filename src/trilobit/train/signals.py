"""SIGTERM and SIGINT, remembered until work is at a boundary where it can be saved."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

INSISTING = "a second signal ends it at once"


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived. agreed: all ranks of the run know, and stop likewise. saved: the step that was, if any."""

    def __init__(self, number: int, agreed: bool = False, saved: int | None = None):
        super().__init__(signal.Signals(number).name)
        self.number, self.agreed, self.saved = number, agreed, saved
        self.exit_code = 128 + number


@dataclass
class Signals:
    """Remembers the first SIGTERM or SIGINT, so that long work can stop at a boundary of its own choosing."""

    number: int | None = None
    say: Callable[[str], None] = lambda text: None
    """Hears at once that the first one was noticed, and when it will be obeyed."""
    outlook: Callable[[], str] = lambda: f"the run stops as soon as it can; {INSISTING}"
    """What a run that is told to stop now does; work that knows more puts its own here (pace.py)."""

    def raise_if_set(self) -> None:
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def watch(self) -> Iterator["Signals"]:
        def remember(number: int, frame: FrameType | None) -> None:
            if self.number is not None:  # a second one means it
                raise KeyboardInterrupt
            self.number = number
            with suppress(OSError, RuntimeError, ValueError):  # nobody may be listening any more; the run is saved all the same
                self.say(f"{signal.Signals(number).name}: {self.outlook()}")

        try:
            before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: signals stay with whoever owns it
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
