"""How the processes of a run meet, and part: the store they share, a name for this run, a process group, a heartbeat.

torchrun, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, has started them. What they say to each other once they
have met is in distributed.py.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from trilobit.errors import RankError, TrilobitError
from trilobit.train.distributed import Ranks, Team, wait_for
from trilobit.train.heartbeat import AGAIN, Heartbeat, first_line
from trilobit.train.signals import Interrupted, Signals

COLLECTIVE_MINUTES = 10
"""Longest wait in one collective: for ranks that live and yet do not come. Dead ones are noticed within a minute."""


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
