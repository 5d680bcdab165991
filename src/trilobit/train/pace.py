"""How long steps take, for the two things a user wants to know of it: when a signal is obeyed, and when the run ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from trilobit.config.fields import format_count
from trilobit.train.signals import INSISTING

LONG_SECONDS = 3600.0  # a run of which it is said before it has taken that long
SURELY_LONG_SECONDS = 4 * LONG_SECONDS  # bf16 may be faster than the fp32 of measuring
SETTLED_ROWS = 4  # compiled layers are compiled again where λ leaves 0 and where it reaches 1
SURE_SECONDS = 600.0  # of one step, beside which compiling is little
LEAST_BUDGET, DIGITS = 10_000, 2  # what is advised, and how precisely


@dataclass
class Pace:
    """Of one process in its training loop. saved: the step of its newest checkpoint, 0 if there is none."""

    saved: int = 0
    clock: Callable[[], float] = time.perf_counter
    doing: str = "the step in progress"
    """What a signal has to wait for."""
    seconds: float | None = None
    """Of the last step."""
    began: float | None = None
    """When the present step did; None between steps."""

    def begin(self, evaluates: bool = False) -> None:
        """A step, which may be followed by an evaluation."""
        self.began = self.clock()
        self.doing = "the step in progress" + (" and its evaluation" if evaluates else "")

    def end(self, then: str) -> None:
        """The step is done; what a signal has to wait for from now on."""
        if self.began is not None:
            self.seconds, self.began = self.clock() - self.began, None
        self.doing = then

    def outlook(self) -> str:
        """What becomes of a run that is told to stop now."""
        left = 0.0 if self.seconds is None or self.began is None else self.began + self.seconds - self.clock()
        when = f"{self.doing}, in {about(left)}," if left >= 1 else self.doing
        stands = f"the checkpoint of step {self.saved} stands" if self.saved else "no checkpoint is there yet"
        return f"the run stops after {when} and saves a checkpoint; {INSISTING} ({stands})"


@dataclass
class Forecast:
    """Says once how long a run takes, if that is long. budget: whether another --max-tokens may still be chosen."""

    say: Callable[[str], None]
    max_tokens: int
    budget: bool = True
    rows: int = 0
    fastest: float = 0.0
    said: bool = False

    def hear(self, row: dict[str, float], compiled: bool) -> None:
        """A row of log.jsonl. The first steps of compiled layers are slow, and foretell nothing."""
        self.rows += 1
        self.fastest = max(self.fastest, row["tokens_per_second"])
        step_seconds = row["tokens"] / row["step"] / max(row["tokens_per_second"], 1e-9)
        if not compiled or self.rows >= SETTLED_ROWS or step_seconds >= SURE_SECONDS:
            self._say(self.fastest, int(row["tokens"]), "this run takes", LONG_SECONDS)

    def guess(self, forward_tokens_per_second: float, forwards: int) -> None:
        """Before the first step, from the speed of a forward pass: a token costs so many. Said only where hours are sure."""
        self._say(
            forward_tokens_per_second / forwards, 0, "at the speed of the original here, this run takes", 4 * LONG_SECONDS
        )

    def _say(self, tokens_per_second: float, done: int, what: str, least: float) -> None:
        speed, tokens = max(tokens_per_second, 1e-9), self.max_tokens - done
        if self.said or tokens / speed <= least:
            return
        self.said = True
        text = f"{what} {about(tokens / speed)}: {tokens:,} tokens at some {float(f'{speed:.2g}'):,g} a second"
        in_an_hour = int(float(f"{speed * LONG_SECONDS:.{DIGITS}g}"))
        if self.budget and in_an_hour >= LEAST_BUDGET:
            text += f" (--max-tokens {format_count(in_an_hour)} takes about an hour)"
        self.say(text)


def about(seconds: float) -> str:
    """A duration in words: `about 40 s`, `about 3.5 hours`."""
    for unit, size, most in (("s", 1.0, 90), ("minutes", 60.0, 90), ("hours", 3600.0, 48)):
        if seconds / size < most:
            number = f"{seconds / size:.1f}" if unit == "hours" else f"{seconds / size:.0f}"
            return f"about {number} {unit}"
    return f"about {seconds / 86400:,.1f} days"
