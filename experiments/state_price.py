"""What narrower moments and gradients cost in loss: one small model, the same tokens and seeds, each way of storing them.

    python experiments/state_price.py OUT [--tokens 600000] [--seeds 2]

The 3.5 M Llama of `pretrain` (512 tokens of vocabulary) on the standard library, outlier-safe with Muon and ordinary with AdamW.
A run that is there is not trained again. The table has nats per token on held-out text, mean over seeds, and the difference to fp32
with half its range over seeds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from proof import Quiet

from trilobit.config.pretrain import PretrainConfig
from trilobit.train import pretrain

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {},
    "adamw": {"optimizer": "adamw", "ssnorm": False, "embproj": False, "weight_decay": 0.1},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "moments in bf16": {"optimizer_state": "bf16"},
    "Muon's in int8, others in bf16": {"optimizer_state": "int8"},
    "the same, gradients in bf16": {"optimizer_state": "int8", "gradients": "bf16"},
}


def nats(out: Path, tokens: int, **settings: Any) -> float:
    """Held-out loss of a run, made now or found."""
    found = out / "run.json"
    if not found.exists() or "result" not in json.loads(found.read_text()):
        pretrain.run(
            PretrainConfig(
                architecture="llama-3m", train_tokenizer=512, data="stdlib", max_tokens=tokens, batch_tokens=2048,
                sequence_length=128, sequences=16, lr=2e-3, eval_tokens=65_536, out=str(out), resume=found.exists(), **settings,
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
    for optimizer, of_optimizer in OPTIMIZERS.items():
        plain: list[float] = []
        for way, settings in WAYS.items():
            if optimizer == "adamw" and settings.get("optimizer_state") == "int8":
                settings = settings | {"optimizer_state": "bf16"}
                if "gradients" not in settings:
                    continue  # bf16 again
            found = [
                nats(
                    arguments.out / f"{optimizer}-{'-'.join(settings.values()) or 'fp32'}-{seed}", arguments.tokens, seed=seed,
                    **of_optimizer, **settings,
                )
                for seed in range(arguments.seeds)
            ]  # fmt: skip
            plain = plain or found
            apart = [a - b for a, b in zip(found, plain, strict=True)]
            spread = (max(apart) - min(apart)) / 2
            name = way.replace("Muon's in int8, others in bf16", "Muon's momentum in int8, others in bf16")
            name = name.replace(
                "the same, gradients", "moments and gradients" if optimizer == "adamw" else "the same, gradients"
            )
            print(
                f"| {optimizer} | {name} | {statistics.mean(found):.4f} | {statistics.mean(apart):+.4f} ± {spread:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
