"""What training a model on many GPUs takes, before any is rented: memory, arithmetic and communication of a rank, counted.

    memory   latents 4·P/S + gradients 4·P/S + moments (AdamW 8, Muon 4 a matrix' number) /S + what is gathered for a while
             (narrower gradients and moments as asked; moments in the host's memory take none)
             + activations (measured on fake tensors: what autograd saves of one layer, and of the head) + teacher 2·P/S;
             before the first step rows of the original, a teacher and the student at most, which is less (original.py)
    compute  6·(P − embeddings) + 6·L·T·D of causal attention, a token; + a forward where activations are computed again
             or where there is a teacher; Muon's iteration, 5·(4·R²C + 2·R³) a matrix, over its S owners
    network  ddp 2·4·P · fsdp 4·P twice a micro-batch and once a step, or twice a step where rows are gathered once and kept
             (a teacher 2·P a micro-batch, or nothing) · hsdp that within S, and 2·4·P/S over the copies
             · Muon (4 + 2)·P/S between owners, each of which waits for the one with the most matrices of a shape
    host     moments there and back, over the link between a GPU and its host

A step takes as long as the longer of computing and communicating, which overlap, plus Muon's part and the host's, which do
not. So what is predicted is an upper bound of speed under the rates below, which are assumptions (Rates); counts and bytes are
exact up to what allocators and NCCL keep for themselves, for which a tenth of the memory is left. docs/scale.md says what was
checked.

Letters: P parameters, L layers, D width, V vocabulary, T tokens of a sequence, B sequences of a micro-batch, R copies, S parts.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from trilobit.config.training import Gather
from trilobit.errors import ConfigError
from trilobit.train.adamw import BLOCK, COPY_BYTES, State
from trilobit.train.distill import BLOCK_ELEMENTS
from trilobit.train.mesh import WHOLE_BYTES, Arrangement, arrange
from trilobit.train.muon import CHUNK_BYTES, ITERATION
from trilobit.train.shape import Shape

LEFT_FREE = 0.1
WHILE_COMPUTING, WHILE_STEPPING = ("gathered", "activations", "logits", "loss"), ("muon", "visiting")
WIDTHS: dict[State, tuple[int, float]] = {"fp32": (4, 4), "bf16": (2, 2), "int8": (2, 1 + 4 / BLOCK)}
"""Bytes of a number's moment in AdamW, and in Muon."""


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links give: assumptions, those of an H100 in machines of eight with a 400 Gb/s card each."""

    flops: float = 989e12
    """Dense bf16 operations a second, on paper."""
    used: float = 0.40
    """Share of that which training reaches."""
    muon_used: float = 0.50
    nvlink: float = 300e9
    """Bytes a second that a GPU sends to others of its machine, as collectives reach it."""
    card: float = 40e9
    """Bytes a second of its network card, likewise."""
    latency: float = 10e-6
    """Seconds for each machine that a collective goes through."""
    per_machine: int = 8
    host: float = 50e9
    """Bytes a second between a GPU and its host's page-locked memory, each way."""


@dataclass(frozen=True)
class Load:
    """What one training step asks for, of every rank."""

    sequence_length: int
    sequences: int = 1
    accumulation: int = 1
    optimizer: str = "muon"
    recompute: bool = True
    teacher: bool = True
    state: State = "fp32"
    gradients: Literal["fp32", "bf16"] = "fp32"
    offload: bool = False


@dataclass(frozen=True)
class Plan:
    """A rank's memory in bytes by what it is for, and its host's; a step's seconds by what they go to. What is there while it
    computes is free again when the optimizer's own step begins."""

    model: str
    gpus: int
    arrangement: Arrangement
    load: Load
    memory: dict[str, int]
    host: int
    available: int
    seconds: dict[str, float]
    tokens_per_step: int

    @property
    def needed(self) -> int:
        stepping = sum(self.memory.get(name, 0) for name in WHILE_STEPPING)
        computing = sum(self.memory.get(name, 0) for name in WHILE_COMPUTING)
        return sum(self.memory.values()) - min(stepping, computing)

    @property
    def fits(self) -> bool:
        return self.needed <= (1 - LEFT_FREE) * self.available

    @property
    def step_seconds(self) -> float:
        return max(self.seconds["compute"], self.seconds["network"]) + self.seconds["muon"] + self.seconds["host"]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    def summary(self) -> str:
        """For people."""
        load = self.load
        lines = [
            f"{self.model} on {self.gpus:,} GPU{'s' if self.gpus > 1 else ''} of {self.available / 1e9:.0f} GB",
            f"mesh          {self.arrangement}",
            f"step          {self.tokens_per_step:,} tokens: {load.sequences} × {load.sequence_length} a rank, "
            f"{load.accumulation} micro-batch{'es' if load.accumulation > 1 else ''}; {load.optimizer}"
            + (f", moments in {load.state}" if load.state != "fp32" else "")
            + (f", gradients in {load.gradients}" if load.gradients != "fp32" else "")
            + (f", moments in the host's memory ({self.host / 1e9:.3g} GB a rank)" if load.offload else "")
            + (", activations computed again" if load.recompute else "")
            + (", a teacher" if load.teacher else ""),
        ]
        lines += [f"{name:<13} {size / 1e9:9.2f} GB a rank" for name, size in self.memory.items()]
        lines.append(
            f"{'needed':<13} {self.needed / 1e9:9.2f} GB a rank, of {(1 - LEFT_FREE) * self.available / 1e9:.0f} usable "
            f"({' and '.join(WHILE_STEPPING)} take turns with {', '.join(WHILE_COMPUTING)})"
        )
        lines += [f"{name:<13} {value:9.3f} s a step" for name, value in self.seconds.items()]
        lines.append(
            f"at most       {self.tokens_per_second:,.0f} tokens/s, {self.step_seconds:.2f} s a step (docs/scale.md: limits)"
        )
        return "\n".join(lines)


def plan(
    model: str, shape: Shape, gpus: int, load: Load, memory: int = 80 * 10**9, mesh: str = "auto", rates: Rates | None = None,
    gather: Gather = "auto",
) -> Plan:  # fmt: skip
    """What `load` on `gpus` GPUs of `memory` bytes takes. Raises ConfigError where --mesh does not fit the GPUs."""
    rates = rates or Rates()
    local = min(gpus, rates.per_machine)
    whole_bytes = WHOLE_BYTES + 2 * load.teacher
    arrangement = arrange(mesh, shape.parameters, gpus, local, memory, gather, load.optimizer, whole_bytes)
    if load.gradients == "bf16" and gpus > 1:
        raise ConfigError("--gradients bf16 is for one GPU; several divide them among each other.")
    held, seconds = memory_of(shape, arrangement, load), seconds_of(shape, arrangement, load, rates)
    host = moment_bytes(shape, load) // arrangement.shards if load.offload else 0
    return Plan(
        model, gpus, arrangement, load, held, host, memory, seconds,
        gpus * load.sequences * load.sequence_length * load.accumulation,
    )  # fmt: skip


def require_fitting(found: Plan) -> None:
    """Raise ConfigError, with what could be done, if a plan's memory is not there."""
    if not found.fits:
        raise ConfigError(
            f"{found.summary()}\nThis does not fit. Less: more --gpus, --mesh fsdp, --sequences 1, --accumulation 1, a shorter "
            "--sequence-length, --no-teacher, --recompute, --optimizer muon (one moment instead of two), --optimizer-state "
            "int8, --offload, --gather layer, or on one GPU --gradients bf16."
        )


def memory_of(shape: Shape, arrangement: Arrangement, load: Load) -> dict[str, int]:
    """Bytes that a rank holds at the fullest moment of a step, by what for."""
    total, parts = shape.parameters, arrangement.shards
    outside = total - shape.inside
    width = 2 if load.gradients == "bf16" else 4
    tokens = load.sequences * load.sequence_length
    if load.recompute:
        activations = tokens * (shape.layers * 4 * shape.width + shape.layer_bytes) + shape.layer_fixed
    else:
        activations = shape.layers * (tokens * shape.layer_bytes + shape.layer_fixed)
    # Between micro-batches that are not exchanged, FSDP2 keeps gradients whole.
    whole = parts > 1 and load.accumulation > 1
    layer = shape.inside // shape.layers
    # Parameters of two layers (one is fetched ahead) or of all; of one the gradient. Of what is outside layers, both.
    gathered = (total + layer + outside) if arrangement.gathered_once else (3 * layer + 2 * outside)
    found = {
        "latents": 4 * total // parts,
        "gradients": width * total if whole else width * total // parts,
        "moments": 0 if load.offload else moment_bytes(shape, load) // parts,
        "gathered": 4 * gathered if parts > 1 else 0,
        "activations": activations,
        "logits": tokens * shape.vocabulary * (3 if load.teacher else 2) * 2,
    }
    if load.teacher:
        held = total if arrangement.gathered_once else 2 * layer + outside
        found["teacher"] = 2 * total // parts + (2 * held if parts > 1 else 0)
    if load.optimizer == "muon":
        largest = max(rows * columns for rows, columns in shape.matrices)
        # An update in fp32, three matrices in bf16; in parts, what is sent, received and put together as well.
        found["muon"] = (20 if parts > 1 else 10) * max(largest, CHUNK_BYTES[False] // 4)
    # In fp32, of a few parameters or of the largest, the embedding: both moments, and gradients that were narrower.
    visiting = 8 * (load.offload or load.state != "fp32") + 4 * (load.gradients == "bf16")
    found["visiting"] = visiting * min(total // parts, max(COPY_BYTES[False] // 4, shape.embedding // parts))
    blocks = 7 if load.teacher else 1
    found["loss"] = 4 * blocks * min(tokens * shape.vocabulary, BLOCK_ELEMENTS[False])
    return found


def moment_bytes(shape: Shape, load: Load) -> int:
    """Of all parameters' moments, on whichever ranks."""
    ones = shape.muons if load.optimizer == "muon" else 0  # numbers that have one moment instead of two
    each, of_one = WIDTHS[load.state]
    return 2 * each * (shape.parameters - ones) + round(of_one * ones)


def flops_of(shape: Shape, load: Load) -> float:
    """Operations of a token, forward and backward."""
    products = 2 * (shape.parameters - shape.embedding)
    attention = 2 * shape.layers * load.sequence_length * shape.width
    forward = products + attention
    return forward * (3 + load.recompute + load.teacher)


def seconds_of(shape: Shape, arrangement: Arrangement, load: Load, rates: Rates) -> dict[str, float]:
    """Seconds of a step by what they go to: `compute` and `network` overlap, `muon` and `host` come after both."""
    tokens = load.sequences * load.sequence_length * load.accumulation
    parts, copies, total = arrangement.shards, arrangement.replicas, shape.parameters
    network = 0.0
    collectives = 2 * shape.layers + 2
    if parts > 1:
        gather = travel(4 * total, parts, rates, collectives // 2)
        times = 1 if arrangement.gathered_once else 2 * load.accumulation
        if load.teacher and not arrangement.gathered_once:
            network += load.accumulation * travel(2 * total, parts, rates, collectives // 2)
        network += times * gather + travel(4 * total, parts, rates, collectives // 2)
    if copies > 1:  # as many of a machine as it holds copies
        inside = max(1, rates.per_machine // parts)
        network += 2 * travel(4 * total // parts, copies, rates, collectives // 2, inside)
    result = {"compute": tokens * flops_of(shape, load) / (rates.flops * rates.used), "network": network, "muon": 0.0}
    if load.optimizer == "muon":
        shapes = Counter(shape.matrices)
        work = sum(-(-number // parts) * muon_flops(*matrix) for matrix, number in shapes.items())
        sent = exchange(6 * shape.muons // parts, parts, rates, 2 * len(shapes)) if parts > 1 else 0.0
        result["muon"] = work / (rates.flops * rates.muon_used) + sent
    result["host"] = 2 * moment_bytes(shape, load) / parts / rates.host if load.offload else 0.0
    return result


def travel(size: int, ranks: int, rates: Rates, times: int, inside: int | None = None) -> float:
    """Seconds to gather `size` bytes at each of `ranks` ranks (or to reduce and scatter them), in `times` collectives.

    A machine's cards bring it, together, what the others hold; its GPUs pass it on among themselves. inside: how many of the
    ranks are on one machine; by default as many as there are GPUs.
    """
    inside = min(ranks, rates.per_machine) if inside is None else min(inside, ranks)
    machines = -(-ranks // inside)
    through_cards = size * (machines - 1) / machines / (inside * rates.card)
    through_links = size * (inside - 1) / inside / rates.nvlink
    return max(through_cards, through_links) + times * rates.latency * machines


def exchange(size: int, ranks: int, rates: Rates, times: int) -> float:
    """Seconds in which each of `ranks` ranks sends `size` bytes, in equal parts to all, in `times` collectives.

    Unlike what is gathered, nothing of it is wanted twice: what leaves the machine goes over every GPU's own card.
    """
    inside = min(ranks, rates.per_machine)
    through_cards, through_links = (size * others / ranks for others in (ranks - inside, inside - 1))
    return max(through_cards / rates.card, through_links / rates.nvlink) + times * rates.latency * -(-ranks // inside)


def muon_flops(rows: int, columns: int) -> float:
    """Operations of the iteration of one matrix."""
    short, long = sorted((rows, columns))
    return len(ITERATION["quintic"]) * (4 * short**2 * long + 2 * short**3)
