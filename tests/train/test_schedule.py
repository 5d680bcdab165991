import json
import math
from dataclasses import asdict
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobit.config.training import TrainingConfig
from trilobit.train.schedule import StrengthSchedule, learning_rate, sensitivity_schedule, strength_schedule

TOKENS = 1_000_000
LAYERS = st.integers(1, 40)
OVERLAPS = st.floats(0, 1)
FRACTIONS = st.floats(0.01, 1)


def closed_form(u: float, layers: int, overlap: float) -> list[float]:
    """design.md: r = 1/(1 + (L−1)(1−o)); λ_l = clip((u − l·r·(1−o))/r, 0, 1), in exact arithmetic."""
    u_, o = Fraction(u), Fraction(overlap)
    r = 1 / (1 + (layers - 1) * (1 - o))
    return [float(min(max((u_ - layer * r * (1 - o)) / r, Fraction(0)), Fraction(1))) for layer in range(layers)]


@given(LAYERS, OVERLAPS, FRACTIONS, st.floats(0, 1.2))
def test_layerwise_follows_the_closed_form(layers: int, overlap: float, ramp: float, u: float) -> None:
    """λ of every layer is design.md's formula of the fraction of the ramp, and the reverse schedule is its mirror."""
    expected = closed_form(min(u, 1), layers, overlap)
    tokens = u * ramp * TOKENS
    found = strength_schedule("layerwise", layers, TOKENS, ramp, overlap).at(tokens)
    assert found == pytest.approx(expected, abs=1e-9 * layers)
    assert strength_schedule("layerwise-reverse", layers, TOKENS, ramp, overlap).at(tokens) == found[::-1]


@given(LAYERS, OVERLAPS, FRACTIONS)
def test_the_ramp_has_exact_ends(layers: int, overlap: float, ramp: float) -> None:
    """λ is exactly 0 everywhere at the start, which the first layer leaves at once, and exactly 1 everywhere at the ramp's
    end, which the last layer reaches only then."""
    schedule = strength_schedule("layerwise", layers, TOKENS, ramp, overlap)
    end = ramp * TOKENS
    assert schedule.at(0) == [0.0] * layers
    assert schedule.starts[0] == 0
    assert schedule.at(end * 1e-3)[0] > 0
    assert schedule.at(end) == schedule.at(TOKENS) == [1.0] * layers
    assert schedule.at(end * (1 - 1e-3))[-1] < 1


@given(LAYERS, OVERLAPS, FRACTIONS, st.floats(0, 100))
def test_equal_costs_are_the_layerwise_schedule(layers: int, overlap: float, ramp: float, cost: float) -> None:
    """Layers that cost alike, or nothing, or less than nothing, fade in as if nothing had been measured."""
    whole = strength_schedule("layerwise", layers, TOKENS, ramp, overlap)
    for costs in ([cost] * layers, [-cost] * layers):
        found = sensitivity_schedule(costs, TOKENS, ramp, overlap)
        assert found.starts == pytest.approx(whole.starts, rel=1e-9, abs=1e-6)
        assert found.ends == pytest.approx(whole.ends, rel=1e-9)


@given(st.lists(st.floats(-1, 50), min_size=1, max_size=40), OVERLAPS, FRACTIONS)
def test_ramps_grow_with_costs(costs: list[float], overlap: float, ramp: float) -> None:
    """Layers start in order, each ramp is as long as its cost and the mean cost together, and the last to end does so when
    the ramp is over."""
    found = sensitivity_schedule(costs, TOKENS, ramp, overlap)
    assert found.ends is not None
    assert found.starts[0] == 0 and list(found.starts) == sorted(found.starts)
    assert max(found.ends) == pytest.approx(ramp * TOKENS, rel=1e-9) and max(found.ends) <= ramp * TOKENS
    mean = sum(max(cost, 0) for cost in costs) / len(costs)
    if mean > 1e-3:
        lengths = [end - start for start, end in zip(found.starts, found.ends, strict=True)]
        rates = [length / (max(cost, 0) + mean) for length, cost in zip(lengths, costs, strict=True)]
        assert rates == pytest.approx([rates[0]] * len(costs), rel=1e-3)


@given(st.sampled_from(["layerwise", "layerwise-reverse", "global"]), LAYERS, OVERLAPS, FRACTIONS, st.lists(st.floats(0, 1.1)))
def test_strengths_only_rise(kind: Any, layers: int, overlap: float, ramp: float, moments: list[float]) -> None:
    """λ stays in [0, 1], never falls with tokens, and never rises along the layers (falls, in reverse)."""
    schedule = strength_schedule(kind, layers, TOKENS, ramp, overlap)
    rows = [schedule.at(moment * TOKENS) for moment in sorted(moments)]
    for row in rows:
        assert all(0 <= value <= 1 for value in row)
        assert row == sorted(row, reverse=kind != "layerwise-reverse")
    for before, after in pairwise(rows):
        assert all(a <= b for a, b in zip(before, after, strict=True))


@given(LAYERS, FRACTIONS, OVERLAPS)
def test_full_overlap_is_global(layers: int, ramp: float, overlap: float) -> None:
    """Overlap 1 is the global schedule, which knows no overlap; a single layer knows none either."""
    whole = strength_schedule("global", layers, TOKENS, ramp, overlap)
    assert strength_schedule("layerwise", layers, TOKENS, ramp, 1.0) == whole
    assert whole.at(ramp * TOKENS / 2) == pytest.approx([0.5] * layers)
    assert strength_schedule("layerwise", 1, TOKENS, ramp, overlap) == strength_schedule("global", 1, TOKENS, ramp, 0)


def test_no_overlap_is_strictly_in_turn() -> None:
    """With overlap 0 each layer starts where the one before it ends."""
    schedule = strength_schedule("layerwise", 4, TOKENS, 0.4, 0.0)
    assert schedule.starts == pytest.approx((0, 100_000, 200_000, 300_000))
    assert schedule.ends == pytest.approx((100_000, 200_000, 300_000, 400_000))
    assert schedule.at(150_000) == pytest.approx([1, 0.5, 0, 0])


def test_immediate_and_never() -> None:
    """`immediate` is exactly 1 from token 0, `never` exactly 0 to the last."""
    immediate, never = (strength_schedule(kind, 3, TOKENS, 0.25, 0.5) for kind in ("immediate", "never"))
    for tokens in (0, 1, TOKENS):
        assert immediate.at(tokens) == [1.0] * 3
        assert never.at(tokens) == [0.0] * 3


@given(st.sampled_from(["layerwise", "layerwise-reverse", "global", "immediate", "never"]), LAYERS, OVERLAPS, FRACTIONS)
def test_schedules_are_stored_by_value(kind: Any, layers: int, overlap: float, ramp: float) -> None:
    """What run.json holds is the schedule itself, to the last bit, whatever later code computes from the settings."""
    schedule = strength_schedule(kind, layers, TOKENS, ramp, overlap)
    assert StrengthSchedule.from_json(json.loads(json.dumps(asdict(schedule)))) == schedule


def test_descriptions_say_when() -> None:
    """The line for the user says at which tokens λ rises, shortened for many layers."""
    kinds: list[Any] = ["layerwise", "global", "immediate", "never"]
    said = {kind: strength_schedule(kind, 12, TOKENS, 0.5, 0.5).describe() for kind in kinds}
    assert said["layerwise"].startswith("λ goes from 0 to 1 at tokens 0–76,923, 38,462–115,385")
    assert said["layerwise"].endswith("…, 384,615–461,538, 423,077–500,000")
    assert said["global"].endswith("0–500,000 in every layer")
    assert "first step" in said["immediate"]
    assert "stays 0" in said["never"]


def rates(**settings: Any) -> list[float]:
    config = TrainingConfig(
        data="d", **{"max_tokens": 1000, "batch_tokens": 1, "sequences": 1, "sequence_length": 1, **settings}
    )
    return [learning_rate(config, 2.0, step * config.tokens_per_step) for step in range(config.steps)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    """The first step already learns, each further one by the same amount more, up to the peak."""
    assert rates(warmup_fraction=0.1)[:100] == pytest.approx([2.0 * (i + 1) / 100 for i in range(100)])
    assert max(rates(warmup_fraction=0.1)) == pytest.approx(2.0)
    assert rates(warmup_fraction=0)[0] == 2.0
    assert rates(warmup_fraction=0.5, max_tokens=1) == [2.0]


def test_cosine_ends_near_zero() -> None:
    """After warm-up the rate is half a cosine from the peak to almost nothing."""
    found = rates(warmup_fraction=0.2)[200:]
    expected = [1 + math.cos(math.pi * i / 800) for i in range(800)]
    assert found == pytest.approx(expected)
    assert 0 < found[-1] < 1e-4


def test_stable_decay_has_a_plateau() -> None:
    """wsd stays at the peak exactly until the last fraction, and then falls linearly to almost nothing."""
    found = rates(decay="wsd", warmup_fraction=0.1, decay_fraction=0.25)
    assert set(found[100:751]) == {2.0}
    assert found[751:] == pytest.approx([2.0 * (1000 - i) / 250 for i in range(751, 1000)])
    assert 0 < found[-1] < 0.01


@given(
    st.sampled_from(["cosine", "wsd"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 60),
    st.integers(1, 7),
    st.integers(0, 6),
)
def test_rates_are_sane_for_all_settings(decay: str, warmup: float, fraction: float, steps: int, size: int, rest: int) -> None:
    """For any settings every step's rate is above 0 and at most the peak, and rises and falls once."""
    found = rates(
        decay=decay,
        warmup_fraction=warmup,
        decay_fraction=fraction,
        batch_tokens=size,
        sequences=size,
        max_tokens=steps * size + rest % size,
    )
    assert len(found) == steps
    assert all(0 < rate <= 2.0 for rate in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
