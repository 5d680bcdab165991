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
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from trilobit.config.training import TrainingConfig
from trilobit.errors import ConfigError, RankError, TrilobitError
from trilobit.train.heartbeat import AGAIN, Heartbeat, first_line
from trilobit.train.signals import Interrupted, Signals

T = TypeVar("T")

COLLECTIVE_MINUTES = 10
"""Longest wait in one collective: for ranks that live and yet do not come. Dead ones are noticed within a minute."""
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


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def open_team(device: torch.device, signals: Signals, say: Callable[[str], None]) -> Iterator[Team]:
    """The ranks of this run; alone where no launcher started several. `say` hears why a rank ends that lost another.

    Raises RankError where a collective fails, which is how most dead ranks are noticed first: their connections close.
    """
    if not several():
        yield Team(launch=_launch_alone())
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(minutes=COLLECTIVE_MINUTES)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    heartbeat = None
    try:
        meeting, launch = _meet(rank, size, timeout, signals)
        store, watched = (_connection(meeting, timeout) for _ in range(2))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        team = Ranks(
            rank, size, int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(size))), launch,
            store=store, control=dist.new_group(backend="gloo", timeout=timeout), signals=signals,
        )  # fmt: skip
        heartbeat = Heartbeat(watched, rank, size, say)
        yield team
        team.agree(0)  # nobody takes the store away while another still needs it
    except BaseException as error:
        if heartbeat is not None:
            heartbeat.close(_farewell(error))
            if rank == 0 and _server is not None:  # others may still be reading there why all stop
                heartbeat.wait_for_all()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _of_a_connection(error)):
            raise _lost(rank, error) from error
        if isinstance(error, Interrupted | TrilobitError) and dist.is_initialized():  # a caller may begin another run
            dist.destroy_process_group()
        raise
    else:
        heartbeat.close()
        dist.destroy_process_group()


_server: Any = None


def _meet(rank: int, size: int, timeout: timedelta, signals: Signals) -> tuple[str, str | None]:
    """A name that the ranks of this run share and no run or attempt before them had; and that of the launch.

    The store outlives a run: torchrun's agent keeps its own over restarts, and where the launcher has none, rank 0 keeps one
    until its process ends. What attempts before this one have written there (gloo's addresses of ranks that are gone) must not
    be found again, and torchrun's count of restarts does not tell attempts apart: every machine has its own. So rank 0 invents
    a name, the others answer to it with one of their own, and go on only once rank 0 has heard the very name they gave.
    """
    global _server
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not kept and _server is None:
        _server = _tcp_store(True, timeout)
    store, mine, tried = _tcp_store(False, timeout), uuid4().hex[:16], set()
    end = time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    def between() -> None:
        signals.raise_if_set()
        if time.monotonic() > end:
            raise RankError(f"rank {rank} has waited {COLLECTIVE_MINUTES} minutes for the others to begin. {AGAIN}")

    def called() -> str | None:
        name = read("trilobit/meeting")
        if name is not None and name not in tried:
            store.set(f"trilobit/{name}/{rank}", mine)
            tried.add(name)
        heard = None if name is None else read(f"trilobit/{name}/heard")
        return name if heard is not None and json.loads(heard)[rank] == mine else None

    if rank == 0:
        store.set("trilobit/meeting", mine)
        answers = [mine, *(wait_for(lambda r=r: read(f"trilobit/{mine}/{r}"), between) for r in range(1, size))]
        store.set(f"trilobit/{mine}/heard", json.dumps(answers))
        name = mine
    else:
        name = wait_for(called, between)
    return name, store.compare_set("trilobit/launch", "", name).decode() if kept else None


def _connection(meeting: str, timeout: timedelta) -> Any:
    """A connection of its own to the store of this run (a thread that waits in one blocks whoever shares it)."""
    return dist.PrefixStore(f"trilobit/{meeting}", _tcp_store(False, timeout))  # pyright: ignore[reportPrivateImportUsage]


def _tcp_store(serves: bool, timeout: timedelta) -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address, port, None, serves, timeout, wait_for_workers=False
    )


def _farewell(error: BaseException) -> str:
    """Why this rank leaves, for the others; nothing where all of them know."""
    if isinstance(error, Interrupted):
        return "" if error.agreed else f"it was stopped by {error}"
    return (
        first_line(error) if isinstance(error, TrilobitError | RuntimeError) else f"{type(error).__name__}: {first_line(error)}"
    )


CONNECTION_WORDS = ("connection", "socket", "peer", "timed out", "timeout", "broken pipe", "gloo")


def _of_a_connection(error: RuntimeError) -> bool:
    return any(word in str(error).lower() for word in CONNECTION_WORDS)


def _lost(rank: int, error: Exception) -> RankError:
    return RankError(
        f"rank {rank} lost touch with another rank, which died, hangs or does something else ({first_line(error)}). {AGAIN}"
    )


def _launch_alone() -> str | None:
    """The launch of a process that torchrun started alone: that of its parent."""
    return f"{socket.gethostname()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def restarts() -> int:
    """How often torchrun has started this process again after one of a run had failed. Each machine has a count of its own."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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
