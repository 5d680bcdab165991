import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gloo.py"


def test_the_table_of_two_ranks() -> None:
    """Each collective at each size has gloo's row and ours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*command, "--rounds", "1"], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = done.stdout.splitlines()
    assert len(rows) == 8 and all(row.startswith("2 ranks") and row.endswith("ms") for row in rows)
