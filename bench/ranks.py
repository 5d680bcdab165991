"""What sharing a model costs on one machine: `trilobit pretrain` on N ranks of one thread against one process of N threads.

    python bench/ranks.py [--data stdlib] [--ranks 2] [--mesh fsdp fsdp/layer ddp] [--batch-tokens 8192] [--sequences 16]
                           [--steps 20] [--rounds 3]

Whole commands, one after the other, in rounds; of each the median tokens/s of its steps but for the first two (log.jsonl, which
leaves evaluations out). The ratio is the median over rounds of a mesh's tokens/s / one process' in the same round. Target: 0.9
for two ranks of FSDP2 at 8,192 tokens a step. With 16 sequences of 256 tokens at once that is one micro-batch a rank. A name
after a mesh is its --gather.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTH = 256


def tokens_per_second(mesh: str, arguments: argparse.Namespace, folder: Path) -> float:
    """Of one run. mesh: "one" for one process, else MESH or MESH/GATHER."""
    ranks = 1 if mesh == "one" else arguments.ranks
    out = folder / f"{mesh.replace('/', '-')}-{len(list(folder.iterdir()))}"
    command = [
        "-m", "trilobit", "pretrain", arguments.architecture, "--train-tokenizer", "4096", "--data", arguments.data,
        "--batch-tokens", str(arguments.batch_tokens), "--max-tokens", str(arguments.steps * arguments.batch_tokens),
        "--sequences", str(arguments.sequences), "--sequence-length", str(LENGTH), "--eval-tokens", str(4 * LENGTH),
        "--compile", "no", "--optimizer", arguments.optimizer, "--cache-dir", str(folder.parent / "tokens"), "--out", str(out),
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    shared = ["--mesh", mesh.split("/")[0], "--gather", mesh.partition("/")[2] or "auto"] if ranks > 1 else []
    command = [sys.executable, *launcher, *command, *shared]
    threads = str(arguments.ranks // ranks)
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.median(row["tokens_per_second"] for row in rows[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--architecture", default="llama-3m")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mesh", nargs="+", default=["fsdp", "fsdp/layer", "ddp"])
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {mesh: [] for mesh in ("one", *arguments.mesh)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        folder.mkdir()
        for _ in range(arguments.rounds):
            for mesh, speeds in found.items():
                speeds.append(tokens_per_second(mesh, arguments, folder))
    step = f"{arguments.batch_tokens} tokens a step, {arguments.sequences} sequences at once, {arguments.ranks} threads in all"
    print(f"{arguments.architecture}, {arguments.optimizer}, {step}")
    for mesh, speeds in found.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, found["one"], strict=True))
        print(f"{mesh:<11}{statistics.median(speeds):>10,.0f} tokens/s{ratio:>8.3f} of one process")


if __name__ == "__main__":
    main()
