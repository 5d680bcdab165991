"""Processes of their own without their imports: forked from a server that has imported everything once.

Importing torch and transformers takes six seconds of processor time, more than most of what tests ask other processes for.
The server begins as a fresh interpreter when it is first needed, so that its children share nothing with the test but what
subprocess would give them: the environment, the current folder, the command. What is patched in the test is not patched there.
"""

import importlib
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PRELOADED = [
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "trilobit.train.pretrain",
    "trilobit.train.tune",
    "trilobit.export.verification",
    "trilobit.export.native",
]
STARTERS = ("trilobit.export.verification", "trilobit.export.llama_cpp")
"""Modules that start `python -m` of themselves or each other."""


def server() -> Any:
    """The context whose processes are the server's. One server for all that a test process starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(
    command: list[str], timeout: float | None = None, again: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """What subprocess.run makes of `python [-W ignore] -m MODULE FOLDER` with its text captured, where MODULE has main(FOLDER).
    again: from within such a process, which is forked itself."""
    assert options == {"capture_output": True, "text": True, "check": False}, options
    module, folder = command[-2:]
    assert command[-3] == "-m", command
    context: Any = multiprocessing.get_context("fork") if again else server()
    with tempfile.TemporaryDirectory() as name:
        process = context.Process(target=_main, args=(module, folder, name, os.getcwd(), dict(os.environ)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            assert timeout is not None
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        said = [(Path(name) / stream).read_text(errors="replace") for stream in ("stdout", "stderr")]
        return subprocess.CompletedProcess(command, process.exitcode, *said)


def _main(module: str, folder: str, captured: str, current: str, environment: dict[str, str]) -> None:
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(captured) / stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(current)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for starter in STARTERS:
        stand_in(importlib.import_module(starter), again=True)
    importlib.import_module(module).main(Path(folder))


def stand_in(module: Any, again: bool = False, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """In place of `module`'s subprocess, `run`."""
    set_attribute(
        module, "subprocess", SimpleNamespace(run=partial(run, again=again), TimeoutExpired=subprocess.TimeoutExpired)
    )


def hold(manager: Callable[[Any], AbstractContextManager[Any]], argument: Any, heard: Connection) -> None:
    """Tells what `with manager(argument)` gives, and stays in it until it hears something. A target for a process."""
    with manager(argument) as given:
        heard.send(given)
        heard.recv()
