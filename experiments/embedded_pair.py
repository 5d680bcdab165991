"""The outlier-safe checkpoint of the package and its twin, side by side: at 16 and 4 bits, their outliers, and made ternary.

    python experiments/embedded_pair.py OUT        what experiments/embedded_pair.sh trained in OUT

Every finished run becomes a record, docs/data/embedded_pair/RUN.json: its curve, its loss at 16 and 4 bits, its outliers. Of
each recipe the run of the best rate is made ternary as well, by `trilobit tune` at two rates in batches of 4,096;
every run that was stands in the table, with the better of the two.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from osp_ablation import PROTOCOLS, measured
from proof import Quiet

from trilobit.config.tune import TuneConfig
from trilobit.train import tune
from trilobit.train.plots import read_log

RECORDS = Path(__file__).parents[1] / "docs" / "data" / "embedded_pair"
AT_FOUR_BITS = ("W4A4KV4, to nearest", "… + FFN Hadamard")
NAMES = {"osp": "outlier-safe", "adam": "its twin (Adam, RMSNorm)"}
TUNE_RATES, TUNE_TOKENS = (2e-3, 4e-3), 1_048_576


def made_ternary(run: Path, rate: float) -> dict[str, Any]:
    """What `trilobit tune` makes of a run at one rate: losses, and how many codes a step flips once all is quantised."""
    out = run.with_name(f"{run.name}-ternary-{rate:g}")
    if not (out / "run.json").exists() or "result" not in json.loads((out / "run.json").read_text()):
        tune.run(
            TuneConfig(
                model=str(run / "model"), data="stdlib", out=str(out), max_tokens=TUNE_TOKENS, batch_tokens=4096,
                sequence_length=256, sequences=16, lr=rate, schedule="global", distill="logits", eval_tokens=65_536,
                eval_every=TUNE_TOKENS // 8, precision="bf16", resume=(out / "run.json").exists(),
            ),
            Quiet(),
        )  # fmt: skip
    result = json.loads((out / "run.json").read_text())["result"]
    flips = [sum(row["flips"]) / len(row["flips"]) for row in read_log(out) if row.get("flips") and row["lambda"] == 1]
    return {
        "rate": rate, "base": result["base_nats_per_token"], "ternary": result["nats_per_token"],
        "gap": result["nats_per_token"] - result["base_nats_per_token"], "flips": sum(flips) / max(1, len(flips)),
    }  # fmt: skip


def table(records: dict[str, dict[str, Any]]) -> str:
    """A column a run that was tuned as well, with the better of what was made of it.

    records: by run, as read_records gives them.
    """
    found = {run: r | {"ternary": min(r["tuned"], key=lambda t: t["ternary"])} for run, r in records.items() if "tuned" in r}
    heads = ["", *(f"{NAMES[run.split('-')[0]]}, {r['lr']:g}" for run, r in found.items())]
    rows = {
        "parameters": lambda r: f"{r['parameters']:,}",
        "nats per token, held out": lambda r: f"{r['w16a16kv16']:.3f}",
        "W4A4KV4, to nearest": lambda r: f"{r['w4a4kv4']:.3f} (+{r['w4a4kv4'] - r['w16a16kv16']:.3f})",
        "… + FFN Hadamard": lambda r: f"{r['w4a4kv4_hadamard']:.3f} (+{r['w4a4kv4_hadamard'] - r['w16a16kv16']:.3f})",
        "excess kurtosis, contextual": lambda r: f"{r['kurtosis']:.2f}",
        "excess kurtosis, osp": lambda r: f"{r['kurtosis_osp']:.2f}",
        "excess kurtosis of what down_proj reads": lambda r: f"{r['kurtosis_mlp_output']:.1f}",
        "nats per token, windows of 256": lambda r: f"{r['ternary']['base']:.3f}",
        "… made ternary": lambda r: f"{r['ternary']['ternary']:.3f} (+{r['ternary']['gap']:.3f})",
        "at a rate of": lambda r: f"{r['ternary']['rate']:g}",
        **{
            f"codes flipped by a step at λ = 1, at {rate:g}": lambda r, rate=rate: next(
                (f"{tuned['flips']:.2%}" for tuned in r["tuned"] if tuned["rate"] == rate), ""
            )
            for rate in TUNE_RATES
        },
    }
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, cell in rows.items():
        marks = {run: " †" if name in AT_FOUR_BITS and not _today(r) else "" for run, r in found.items()}
        lines.append(f"| {name} | " + " | ".join(cell(r) + marks[run] for run, r in found.items()) + " |")
    if not all(_today(r) for r in found.values()):
        lines += ["", "† by an earlier text of the protocol"]
    return "\n".join(lines)


def read_records() -> dict[str, dict[str, Any]]:
    """Records by run: the outlier-safe ones first, then by rate."""
    found = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("osp"), item[1]["lr"])))


def _today(record: dict[str, Any]) -> bool:
    """Whether it was measured by the protocols as they are now."""
    return record["protocols"] == {name: protocol.sha256 for name, protocol in PROTOCOLS.items()}


def record(run: Path) -> dict[str, Any]:
    """All that is measured of a finished run before it is tuned."""
    begun = json.loads((run / "run.json").read_text())
    kept = {key: begun["result"][key] for key in ("nats_per_token", "parameters", "tokens")} | {"lr": begun["config"]["lr"]}
    curve = [(r["tokens"], round(r["heldout_nats"], 4), r.get("kurtosis")) for r in read_log(run) if "heldout_nats" in r]
    numbers = measured(run, argparse.Namespace(device="cpu", report=None, data="stdlib"))
    return kept | numbers | {"curve": curve}


def tune_best(recipe: str, out: Path) -> None:
    """Adds what `trilobit tune` makes of a recipe's best rate to its record, if it is not known."""
    found = {run: r for run, r in read_records().items() if run.startswith(f"{recipe}-")}
    if found:
        run = min(found, key=lambda run: found[run]["nats_per_token"])
        if "tuned" not in found[run]:
            tuned = [made_ternary(out / run, rate) for rate in TUNE_RATES]
            (RECORDS / f"{run}.json").write_text(json.dumps(found[run] | {"tuned": tuned}) + "\n")


def rates(recipe: str) -> str:
    """Every rate that was tried, with the loss it gave."""
    found = [r for run, r in read_records().items() if run.startswith(f"{recipe}-")]
    return ", ".join(f"{r['lr']:g}: {r['nats_per_token']:.3f}" for r in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    RECORDS.mkdir(parents=True, exist_ok=True)
    for run in sorted(p.parent for p in arguments.out.glob("*/run.json") if "ternary" not in p.parent.name):
        path = RECORDS / f"{run.name}.json"
        if not path.exists() and "result" in json.loads((run / "run.json").read_text()):
            path.write_text(json.dumps(record(run)) + "\n")
    for recipe, name in NAMES.items():
        tune_best(recipe, arguments.out)
        print(f"{name}, nats by rate: {rates(recipe)}")
    print(table(read_records()))


if __name__ == "__main__":
    main()
