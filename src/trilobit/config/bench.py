"""Settings of `trilobit bench`."""

from dataclasses import dataclass

from trilobit.config.fields import Count
from trilobit.config.running import EngineConfig


@dataclass(frozen=True, kw_only=True)
class BenchConfig(EngineConfig):
    """Measure a model's speed: a prompt, then one token after another, against what memory allows."""

    prompt_tokens: Count | None = None
    """Tokens of the prompt. Default: 512, or as many as the model has positions for beside --tokens."""
    tokens: Count = 64
    """Tokens to generate after it."""
    rounds: Count = 5
    """Measurements; the medians are reported."""
