"""What is said of time: when a signal is obeyed, and how long a run takes."""

from typing import Any

import pytest

from trilobit.train.pace import Forecast, Pace, about


def test_a_signal_is_told_what_it_waits_for() -> None:
    """The step in progress and the seconds it has left, where the last one's are known; what a second signal leaves."""
    now = 100.0
    pace = Pace(clock=lambda: now)
    pace.begin()
    assert pace.outlook() == (
        "the run stops after the step in progress and saves a checkpoint; a second signal ends it at once "
        "(no checkpoint is there yet)"
    )
    now = 150.0
    pace.end("the evaluation in progress")
    assert "stops after the evaluation in progress and saves" in pace.outlook()
    pace.saved = 7
    pace.begin(evaluates=True)
    now = 160.0
    assert "stops after the step in progress and its evaluation, in about 40 s, and saves" in pace.outlook()
    assert pace.outlook().endswith("(the checkpoint of step 7 stands)")
    now = 300.0  # longer than the last one
    assert "evaluation and saves" in pace.outlook()


def row(step: int, speed: float) -> dict[str, Any]:
    return {"step": step, "tokens": step * 1000, "tokens_per_second": speed}


def test_a_long_run_says_so_once() -> None:
    """After the first step, in words, with the budget that an hour has room for; a short one says nothing."""
    said: list[str] = []
    forecast = Forecast(said.append, 10_000_000)
    forecast.hear(row(1, 38.0), compiled=False)
    forecast.hear(row(2, 38.0), compiled=False)
    assert said == [
        "this run takes about 3.0 days: 9,999,000 tokens at some 38 a second (--max-tokens 140k takes about an hour)"
    ]
    Forecast(said.append, 10_000_000).hear(row(1, 3000.0), compiled=False)
    assert len(said) == 1


def test_what_compiling_takes_foretells_nothing() -> None:
    """Of compiled layers the fastest of the first steps counts, unless one takes ten minutes; a run that is continued is not
    advised a budget that it cannot have."""
    said: list[str] = []
    forecast = Forecast(said.append, 10_000_000, budget=False)
    for step, speed in enumerate((9.0, 100.0, 9.0), 1):
        forecast.hear(row(step, speed), compiled=True)
    assert said == []
    forecast.hear(row(4, 50.0), compiled=True)
    assert said == ["this run takes about 27.8 hours: 9,996,000 tokens at some 100 a second"]
    forecast = Forecast(said.append, 10_000_000)
    forecast.hear(row(1, 1.5), compiled=True)
    assert len(said) == 2


def test_a_guess_before_the_first_step() -> None:
    """A token costs several forwards; it is said where that makes hours for sure, and then not again."""
    said: list[str] = []
    forecast = Forecast(said.append, 1_000_000)
    forecast.guess(400.0, 4)
    assert said == []
    forecast.guess(40.0, 4)
    forecast.hear(row(1, 10.0), compiled=False)
    (text,) = said
    assert text.startswith("at the speed of the original here, this run takes about 27.8 hours")


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (1800, "30 minutes"), (12_600, "3.5 hours"), (864_000, "10.0 days")]
)
def test_durations_are_words(seconds: float, text: str) -> None:
    """In the unit a person would choose."""
    assert about(seconds) == f"about {text}"
