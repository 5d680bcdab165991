"""Encoding in processes: one WordEncoder in this process is the oracle."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.byte_level import SAFE, WORDS
from trilobit.train import workers
from trilobit.train.words import WordEncoder
from trilobit.train.workers import encode_in_processes


def test_processes_give_the_same_tokens_in_order() -> None:
    """Batches of any number of texts, empty ones among them, come back in order with the tokens of one encoder."""
    batches = [[WORDS[i:], "", WORDS[: 2 * i]][: i % 4] for i in range(20)]
    encoder = WordEncoder.of(SAFE[1])
    assert encoder is not None
    found = list(encode_in_processes(batches, SAFE[1], 2))
    assert [[ids.tolist() for ids in batch] for batch in found] == [
        [ids.tolist() for ids in encoder.encode(batch)] for batch in batches
    ]


def test_stopping_early_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops reading, or fails, leaves no process behind, and texts are read only a few batches ahead."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*args: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))  # pyright: ignore
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", remember)
    read: list[int] = []

    def batches() -> Iterator[list[str]]:
        for i in range(1000):
            read.append(i)
            yield [WORDS]

    encoded = encode_in_processes(batches(), SAFE[0], 2)
    next(encoded)
    encoded.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(read) <= 6
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_a_worker_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends without an answer is an error, not a wait without end."""
    monkeypatch.setattr(workers.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="tokenising process has died"):
        list(encode_in_processes([[WORDS]], SAFE[0], 1))


def test_a_script_without_a_guard_works(tmp_path: Path) -> None:
    """A user's script without `if __name__ == "__main__"` is run once, not once more in every process."""
    SAFE[0].save(str(tmp_path / "tokenizer.json"))
    script = tmp_path / "script.py"
    script.write_text(
        "from tokenizers import Tokenizer\n"
        "from trilobit.train.workers import encode_in_processes\n"
        "print('ran')\n"
        f"backend = Tokenizer.from_file({str(tmp_path / 'tokenizer.json')!r})\n"
        "print(sum(len(ids) for batch in encode_in_processes([['the end']] * 3, backend, 2) for ids in batch))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["ran", str(3 * len(SAFE[0].encode("the end").ids))]
