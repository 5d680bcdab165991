"""The table of GPU kernels prints where there is no GPU, too: what is right, and no times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_kernels.py"


def test_the_table_of_the_interpreter() -> None:
    """Every kernel has a row, no exact one differs from its definition, the others are as near to the truth as their peers."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = done.stdout.splitlines()
    for name in ("norm + int8", "norm backward", "ternary codes", "int8 product", "two-bit", "X·Xᵀ", "A·A", "head + loss"):
        assert any(row.startswith(name) for row in rows), name
    assert all(row.endswith("differs: 0") for row in rows if "differs" in row)
    multiples = [float(row.split("error ")[1].split()[0]) for row in rows if "error" in row]
    assert len(multiples) == 3 and max(multiples) <= 1.2
