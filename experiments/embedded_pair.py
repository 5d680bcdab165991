"""The outlier-safe checkpoint of the package and its twin, side by side: at 16 and 4 bits, their outliers, and made ternary.

    python experiments/embedded_pair.py OUT        what experiments/embedded_pair.sh trained in OUT

Of each the better of two rates is taken. Both are tuned to ternary on equal tokens with `trilobit demo`'s settings, at two
rates each and the better counts. One JSON file goes to docs/data/embedded_pair.json; curves of the trainings beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from osp_ablation import measured
from proof import Quiet

from trilobit.config.tune import TuneConfig
from trilobit.train import tune
from trilobit.train.plots import read_log

DATA = Path(__file__).parents[1] / "docs" / "data"
NAMES = {"osp": "outlier-safe", "adam": "its twin (Adam, RMSNorm)"}
TUNE_RATES, TUNE_TOKENS = (2e-3, 4e-3), 1_048_576


def pretrained(out: Path, recipe: str) -> tuple[Path, dict[str, Any]]:
    """The run of the better rate, and its result."""
    runs = [run for run in sorted(out.glob(f"{recipe}-*e-*")) if (run / "run.json").exists()]
    results = {run: json.loads((run / "run.json").read_text()) for run in runs}
    finished = {run: record["result"] for run, record in results.items() if "result" in record}
    assert finished, f"no finished run of {recipe} in {out}: experiments/embedded_pair.sh trains them"
    best = min(finished, key=lambda run: finished[run]["nats_per_token"])
    return best, {"rates": {run.name: found["nats_per_token"] for run, found in finished.items()}} | finished[best]


def made_ternary(run: Path, rate: float) -> dict[str, Any]:
    """What `trilobit tune` makes of a run at one rate: losses, and how many codes a step flips once all is quantised."""
    out = run.with_name(f"{run.name}-ternary-{rate:g}")
    if not (out / "run.json").exists() or "result" not in json.loads((out / "run.json").read_text()):
        tune.run(
            TuneConfig(
                model=str(run / "model"), data="stdlib", out=str(out), max_tokens=TUNE_TOKENS, batch_tokens=4096,
                sequence_length=256, sequences=16, lr=rate, schedule="global", distill="logits", eval_tokens=65_536,
                eval_every=TUNE_TOKENS // 8, resume=(out / "run.json").exists(),
            ),
            Quiet(),
        )  # fmt: skip
    result = json.loads((out / "run.json").read_text())["result"]
    flips = [sum(row["flips"]) / len(row["flips"]) for row in read_log(out) if row.get("flips") and row["lambda"] == 1]
    return {
        "rate": rate, "base": result["base_nats_per_token"], "ternary": result["nats_per_token"],
        "gap": result["nats_per_token"] - result["base_nats_per_token"], "flips": sum(flips) / max(1, len(flips)),
    }  # fmt: skip


def table(found: dict[str, dict[str, Any]]) -> str:
    heads = ["", *(NAMES[recipe] for recipe in found)]
    rows = {
        "rate": lambda r: f"{r['lr']:g}",
        "parameters": lambda r: f"{r['parameters']:,}",
        "nats per token, held out": lambda r: f"{r['w16a16kv16']:.3f}",
        "W4A4KV4, to nearest": lambda r: f"{r['w4a4kv4']:.3f} (+{r['w4a4kv4'] - r['w16a16kv16']:.3f})",
        "… + FFN Hadamard": lambda r: f"{r['w4a4kv4_hadamard']:.3f} (+{r['w4a4kv4_hadamard'] - r['w16a16kv16']:.3f})",
        "excess kurtosis, contextual": lambda r: f"{r['kurtosis']:.2f}",
        "excess kurtosis, osp": lambda r: f"{r['kurtosis_osp']:.2f}",
        "excess kurtosis of what down_proj reads": lambda r: f"{r['kurtosis_mlp_output']:.1f}",
        "ternary, nats above itself": lambda r: f"{r['ternary']['gap']:.3f}",
        "ternary, nats per token": lambda r: f"{r['ternary']['ternary']:.3f}",
        "codes flipped by a step at λ = 1": lambda r: f"{r['ternary']['flips']:.2%}",
    }
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += [f"| {name} | " + " | ".join(cell(found[recipe]) for recipe in found) + " |" for name, cell in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    found = {}
    for recipe in NAMES:
        run, result = pretrained(arguments.out, recipe)
        config = json.loads((run / "run.json").read_text())["config"]
        kept = {key: result[key] for key in ("rates", "nats_per_token", "parameters")} | {"lr": config["lr"]}
        numbers = measured(run, argparse.Namespace(device="cpu", report=None, data="stdlib"))
        tuned = [made_ternary(run, rate) for rate in TUNE_RATES]
        found[recipe] = kept | numbers | {"ternary": min(tuned, key=lambda t: t["ternary"]), "tuned": tuned}
        curve = [(r["tokens"], round(r["heldout_nats"], 4), r.get("kurtosis")) for r in read_log(run) if "heldout_nats" in r]
        found[recipe]["curve"] = curve
    (DATA / "embedded_pair.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
