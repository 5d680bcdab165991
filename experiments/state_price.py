"""What narrower moments and gradients cost in loss: one small model, the same tokens and seeds, each way of storing them.

    python experiments/state_price.py OUT [--tokens 600000] [--seeds 2]

The 3.5 M Llama of `pretrain` (512 tokens of vocabulary) on the standard library, outlier-safe with Muon and ordinary with
AdamW. A run that is there is not trained again. The table has nats per token on held-out text, mean over seeds, and the
difference to fp32 with half its range over seeds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from proof import Quiet

from trilobit.config.pretrain import PretrainConfig
from trilobit.train import pretrain

PLAIN: dict[str, Any] = {"optimizer": "adamw", "ssnorm": False, "embproj": False, "weight_decay": 0.1}
BF16, INT8, GRADIENTS = {"optimizer_state": "bf16"}, {"optimizer_state": "int8"}, {"gradients": "bf16"}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("muon", "fp32", {}),
    ("muon", "moments in bf16", BF16),
    ("muon", "its momentum in int8, other moments in bf16", INT8),
    ("muon", "… and gradients in bf16", INT8 | GRADIENTS),
    ("adamw", "fp32", PLAIN),
    ("adamw", "moments in bf16", PLAIN | BF16),
    ("adamw", "… and gradients in bf16", PLAIN | BF16 | GRADIENTS),
]


def nats(out: Path, tokens: int, **settings: Any) -> float:
    """Held-out loss of a run, made now or found."""
    found = out / "run.json"
    if not found.exists() or "result" not in json.loads(found.read_text()):
        pretrain.run(
            PretrainConfig(
                architecture="llama-3m", train_tokenizer=512, data="stdlib", max_tokens=tokens, batch_tokens=2048,
                sequence_length=128, sequences=16, lr=2e-3, eval_tokens=65_536, precision="bf16", out=str(out),
                resume=found.exists(), **settings,
            ),
            Quiet(),
        )  # fmt: skip
    return json.loads(found.read_text())["result"]["nats_per_token"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    print("| | stored | nats per token | above fp32 |\n|---|---|---|---|")
    plain: list[float] = []
    for optimizer, name, settings in CASES:
        stored = "-".join(settings[key] for key in ("optimizer_state", "gradients") if key in settings) or "fp32"
        places = [arguments.out / f"{optimizer}-{stored}-{seed}" for seed in range(arguments.seeds)]
        found = [nats(place, arguments.tokens, seed=seed, **settings) for seed, place in enumerate(places)]
        plain = found if stored == "fp32" else plain
        apart = [a - b for a, b in zip(found, plain, strict=True)]
        spread = f"{statistics.mean(apart):+.4f} ± {(max(apart) - min(apart)) / 2:.4f}"
        print(f"| {optimizer} | {name} | {statistics.mean(found):.4f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
