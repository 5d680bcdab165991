"""Settings of `trilobit generate`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from trilobit.config.fields import Count, ModelPath, require_seed
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt, streaming."""

    model: ModelPath
    """Hub id, checkpoint directory or run directory."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
    max_tokens: Count = 128
    """Most tokens to generate."""
    temperature: float = 0.0
    """0: always the likeliest token. Above: sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this probability."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; it must be 0 or above.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
