"""bench/export.py on a model of a few hundred thousand weights: it runs, and says what it is for."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "export.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "to"), [("autobitlinear", ["native", "hf", "gguf", "bf16"]), ("packed", ["native"]), ("latent", ["hf"])]
)
def test_it_measures_each_export(form: str, to: list[str], tmp_path: Path) -> None:
    """Every export of every stored form is written, within its limits, and nothing of it is left."""
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--form", form, "--to", *to, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    assert [row[0] for row in rows] == to
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[3].replace(",", "")) > 50 for row in rows)
    assert list(tmp_path.iterdir()) == []
