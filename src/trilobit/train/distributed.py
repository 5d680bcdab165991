"""The processes of one run, and how they come to one mind. torchrun starts them; with one process there is nothing to agree on.

    tensors    gradients, parameters: collectives of the default group (gloo on CPUs, NCCL on GPUs), in mesh.py and muon
    decisions  an error, what rank 0 has found: JSON through the store; every step, whether to stop: an integer over gloo

What only one rank does (tokenising, measuring the original, exporting, writing) takes longer than any collective should be
waited for; the others wait at the store, however long, while heartbeats notice ranks that are gone (heartbeat.py).

The order of the data knows nothing of ranks: sample i is a function of (seed, i), and a step is samples n·step … n·step + n − 1
however many share them. Every rank takes an equal part, so that the mean over ranks of means over tokens is the mean over all
tokens of the step.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trilobit.config.training import TrainingConfig
from trilobit.errors import ConfigError, RankError, TrilobitError
from trilobit.train.signals import Interrupted, Signals

T = TypeVar("T")

POLL_SECONDS = 0.02


@dataclass
class Team:
    """The ranks of a run as one of them sees them. This one is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launch: str | None = None
    """What tells one launch from another: the same after torchrun has restarted the ranks."""

    @property
    def first(self) -> bool:
        """Whether this rank writes and says what is written and said once."""
        return self.rank == 0

    def shared(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0 (JSON), on every rank. Its TrilobitError and Interrupted are raised on all of them."""
        return make()

    def by_node(self, make: Callable[[], T]) -> T:
        """`make` on every rank, first on one of each machine, alone: the others find what it has cached."""
        return make()

    def together(self, do: Callable[[], T]) -> T:
        """`do` on every rank; if it raises a TrilobitError on one, all raise one."""
        return do()

    def stop_if_asked(self, signals: Signals) -> None:
        """Raise Interrupted on every rank if a signal has come to one."""
        signals.raise_if_set()

    def assemble(self, mine: str) -> list[str]:
        """What each rank has to say, on every rank, however long one takes."""
        return [mine]

    def agree(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over all ranks. A collective: for what all of them reach at about the same time."""
        return numbers

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over all ranks, in float64."""
        return numbers

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each 0-dim tensor over all ranks, on its device."""
        return values


ALONE = Team()


@dataclass
class Ranks(Team):
    """Several of them. `control` is a gloo group on any device: what the processes, not the devices, have to agree on."""

    store: Any = None
    control: Any = None
    signals: Signals = field(default_factory=Signals)
    calls: int = 0

    def shared(self, make: Callable[[], T]) -> T:
        key = self.key("shared")
        if not self.first:
            return self._hear(key, 0)
        try:
            return self._publish(key, make)
        except Interrupted as stop:
            raise Interrupted(stop.number, agreed=True) from stop

    def by_node(self, make: Callable[[], T]) -> T:
        leader = self.rank - self.local_rank
        key = f"{self.key('node')}/{leader}"
        if self.local_rank == 0:
            kept: list[T] = []
            self._publish(key, lambda: kept.append(make()))
            return kept[0]
        self._hear(key, leader)
        return make()

    def _publish(self, key: str, make: Callable[[], T]) -> T:
        """`make`, and what came of it at a key of the store."""
        try:
            value = make()
        except Interrupted as stop:
            self.store.set(key, json.dumps({"signal": stop.number}))
            raise
        except TrilobitError as error:
            self.store.set(key, json.dumps({"error": str(error)}))
            raise
        self.store.set(key, json.dumps({"value": value}))
        return value

    def _hear(self, key: str, speaker: int) -> Any:
        """What `speaker` has published at a key."""
        answer = json.loads(self._wait(key, self.signals.raise_if_set))
        if "signal" in answer:
            raise Interrupted(answer["signal"], agreed=True)
        if "error" in answer:
            raise RankError(f"rank {speaker} stopped: {answer['error']}")
        return answer["value"]

    def together(self, do: Callable[[], T]) -> T:
        problem, result = None, None
        try:
            result = do()
        except TrilobitError as error:
            problem = error
        said = self.assemble("" if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, other in enumerate(said):
            if other:
                raise RankError(f"rank {rank} stopped: {other}")
        return result  # pyright: ignore[reportReturnType]

    def stop_if_asked(self, signals: Signals) -> None:
        number = max(int(said) for said in self.assemble(str(signals.number or 0)))
        if number:
            raise Interrupted(number, agreed=True)

    def assemble(self, mine: str) -> list[str]:
        key = self.key("assembly")
        self.store.set(f"{key}/{self.rank}", mine)
        if self.first:
            said = [self.wait_calmly(f"{key}/{rank}").decode() for rank in range(self.size)]
            self.store.set(f"{key}/all", json.dumps(said))
        return json.loads(self.wait_calmly(f"{key}/all"))

    def agree(self, *numbers: int) -> tuple[int, ...]:
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return tuple(values.tolist())

    def sums(self, *numbers: float) -> tuple[float, ...]:
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, group=self.control)
        return tuple(values.tolist())

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        stacked = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(stacked)
        found = (stacked / self.size).unbind()
        return {name: mean.to(value.dtype) for (name, value), mean in zip(values.items(), found, strict=True)}

    def wait_calmly(self, key: str) -> bytes:
        """The value of a key of the store, once it is there. A signal is left for whoever asks next."""
        return self._wait(key, lambda: None)

    def _wait(self, key: str, between: Callable[[], None]) -> bytes:
        return wait_for(lambda: self.store.get(key) if self.store.check([key]) else None, between)

    def key(self, kind: str) -> str:
        """A key of the store that no call before has used, the same on every rank."""
        self.calls += 1
        return f"{kind}/{self.calls}"


def wait_for(look: Callable[[], T | None], between: Callable[[], None]) -> T:
    """What `look` finds, once it finds something; `between` runs before every further look."""
    pause = POLL_SECONDS
    while (found := look()) is None:
        between()
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)
    return found


def parts_of_step(config: TrainingConfig, rank: int, size: int) -> list[tuple[int, int]]:
    """(first sample within the step, number) of each of this rank's micro-batches: a `size`-th of the step's samples, at most
    --sequences at a time, as many micro-batches on every rank. One rank takes the whole, as it always did."""
    samples = config.accumulation * config.micro_batch
    assert samples % size == 0, (samples, size)
    own = samples // size
    start, most = rank * own, config.micro_batch
    return [(start + done, min(most, own - done)) for done in range(0, own, most)]


def require_even_parts(config: TrainingConfig, size: int) -> None:
    """Raise ConfigError unless a step's sequences can be shared equally by `size` ranks. Nothing is padded."""
    samples = config.tokens_per_step // config.sequence_length
    if samples % size:
        raise ConfigError(
            f"a step of {samples} sequences cannot be shared equally by {size} ranks: choose --batch-tokens "
            f"{' or '.join(map(str, _even_parts(config, size)))} (now {config.tokens_per_step} tokens in micro-batches of "
            f"{config.micro_batch} sequences of {config.sequence_length})."
        )


def _even_parts(config: TrainingConfig, size: int) -> list[int]:
    """The next smaller and larger --batch-tokens that `size` ranks can share. Micro-batches of one sequence share any multiple
    of the ranks; with whole micro-batches, multiples of both."""

    def even(sequences: int) -> bool:
        tokens = sequences * config.sequence_length
        if not 0 < tokens <= config.max_tokens or sequences % size:
            return False
        return replace(config, batch_tokens=tokens).tokens_per_step == tokens

    here, most = config.tokens_per_step // config.sequence_length, size * config.sequences
    found = [
        next((s for s in way if even(s)), 0) for way in (range(here, max(0, here - most) - 1, -1), range(here, here + most + 1))
    ]
    return [s * config.sequence_length for s in found if s] or [config.sequence_length * size]
