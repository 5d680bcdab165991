"""Settings of `trilobit generate`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from trilobit.config.running import RunningConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunningConfig):
    """Continue a prompt, streaming."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
