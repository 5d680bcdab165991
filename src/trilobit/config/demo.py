"""Settings of `trilobit demo`."""

from dataclasses import dataclass

from trilobit.config.fields import Count, require_seed


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Tune the embedded model to ternary and show what became of it."""

    out: str = "out/demo"
    """Run directory; an earlier demo there is replaced."""
    max_tokens: Count = 900_000
    """Tokens to tune on."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""
    seed: int = 0
    """Seed of data order and sampling."""

    def __post_init__(self) -> None:
        require_seed(self.seed)
