"""Settings of `trilobit chat`."""

from dataclasses import dataclass

from trilobit.config.fields import Count
from trilobit.config.running import RunningConfig
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatConfig(RunningConfig):
    """Talk to a model: a line is a turn, /reset forgets, /exit or end of input ends. History is kept."""

    system: str | None = None
    """A message that comes before the conversation."""
    max_tokens: Count = 512
    """Most tokens of a reply."""
    temperature: float = 0.7
    """0: always the likeliest token. Above: sampling."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens that holds this probability."""
    context: Count = 4096
    """Most tokens of a conversation, the model's positions at most; older turns are left out to make room."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context <= self.max_tokens:
            raise ConfigError(f"--context {self.context} leaves no room for a turn beside --max-tokens {self.max_tokens}.")
