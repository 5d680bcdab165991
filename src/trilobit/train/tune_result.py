"""What `trilobit tune` gave, as run.json keeps it."""

from dataclasses import dataclass

from trilobit.export.verify import in_words


@dataclass(frozen=True)
class TuneResult:
    """What a run gave. Nats are per token on the held-out windows; `base_` is the original model on the same windows."""

    out: str
    model: str
    form: str
    reason: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    base_nats_per_token: float
    nats_per_token: float
    base_perplexity: float
    perplexity: float
    heldout_tokens: int
    parameters: int
    ternary_parameters: int
    base_bytes: int
    model_bytes: int
    agreement: dict[str, float]

    def words(self) -> dict[str, str]:
        """What people are told instead of numbers."""
        return {"agreement": in_words(self.agreement)}
