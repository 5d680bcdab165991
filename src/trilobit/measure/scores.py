"""Scores of benchmarks: against chance, against the original, averaged, as a table.

    above chance = (score − chance)/(1 − chance)        retention = (score − chance)/(original − chance)

Chance is what guessing scores. Retention is left out where the original is within two standard errors of chance: it would
be a ratio of noise.

The average is over benchmarks, each by the metric that people quote: acc_norm where the task has it, else acc, else
exact_match; a task without these is not averaged. A benchmark of two tasks (osp10's ARC) counts once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

QUOTED = ("acc_norm", "acc", "exact_match")
NOISE = 2.0  # standard errors
COLUMNS = ("task", "metric", "shots", "examples", "score", "± stderr", "chance", "above chance", "original", "retention")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. metric: lm-eval's, with its filter if it has one. averaged: it counts in the average."""

    task: str
    metric: str
    score: float
    stderr: float | None
    chance: float | None
    examples: int
    shots: int | None
    version: str
    above_chance: float | None = None
    averaged: bool = False
    original_score: float | None = None
    original_stderr: float | None = None
    retention: float | None = None


@dataclass(frozen=True)
class Averages:
    """Over the benchmarks; None where a score, a chance or an original is missing."""

    average: float | None
    average_stderr: float | None
    average_above_chance: float | None
    original_average: float | None
    retention: float | None


def above_chance(score: float | None, chance: float | None) -> float | None:
    """(score − chance)/(1 − chance)."""
    return None if score is None or chance is None or chance >= 1.0 else (score - chance) / (1.0 - chance)


def retention(score: float | None, chance: float | None, original: float | None, stderr: float | None) -> float | None:
    """(score − chance)/(original − chance); None where the original, of this standard error, is not clear of chance."""
    if score is None or chance is None or original is None or original - chance <= NOISE * (stderr or 0.0):
        return None
    return (score - chance) / (original - chance)


def compared(rows: list[TaskScore], originals: list[TaskScore] | None, counted: dict[str, str]) -> list[TaskScore]:
    """The rows with all that follows from chance, from the same rows of the original, and from `counted` (task →
    benchmark)."""
    quoted: dict[str, str] = {}
    for name in QUOTED:
        for row in rows:
            if row.task in counted and row.metric.split(",")[0] == name:
                quoted.setdefault(row.task, row.metric)
    rows = [
        replace(row, above_chance=above_chance(row.score, row.chance), averaged=quoted.get(row.task) == row.metric)
        for row in rows
    ]
    return rows if originals is None else [_beside(*pair) for pair in zip(rows, originals, strict=True)]


def _beside(row: TaskScore, original: TaskScore) -> TaskScore:
    here, there = ((r.task, r.metric, r.examples, r.shots) for r in (row, original))
    assert here == there, (here, there)
    kept = retention(row.score, row.chance, original.score, original.stderr)
    return replace(row, original_score=original.score, original_stderr=original.stderr, retention=kept)


def averages(rows: list[TaskScore], counted: dict[str, str]) -> Averages:
    """Means over benchmarks of the rows that count."""
    benchmarks: dict[str, list[TaskScore]] = defaultdict(list)
    for row in rows:
        if row.averaged:
            benchmarks[counted[row.task]].append(row)

    def over(name: str, mean: Callable[[Iterable[float]], float]) -> float | None:
        values = [[getattr(row, name) for row in members] for members in benchmarks.values()]
        known = bool(values) and all(value is not None for members in values for value in members)
        return mean([mean(members) for members in values]) if known else None

    score, chance, original = over("score", fmean), over("chance", fmean), over("original_score", fmean)
    return Averages(
        average=score,
        average_stderr=over("stderr", _stderr_of_mean),
        average_above_chance=above_chance(score, chance),
        original_average=original,
        retention=retention(score, chance, original, over("original_stderr", _stderr_of_mean)),
    )


def _stderr_of_mean(stderrs: Iterable[float]) -> float:
    """√Σσ² / n: the questions of different tasks are independent."""
    stderrs = list(stderrs)
    return math.hypot(*stderrs) / len(stderrs)


def table(rows: list[TaskScore]) -> list[str]:
    """Lines for people. Columns that hold nothing are left out."""
    lines: list[list[str]] = [list(COLUMNS)]
    before = None
    for row in rows:
        task, before = "" if row.task == before else row.task, row.task
        numbers = (row.score, row.stderr, row.chance, row.above_chance, row.original_score, row.retention)
        lines.append([task, row.metric + " *" * row.averaged, *map(text, (row.shots, row.examples, *numbers))])
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    cells = [[line[i].ljust(widths[i]) if i < 2 else line[i].rjust(widths[i]) for i in used] for line in lines]
    return ["  ".join(line).rstrip() for line in cells] + ["* counts in the average"]


def text(value: Any) -> str:
    """A value for people: nothing for None, four decimals, thousands separated."""
    if value is None:
        return ""
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
