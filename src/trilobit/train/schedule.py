"""When each layer is quantised how strongly, and how fast it learns: pure functions of the tokens seen.

λ rises linearly. With u ∈ [0, 1] the fraction of the ramp, L layers and overlap o of neighbouring layers' ramps,

    r = 1 / (1 + (L − 1)(1 − o))        λ_l(u) = clip((u − l · r · (1 − o)) / r, 0, 1)

so that the first layer starts at u = 0 and the last ends at u = 1. o = 1 is the global schedule. Where layers do not cost
alike (sensitivity.py), ramps of different lengths follow each other in the same way. The staging is ours: arXiv 2505.08823
describes a gradual, layer-wise schedule without its exact form. A run stores each layer's start and end in tokens, by
value, so that a resumed run cannot disagree with the one it continues.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from trilobit.config.training import TrainingConfig
from trilobit.config.tune import ScheduleKind


@dataclass(frozen=True)
class StrengthSchedule:
    """Tokens at which each layer's λ leaves 0 and reaches 1. `None` stands for never."""

    starts: tuple[float, ...]
    ends: tuple[float, ...] | None

    def at(self, tokens: float) -> list[float]:
        """λ of each layer after `tokens` tokens."""
        if self.ends is None:
            return [0.0] * len(self.starts)
        return [_ramp(tokens, start, end) for start, end in zip(self.starts, self.ends, strict=True)]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StrengthSchedule":
        return cls(tuple(value["starts"]), None if value["ends"] is None else tuple(value["ends"]))

    def describe(self) -> str:
        if self.ends is None:
            return "λ stays 0: the full-precision control"
        if not any(self.ends):
            return "λ = 1 from the first step"
        spans = [f"{start:,.0f}–{end:,.0f}" for start, end in zip(self.starts, self.ends, strict=True)]
        shown = spans if len(set(spans)) > 1 else spans[:1]
        if len(shown) > 6:
            shown = [*shown[:3], "…", *shown[-2:]]
        return f"λ goes from 0 to 1 at tokens {', '.join(shown)}" + (" in every layer" if len(shown) == 1 else "")


def strength_schedule(
    kind: ScheduleKind, layers: int, max_tokens: int, ramp_fraction: float, overlap: float
) -> StrengthSchedule:
    """The schedule of `layers` layers whose ramp ends after ramp_fraction · max_tokens tokens."""
    if kind == "never":
        return StrengthSchedule((0.0,) * layers, None)
    if kind == "immediate":
        return StrengthSchedule((0.0,) * layers, (0.0,) * layers)
    ramp = ramp_fraction * max_tokens
    step = 0.0 if kind == "global" else 1.0 - overlap
    width = 1.0 / (1.0 + (layers - 1) * step)
    starts = tuple(layer * width * step * ramp for layer in range(layers))
    ends = tuple(min(start + width * ramp, ramp) for start in starts)
    if kind == "layerwise-reverse":
        starts, ends = starts[::-1], ends[::-1]
    return StrengthSchedule(starts, ends)


def sensitivity_schedule(costs: Sequence[float], max_tokens: int, ramp_fraction: float, overlap: float) -> StrengthSchedule:
    """First layer to last, each with a ramp as long as it costs nats to quantise it alone, half of the time shared equally.

    costs: nats per layer; negative ones count as zero. Equal costs give the layerwise schedule.
    """
    mean = max(sum(max(cost, 0.0) for cost in costs) / len(costs), 1e-6)
    widths = [max(cost, 0.0) + mean for cost in costs]
    starts = [0.0, *accumulate(width * (1.0 - overlap) for width in widths[:-1])]
    whole = max(start + width for start, width in zip(starts, widths, strict=True))
    scale = ramp_fraction * max_tokens / whole
    ends = [min((start + width) * scale, ramp_fraction * max_tokens) for start, width in zip(starts, widths, strict=True)]
    return StrengthSchedule(tuple(start * scale for start in starts), tuple(ends))


def learning_rate(config: TrainingConfig, peak: float, tokens: int) -> float:
    """Rate of the step that begins after `tokens` tokens: linear warm-up, then cosine or stable-and-linear decay to 0."""
    progress = tokens / config.max_tokens
    step = config.tokens_per_step / config.max_tokens
    if progress < config.warmup_fraction:
        return peak * min(1.0, (progress + step) / config.warmup_fraction)
    if config.decay == "cosine":
        span = max(1.0 - config.warmup_fraction, step)
        return peak * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup_fraction) / span))
    start = max(1.0 - config.decay_fraction, config.warmup_fraction)
    return peak if progress <= start else peak * (1.0 - progress) / (1.0 - start)


def _ramp(tokens: float, start: float, end: float) -> float:
    if tokens >= end:
        return 1.0
    return 0.0 if tokens <= start else (tokens - start) / (end - start)
