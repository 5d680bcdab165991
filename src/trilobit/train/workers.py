"""Encoding by words on every core: processes that read texts and write ids, each with a table of its own.

Plain child processes of `python -m trilobit.train.workers` rather than multiprocessing: that would run the user's script
again in each of them. A message is its length in 8 bytes and then, to a worker, JSON (the tokenizer first, lists of texts
afterwards), and back, uint32: how many texts, the tokens of each, and all ids. A worker ends when its input ends.
"""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import numpy as np
from tokenizers import Tokenizer

from trilobit.train.words import WordEncoder

LENGTH_BYTES = 8


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_processes(batches: Iterable[Sequence[str]], backend: Tokenizer, workers: int) -> Iterator[list[np.ndarray]]:
    """What WordEncoder(backend).encode gives for each batch of texts, in order. Few batches are held at a time."""
    pending: deque[Future[list[np.ndarray]]] = deque()
    free: SimpleQueue[_Worker] = SimpleQueue()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        worker = free.get()
        try:
            return worker.encode(texts)
        finally:
            free.put(worker)

    with ExitStack() as stack:
        for _ in range(workers):
            free.put(stack.enter_context(_start(backend)))
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        for texts in batches:
            pending.append(threads.submit(encode, texts))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Worker:
    def __init__(self, process: "subprocess.Popen[bytes]"):
        assert process.stdin is not None and process.stdout is not None
        self._to, self._from = process.stdin, process.stdout

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            _send(self._to, json.dumps(texts).encode())
            answer = _receive(self._from)
        except BrokenPipeError:
            answer = None
        if not answer:
            raise RuntimeError("a tokenising process has died; what it said is on standard error")
        values = np.frombuffer(answer, np.uint32)
        count = int(values[0])
        return np.split(values[1 + count :], np.cumsum(values[1 : 1 + count]))[:count]


@contextmanager
def _start(backend: Tokenizer) -> Iterator[_Worker]:
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "trilobit.train.workers"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    worker = _Worker(process)
    try:
        with suppress(BrokenPipeError):  # a worker that is dead already is noticed when it does not answer
            _send(worker._to, backend.to_str().encode())
        yield worker
    finally:
        process.kill()
        with suppress(BrokenPipeError):  # of what it never read
            worker._to.close()
        with process:  # closes the other pipe and waits
            pass


def _send(file: IO[bytes], message: bytes) -> None:
    file.write(len(message).to_bytes(LENGTH_BYTES, "little"))
    file.write(message)
    file.flush()


def _receive(file: IO[bytes]) -> bytes | None:
    length = file.read(LENGTH_BYTES)
    return file.read(int.from_bytes(length, "little")) if len(length) == LENGTH_BYTES else None


def main() -> None:
    """The worker: from standard input to standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it decides
    tokenizer = _receive(sys.stdin.buffer)
    encoder = None if tokenizer is None else WordEncoder.of(Tokenizer.from_str(tokenizer.decode()))
    assert encoder is not None
    while (message := _receive(sys.stdin.buffer)) is not None:
        ids = encoder.encode(json.loads(message))
        lengths = np.array([len(ids), *map(len, ids)], np.uint32)
        _send(sys.stdout.buffer, np.concatenate([lengths, *ids]).tobytes())


if __name__ == "__main__":
    main()
