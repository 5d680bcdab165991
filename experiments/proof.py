"""Arms of the comparison "is an extra RMSNorm all you need?", one after another in one process, resumable.

    python experiments/proof.py MODEL --data TEXT --out out/proof [--tokens 33M] [--minutes 9] [--arms NAME …] [-- FLAGS]

Every arm is `trilobit tune` with its own flags on the same tokens in the same order; FLAGS go to all. Finished arms are
skipped, an interrupted one continues bit for bit. When the minutes are over, the running arm saves itself; the table of
what is known comes last.
"""

import argparse
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from trilobit.config.fields import parse_count
from trilobit.config.tune import TuneConfig
from trilobit.listener import Listener
from trilobit.train import tune
from trilobit.train.loop import Interrupted

ARMS: dict[str, dict[str, Any]] = {
    "full-precision": {"schedule": "never"},
    "none-immediate-ce": {"placement": "none", "schedule": "immediate"},
    "every-ones-immediate-ce": {"placement": "every", "gain_init": "ones", "schedule": "immediate"},
    "every-calibrated-layerwise-ce": {"placement": "every", "gain_init": "calibrated", "schedule": "layerwise"},
    "output-calibrated-layerwise-ce": {"placement": "output", "gain_init": "calibrated", "schedule": "layerwise"},
    "none-global-ce": {"placement": "none", "schedule": "global"},
    "none-immediate-kl": {"placement": "none", "schedule": "immediate", "distill": "logits"},
    "every-calibrated-layerwise-kl": {"placement": "every", "schedule": "layerwise", "distill": "logits"},
}


class Lines(Listener):
    """A line at every evaluation."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        if "heldout_nats" in row:
            speed = row["tokens_per_second"]
            print(f"  {row['tokens']:>12,} tokens  held out {row['heldout_nats']:.4f}  {speed:,.0f} tokens/s", flush=True)


def run_arm(config: TuneConfig) -> bool:
    """Run or continue one arm. False if the time was over before it ended."""
    record = Path(config.out or "") / "run.json"
    if record.exists():
        if "result" in json.loads(record.read_text()):
            return True
        config = replace(config, resume=True)
    try:
        tune.run(config, Lines())
    except Interrupted:
        return False
    return True


def table(out: Path) -> str:
    lines = [f"{'arm':<34}{'tokens':>12}{'original':>10}{'held out':>10}{'gap':>8}{'tokens/s':>10}"]
    for record in sorted(out.glob("*/run.json")):
        known = json.loads(record.read_text())
        rows = [json.loads(line) for line in (record.parent / "log.jsonl").read_text().splitlines()]
        measured = [row for row in rows if "heldout_nats" in row]
        if measured:
            last, base = measured[-1], known["base_nats_per_token"]
            speed = sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]
            done = "" if "result" in known else "  (unfinished)"
            lines.append(
                f"{record.parent.name:<34}{last['tokens']:>12,}{base:>10.4f}{last['heldout_nats']:>10.4f}"
                f"{last['heldout_nats'] - base:>8.4f}{speed:>10,.0f}{done}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("out/proof"))
    parser.add_argument("--tokens", type=parse_count, default=33_000_000)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", choices=["auto", "yes", "no"], default="auto")
    parser.add_argument("--batch-tokens", type=parse_count, default=32_768)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    timer = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    for name in arguments.arms:
        print(f"── {name}", flush=True)
        config = TuneConfig(
            model=arguments.model, data=arguments.data, out=str(arguments.out / name), max_tokens=arguments.tokens,
            batch_tokens=arguments.batch_tokens, sequence_length=arguments.sequence_length,
            sequences=arguments.sequences, device=arguments.device, compile=arguments.compile,
            cache_dir=str(arguments.out / "tokens"), **ARMS[name],
        )  # fmt: skip
        if not run_arm(config):
            break
    timer.cancel()
    print(table(arguments.out), flush=True)


if __name__ == "__main__":
    main()
