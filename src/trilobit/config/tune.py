"""Settings of `trilobit tune`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trilobit.config.fields import Count, ModelPath
from trilobit.config.training import TrainingConfig
from trilobit.errors import ConfigError

ScheduleKind = Literal["layerwise", "layerwise-reverse", "sensitivity", "global", "immediate", "never"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainingConfig):
    """Turn a full-precision checkpoint into a ternary one (arXiv 2505.08823)."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "data": "data", "max_tokens": "budget", "placement": "ternary method", "schedule": "quantisation schedule",
        "reconstruct_tokens": "learning from the original", **TrainingConfig.HEADINGS, "model_format": "output",
    }  # fmt: skip

    model: ModelPath
    """Hub id or directory of a full-precision decoder-only checkpoint, or of a ternary one (`bitnet` in transformers) to be
    trained on as it is: at λ = 1, without an original to learn from."""

    placement: Literal["every", "output", "none"] = "every"
    """Extra RMSNorm before every projection · before attention output and MLP output only · nowhere."""
    gain: Literal["vector", "scalar"] = "vector"
    """One gain per channel of an inserted norm, or a single one."""
    gain_init: Literal["ones", "calibrated"] = "calibrated"
    """Gains start at one, or at the measured RMS of their input (which keeps the function)."""
    activations: Literal["int8", "none"] = "int8"
    """Inputs of ternary linears: int8 per token, or full precision (weights-only)."""
    scale: Literal["tensor", "row", "group-64", "group-128", "group-256"] = "tensor"
    """What one weight scale covers."""
    cover: Literal["projections", "+lm_head", "+embeddings"] = "projections"
    """What becomes ternary besides the decoder's projections. A tied head implies both."""
    dead_zone_bias: float | None = None
    """Tequila's ε: weights that quantise to zero add ε · their sum to the output, as a bias. The authors use 1e-3."""
    learned_ranges: bool = False
    """ParetoQ's quantiser: each row's scale is learned instead of taken from its weights. Needs --scale row."""

    schedule: ScheduleKind = "global"
    """How λ goes from 0 to 1: in all layers at once, layer after layer (first to last, or reverse), the same with more time for
    layers that cost more (measured first), from the first step, or never (full-precision control)."""
    ramp_fraction: float = 0.25
    """Fraction of the tokens by which λ is 1 everywhere."""
    overlap: float = 0.5
    """Of neighbouring layers' ramps in a schedule by layers: 0 strictly in turn, 1 all together."""
    activation_schedule: ScheduleKind | None = None
    """λ of activations, where it differs from that of weights."""
    activation_ramp_fraction: float | None = None
    """Ramp of activations, where it differs from that of weights."""

    reconstruct_tokens: Count | None = None
    """Tokens on which each layer first learns the original layer's output, one after the other: a warm start at λ = 1. Needs
    --schedule immediate."""

    distill: Literal["none", "logits"] | None = None
    """logits: learn from the original model, KL(original ‖ student) · T², instead of the text; none: from the text, which takes
    a quarter less time and memory for one model. Default: logits, but none with --schedule never."""
    distill_weight: float = 1.0
    """Share w of the distillation loss: (1 − w) · cross-entropy + w · KL."""
    temperature: float = 1.0
    """T of the distillation loss."""
    distill_hidden: float | None = None
    """Weight of a further loss: how far each layer's output is from the original's, relative to its length."""
    distill_attention: float | None = None
    """Weight of a further loss: how tokens relate in one attention layer's queries, keys and values (BitDistill)."""
    distill_attention_layer: int | None = None
    """That layer, 0 the first. Default: seven eighths of the way."""

    model_format: Literal["auto", "autobitlinear", "bitlinear", "dense", "packed", "none"] = "auto"
    """How model/ is stored. auto: what stock transformers loads where it can say it, else trilobit's packed form. none:
    only latent/ is kept."""
    store: Literal["bf16", "fp32"] = "bf16"
    """Precision of embeddings and head in model/ (and of dense weights), where the form allows a choice: transformers'
    bitnet classes need fp32."""

    @property
    def learns_from_original(self) -> bool:
        """Whether there is a teacher of logits."""
        return self.distill == "logits" or (self.distill is None and self.schedule != "never")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("overlap", "distill_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be from 0 to 1.")
        for name in ("ramp_fraction", "activation_ramp_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0 and at most 1.")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; it must be above 0.")
        if self.activation_schedule == "never" and self.schedule != "never":
            raise ConfigError("--activation-schedule never: for full-precision activations say --activations none.")
        if self.activation_schedule is not None or self.activation_ramp_fraction is not None:
            if self.activations == "none":
                raise ConfigError("--activation-schedule and --activation-ramp-fraction need --activations int8.")
            if self.schedule == "never" and self.activation_schedule != "never":
                raise ConfigError("--schedule never leaves activations alone: drop the activations' own schedule.")
        if self.reconstruct_tokens is not None:
            if self.schedule != "immediate":
                raise ConfigError(f"--reconstruct-tokens ends at λ = 1: it needs --schedule immediate, not {self.schedule}.")
            if self.reconstruct_tokens < self.sequence_length * self.sequences:
                raise ConfigError(f"--reconstruct-tokens {self.reconstruct_tokens} is less than one micro-batch.")
        if self.dead_zone_bias is not None and not 0 < self.dead_zone_bias < float("inf"):
            raise ConfigError(f"--dead-zone-bias is {self.dead_zone_bias}; it must be above 0.")
        if self.learned_ranges and (self.scale != "row" or self.cover != "projections" or self.dead_zone_bias):
            raise ConfigError("--learned-ranges needs --scale row, --cover projections and no --dead-zone-bias.")
        if self.distill_hidden is not None and not 0 < self.distill_hidden < float("inf"):
            raise ConfigError(f"--distill-hidden is {self.distill_hidden}; it must be above 0.")
        if not self.learns_from_original and self.distill_hidden is not None:
            raise ConfigError("--distill-hidden needs --distill logits.")
        if self.distill_attention is not None and not 0 < self.distill_attention < float("inf"):
            raise ConfigError(f"--distill-attention is {self.distill_attention}; it must be above 0.")
        if self.distill_attention_layer is not None and self.distill_attention is None:
            raise ConfigError("--distill-attention-layer needs --distill-attention.")
        if not self.learns_from_original and self.distill_attention is not None:
            raise ConfigError("--distill-attention needs --distill logits.")
        if not self.learns_from_original and (self.distill_weight != 1.0 or self.temperature != 1.0):
            raise ConfigError("--distill-weight and --temperature need --distill logits.")
