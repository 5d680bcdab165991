"""The table of GPU kernels prints where there is no GPU, too: what is right, and no times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_kernels.py"


def table(*arguments: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_table_of_the_interpreter() -> None:
    """Every kernel has a row, no exact one differs from its definition, the others are as near to the truth as their peers."""
    rows = table()
    for name in ("norm + int8", "norm backward", "ternary codes", "int8 product", "two-bit", "X·Xᵀ", "A·A", "head + loss"):
        assert any(row.startswith(name) for row in rows), name
    assert all(row.endswith("differs: 0") for row in rows if "differs" in row)
    multiples = [float(row.split("error ")[1].split()[0]) for row in rows if "error" in row]
    assert len(multiples) == 3 and max(multiples) <= 1.2


def test_a_peer_that_cannot_be_timed_has_a_row_that_says_why() -> None:
    """gemlite is not installed here, or cannot be without CUDA: our own side of the row is there all the same."""
    rows = table("--peers")
    assert [row.split(",")[0] for row in rows] == ["two-bit", "int8 + two-bit"]
    assert all("differs: 0, gemlite: " in row and not row.endswith(": ") for row in rows)
