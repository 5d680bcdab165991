"""Settings of `trilobit generate`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from trilobit.config.fields import Count
from trilobit.config.running import RunningConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunningConfig):
    """Continue a prompt, streaming."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
    max_tokens: Count | None = None
    """Most tokens to generate. Default: 128, or as many as the model has positions left."""
