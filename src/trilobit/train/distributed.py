"""The processes of one run, and how they come to one mind. torchrun starts them; with one process there is nothing to agree on.

    tensors    gradients, parameters: collectives of the default group (gloo on CPUs, NCCL on GPUs), in mesh.py and muon
    decisions  a signal, an error, what rank 0 has found: JSON through the store, or a few integers over gloo

What only one rank does (tokenising, measuring the original, exporting) takes longer than any collective should be waited for;
the others wait for it at the store, where they keep noticing signals and ranks that are gone (heartbeat.py).

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
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

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

    def agree(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over all ranks."""
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
        if self.first:
            value = self._publish(key, make)
            return value
        answer = json.loads(self.wait(key))
        if "signal" in answer:
            raise Interrupted(answer["signal"])
        if "error" in answer:
            raise RankError(f"rank 0 stopped: {answer['error']}")
        return answer["value"]

    def _publish(self, key: str, make: Callable[[], T]) -> T:
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

    def by_node(self, make: Callable[[], T]) -> T:
        key = f"{self.key('node')}/{self.rank - self.local_rank}"
        if self.local_rank == 0:
            kept: list[T] = []
            self._publish(key, lambda: kept.append(make()))
            return kept[0]
        answer = json.loads(self.wait(key))
        if "signal" in answer:
            raise Interrupted(answer["signal"])
        if "error" in answer:
            raise RankError(f"rank {self.rank - self.local_rank} stopped: {answer['error']}")
        return make()

    def together(self, do: Callable[[], T]) -> T:
        key, problem, result = self.key("together"), None, None
        try:
            result = do()
        except TrilobitError as error:
            problem = error
            self.store.set(key, f"rank {self.rank} stopped: {error}")
        (failed,) = self.agree(int(problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise RankError(self.wait(key).decode())
        return result  # pyright: ignore[reportReturnType]

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

    def wait(self, key: str) -> bytes:
        """The value of a key of the store, once it is there. Signals are noticed meanwhile."""
        return self._wait(key, self.signals.raise_if_set)

    def wait_calmly(self, key: str) -> bytes:
        """The same, signals or not: what is waited for is already on its way."""
        return self._wait(key, lambda: None)

    def _wait(self, key: str, between: Callable[[], None]) -> bytes:
        pause = POLL_SECONDS
        while not self.store.check([key]):
            between()
            time.sleep(pause)
            pause = min(pause * 1.2, 0.5)
        return self.store.get(key)

    def key(self, kind: str) -> str:
        """A key of the store that no call before has used, the same on every rank."""
        self.calls += 1
        return f"{kind}/{self.calls}"


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def open_team(device: torch.device, signals: Signals, say: Callable[[str], None]) -> Iterator[Team]:
    """The ranks of this run; alone where no launcher started several. `say` hears why a rank ends that lost another.

    Raises RankError where a collective fails, which is how most dead ranks are noticed first: their connections close.
    """
    if not several():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(minutes=COLLECTIVE_MINUTES)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    heartbeat = None
    try:
        _begin_run(rank, timeout)
        store = _connection(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        team = Ranks(
            rank, size, int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(size))),
            store=store, control=dist.new_group(backend="gloo", timeout=timeout), signals=signals,
        )  # fmt: skip
        heartbeat = Heartbeat(_connection(timeout), rank, size, say)
        yield team
    except Interrupted:
        _close(heartbeat, "")
        raise
    except TrilobitError as error:
        _close(heartbeat, str(error))
        raise
    except dist.DistError as error:
        _close(heartbeat, first_line(error))
        raise _lost(rank, error) from error
    except RuntimeError as error:
        _close(heartbeat, first_line(error))
        if _of_a_connection(error):
            raise _lost(rank, error) from error
        raise
    except BaseException as error:
        _close(heartbeat, f"{type(error).__name__}: {first_line(error)}")
        raise
    else:
        team.agree(0)  # nobody takes the store away while another still needs it
        _close(heartbeat, "")
        dist.destroy_process_group()


# The store that ranks find each other at outlives a run: torchrun's agent keeps its own over restarts, and where the launcher
# has none, rank 0 keeps one until its process ends. What was written by an attempt before this one (gloo's addresses of ranks
# that are gone) or by the run before this one in the same processes must not be found again: each has keys of its own.
_server: Any = None
_runs = 0


def _begin_run(rank: int, timeout: timedelta) -> None:
    """Count the runs of these processes, which begin the same ones; and have a store."""
    global _server, _runs
    _runs += 1
    if rank == 0 and _server is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _server = _tcp_store(True, timeout)


def _connection(timeout: timedelta) -> Any:
    """A connection of its own to the store of this run and attempt (a thread that waits in one blocks whoever shares it)."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"trilobit/{attempt}/{_runs}", _tcp_store(False, timeout))  # pyright: ignore[reportPrivateImportUsage]


def _tcp_store(serves: bool, timeout: timedelta) -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address, port, None, serves, timeout, wait_for_workers=False
    )


def _close(heartbeat: Heartbeat | None, farewell: str) -> None:
    if heartbeat is not None:
        heartbeat.close(farewell)


CONNECTION_WORDS = ("connection", "socket", "peer", "timed out", "timeout", "broken pipe", "gloo")


def _of_a_connection(error: RuntimeError) -> bool:
    return any(word in str(error).lower() for word in CONNECTION_WORDS)


def _lost(rank: int, error: Exception) -> RankError:
    return RankError(f"rank {rank} lost touch with another rank, which has died or hangs ({first_line(error)}). {AGAIN}")


def launch_name() -> str | None:
    """What tells one torchrun from another: the same after --max-restarts, different for the next run of a user."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    run = os.environ["TORCHELASTIC_RUN_ID"]
    return run if run != "none" else f"{socket.gethostname()} {os.getppid()}"


def restarted() -> bool:
    """Whether torchrun started this process again after one of a run had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


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
    samples = config.accumulation * config.micro_batch
    if samples % size:
        less, more = (max(1, samples // size + extra) * size * config.sequence_length for extra in (0, 1))
        raise ConfigError(
            f"a step of {samples} sequences cannot be shared equally by {size} ranks: choose --batch-tokens {less} or {more} "
            f"(multiples of {size} ranks · {config.sequence_length} tokens; now {config.tokens_per_step})."
        )
