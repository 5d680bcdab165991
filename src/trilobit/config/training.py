"""What every training command shares: data, budget, optimizer, precision, logging. One loop reads all of it."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from trilobit.config.fields import Count, require_seed
from trilobit.errors import ConfigError

Gather = Literal["auto", "layer", "step"]
LEAST_EVALUATION = 4096  # tokens, unless --eval-tokens says less
USUAL_STEPS, LEAST_BATCH, MOST_BATCH = 4000, 1024, 65_536  # unless --batch-tokens says otherwise


def mesh_of(text: str) -> tuple[str, int, int]:
    """--mesh as its kind and, of hsdp, R copies and S parts (else 0, 0). Raises ConfigError for what is none."""
    if text in ("auto", "ddp", "fsdp"):
        return text, 0, 0
    if text in ("fsdp1", "FSDP"):
        raise ConfigError(
            f"--mesh {text}: FSDP1 cuts flattened parameters, in which no matrix can be found any more for its scale or for "
            "Muon; --mesh fsdp is FSDP2, which keeps rows together."
        )
    match = re.fullmatch(r"hsdp:([1-9]\d*)x([1-9]\d*)", text)
    if match is None or int(match[2]) < 2:
        raise ConfigError(f"--mesh is {text!r}; it must be auto, ddp, fsdp or hsdp:RxS (R copies in S ≥ 2 parts), as hsdp:2x8.")
    return "hsdp", int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training loop."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "data": "data", "max_tokens": "budget", "optimizer": "optimisation", "eval_every": "evaluation", "out": "output",
        "precision": "hardware",
    }  # fmt: skip
    """Where headings of --help begin (flags.py)."""

    data: str
    """Hub id (`owner/name:config`, streamed), local .txt/.jsonl/.jsonl.gz/.parquet files or globs (comma-separated),
    `stdlib` (the running Python's standard library), or `self` (text sampled from the model itself)."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and hub data."""
    self_tokens: Count | None = None
    """Tokens to sample for --data self; a longer run sees them again. Default: as many as it trains on."""
    cache_dir: str | None = None
    """Where tokenised data is kept. Default: ~/.cache/trilobit/tokens, or trilobit/tokens in $XDG_CACHE_HOME."""
    seed: int = 0
    """Seed of the order of the data, and of dropout where a model has it. Equal seeds give equal runs."""

    max_tokens: Count = 10_000_000
    """Tokens to train on."""
    batch_tokens: Count | None = None
    """Tokens per optimizer step, rounded to whole micro-batches. Default: a four-thousandth of --max-tokens, but
    1,024 at least and 65,536 at most (in small runs it is updates that lack); a GPU is busier with more."""
    sequence_length: int = 512
    """Tokens per sequence: as many as the model will be read with. Beyond them it can be far worse."""
    sequences: int = 8
    """Most sequences per micro-batch: what is in memory at once. Less needs less memory and changes no result but rounding."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices inside the decoder layers and AdamW for the rest (one rate for both)."""
    muon_coefficients: Literal["quintic", "polar-express"] = "quintic"
    """Polynomials of Muon's iteration: Jordan's one, five times, or five of their own (arXiv 2505.16932)."""
    muon_scale: Literal["rms", "spectral"] = "rms"
    """Length of Muon's steps: root mean square as AdamW's, so that one rate serves both, or one spectral norm."""
    normuon: bool = False
    """Divide each row of Muon's update by its running root mean square (NorMuon, arXiv 2510.05491)."""
    muon_embeddings: bool = False
    """Muon trains embedding and head as well."""
    lr: float | None = None
    """Peak learning rate. Default: 0.03 / √hidden size (1.3e-3 at width 576, 4.7e-4 at 4096), after the best rates that were
    found at widths 64 to 576."""
    warmup_fraction: float = 0.02
    """Fraction of the tokens in which the learning rate rises."""
    decay: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: a cosine to zero, or warmup-stable-decay (linear to zero over the last --decay-fraction)."""
    decay_fraction: float = 0.2
    """Fraction of the tokens in which `wsd` decays."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices."""
    clip: float = 1.0
    """Largest gradient norm."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision. auto: bf16 on a GPU that has it; on a CPU what multiplies faster. Latent weights are fp32 always."""
    optimizer_state: Literal["fp32", "bf16", "int8"] = "fp32"
    """How moments are kept between steps. bf16: half of the bytes. int8: a quarter of Muon's momentum (blocks of 256), the
    other moments in bf16."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """bf16 halves them. One process only: several share them out."""
    offload: bool = False
    """Keep moments in the host's memory, from where they visit the GPU a few parameters at a time: the same results, slower."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile each decoder layer. auto: where a compiler is found and the run is long enough to repay it."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation of transformers while training. Default: its own choice. (On a CPU `eager` can be faster for
    narrow heads, and in bf16 for windows of 512 and shorter where layers are compiled.)"""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    mesh: str = "auto"
    """How several processes (torchrun) share the model: `ddp` (a copy each), `fsdp` (each holds a part), `hsdp:RxS` (R copies
    in S parts each). auto: a copy each where that fits, unless Muon's work is to be shared, else parts. A step has the same
    samples for any number of ranks."""
    gather: Gather = "auto"
    """Of a model in parts: put a layer together for each of its forwards and backwards, or all layers once a step (4 bytes a
    parameter more; half of the traffic or less). auto: once a step where that takes an eighth of the memory at most."""
    eval_every: Count | None = None
    """Tokens between evaluations. Default: a tenth of --max-tokens."""
    eval_tokens: Count | None = None
    """Held-out tokens per evaluation. Default: a thirty-second of --max-tokens, but 4,096 at least and 65,536 at most."""

    out: str | None = None
    """Run directory. Default: out/ and the model's name."""
    resume: bool = False
    """Continue the run in --out, bit-exactly, from its newest checkpoint. Ctrl-C or SIGTERM stop a run after the step in
    progress, which on a CPU can take minutes, and save one; a second signal ends it at once, and the last one stands."""
    checkpoint_every: Count | None = None
    """Tokens between checkpoints. Default: a quarter of --max-tokens."""
    keep_checkpoints: int = 1
    """Newest checkpoints that are kept."""
    track: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Also log there (log.jsonl is always written)."""

    def __post_init__(self) -> None:
        positive = (
            "sequence_length", "sequences", "keep_checkpoints", "clip", "max_tokens", "batch_tokens", "eval_tokens",
            "eval_every", "checkpoint_every", "self_tokens",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0.")
        require_seed(self.seed)
        mesh_of(self.mesh)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ConfigError(f"--lr is {self.lr}; it must be a number above 0.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"--weight-decay is {self.weight_decay}; it must be 0 or above.")
        if self.lr is not None and self.lr * self.weight_decay >= 1:
            raise ConfigError(f"--weight-decay {self.weight_decay:g}: at --lr {self.lr:g} a step would turn weights round.")
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be from 0 to 1.")
        if self.optimizer != "muon":
            chosen = {"muon_coefficients": "quintic", "muon_scale": "rms", "normuon": False, "muon_embeddings": False}
            if changed := [name for name, usual in chosen.items() if getattr(self, name) != usual]:
                raise ConfigError(f"--{changed[0].replace('_', '-')} needs --optimizer muon.")
        if self.self_tokens is not None and self.data != "self":
            raise ConfigError("--self-tokens needs --data self.")
        if self.max_tokens < self.tokens_per_step:
            raise ConfigError(
                f"--max-tokens {self.max_tokens} is less than one step of {self.tokens_per_step} tokens "
                f"({self.micro_batch * self.accumulation} sequences of {self.sequence_length}); lower --sequence-length"
                f"{' or --batch-tokens' if self.micro_batch * self.accumulation > 1 else ''}."
            )

    @property
    def evaluation_tokens(self) -> int:
        """Held-out tokens per evaluation."""
        return self.eval_tokens or max(LEAST_EVALUATION, min(65_536, self.max_tokens // 32))

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch: as many as a step has, --sequences at most."""
        return max(1, min(self.sequences, round(self._wanted_tokens / self.sequence_length)))

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return max(1, round(self._wanted_tokens / (self.micro_batch * self.sequence_length)))

    @property
    def tokens_per_step(self) -> int:
        return self.accumulation * self.micro_batch * self.sequence_length

    @property
    def _wanted_tokens(self) -> int:
        least = min(LEAST_BATCH, self.max_tokens // 2)
        return self.batch_tokens or max(least, min(MOST_BATCH, self.max_tokens // USUAL_STEPS))

    @property
    def steps(self) -> int:
        return self.max_tokens // self.tokens_per_step
