"""Several ranks on this machine, for tests: forked from a server that has imported everything once, joined in limited time.

A job is a function of this folder that takes keyword arguments and returns JSON; it runs on every rank with the environment
that torchrun would set.
"""

import json
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import forked


def launch(
    job: Callable[..., Any],
    size: int,
    folder: Path,
    seconds: float = 120,
    dead: tuple[int, ...] = (),
    ends: tuple[int, ...] = (),
    **options: Any,
) -> list[Any]:
    """What `job` returned on each rank. Raises AssertionError with the traceback of one that failed, or of silence after
    `seconds`, when all are killed. ends, dead: ranks that give no answer but their exit code; the dead are not waited for."""
    context = forked.server()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(job, rank, size, port, folder, options), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    alive = {rank: process for rank, process in enumerate(processes) if rank not in dead}
    for process in alive.values():
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in alive.items() if process.is_alive()]
    answers: list[Any] = []
    for rank, process in enumerate(processes):
        if process.is_alive():
            process.kill()
        process.join(5)
        answer = folder / f"answer-{rank}.json"
        found = json.loads(answer.read_text()) if answer.exists() else {"error": f"rank {rank} gave no answer; late: {late}"}
        answer.unlink(missing_ok=True)
        assert rank in dead + ends or "error" not in found, found["error"]
        answers.append(process.exitcode if rank in dead + ends else found["value"])
    return answers


def _rank(job: Callable[..., Any], rank: int, size: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        answer = {"value": job(folder=folder, **options)}
    except BaseException:
        answer = {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    partial = folder / f".answer-{rank}"
    partial.write_text(json.dumps(answer))
    partial.rename(folder / f"answer-{rank}.json")
    os._exit(0)  # nothing of the server's is ours to clean up


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
