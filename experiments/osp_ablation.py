"""The six rows of outlier-safe pre-training's ablation (arXiv 2506.19697) on our scale, resumable.

    python experiments/osp_ablation.py STUDY --data TEXT [--minutes 9] [--table]

Every row is `trilobit pretrain` with the recipe of its name, on the same tokens, at each learning rate of the study; the best
held-out loss decides a row's rate. A finished model is measured as it is published, folded: loss, excess kurtosis by both
protocols, and loss at W4A4KV4, rounded to nearest, without and with a Hadamard in front of the MLP's last linear (protocol
osp of `trilobit quantize`; records without `window` had windows of twice the trained length, a coarser clip search and one
scale a token at o_proj). One line a trial goes to docs/data/osp/STUDY/ROW.jsonl. Several processes may share a study.
"""

import argparse
import copy
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from proof import Quiet, claim

from trilobit.config.fields import parse_count
from trilobit.config.pretrain import PretrainConfig
from trilobit.corpus import documents
from trilobit.errors import NonFiniteError
from trilobit.fourbit.fake import prepare, round_weights
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.infer.load import load
from trilobit.measure.contextual import measure_contextual
from trilobit.measure.kurtosis import measure_osp
from trilobit.measure.perplexity import fitting, nats, text_windows
from trilobit.recipes import RECIPES
from trilobit.train import pretrain
from trilobit.train.loop import Interrupted
from trilobit.train.plots import read_log

RECORDS = Path(__file__).parents[1] / "docs" / "data" / "osp"
ROWS = {
    "adam": "Adam", "muon-only": "Muon only (embeddings too)", "muon": "Muon", "ssnorm": "Muon + SSNorm",
    "embproj": "Muon + EmbProj", "osp": "all: outlier-safe",
}  # fmt: skip
REPORT_TOKENS = 65_536
LENGTH = 512  # of windows, where a model has as many positions


@dataclass(frozen=True)
class Study:
    """An architecture, its tokens, and the learning rates every row is tried at."""

    tokens: int
    rates: tuple[float, ...]
    settings: dict[str, Any]


SMALL = {
    "architecture": "llama-3m", "train_tokenizer": 4096, "sequence_length": 256, "sequences": 16, "batch_tokens": 8192,
}  # fmt: skip
STUDIES = {
    "3m": Study(10_485_760, (1e-3, 2e-3, 4e-3), SMALL | {"precision": "bf16"}),
    "3m-seed-1": Study(10_485_760, (4e-3,), SMALL | {"precision": "bf16", "seed": 1}),
    "3m-rates": Study(2_621_440, (1e-3, 2e-3, 4e-3, 8e-3), SMALL | {"precision": "bf16"}),  # which rate is a row's own?
    "60m": Study(
        209_715_200, (5e-4, 1e-3, 2e-3),
        {"architecture": "llama-60m", "train_tokenizer": 16_384, "sequence_length": 512, "sequences": 64,
         "batch_tokens": 65_536, "compile": "yes", "precision": "bf16"},
    ),
}  # fmt: skip


Records = dict[tuple[str, float], dict[str, Any]]
"""Of a row at a rate."""


def read_records(folder: Path) -> Records:
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[row["row"], row["rate"]] = row
    return found


def run_trial(row: str, rate: float, study: Study, arguments: argparse.Namespace) -> None:
    out = arguments.out / arguments.study / f"{row}-{rate:g}"
    begun = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    config = PretrainConfig(
        **{
            **study.settings, **RECIPES["pretrain"][row](), "data": arguments.data, "out": str(out), "lr": rate,
            "max_tokens": study.tokens, "eval_every": study.tokens // 16, "device": arguments.device,
            "cache_dir": str(arguments.out / "tokens"), "eval_tokens": 65_536,
            "resume": bool(begun) and "result" not in begun,
        }
    )  # fmt: skip
    record: dict[str, Any] = {"row": row, "rate": rate, "tokens": study.tokens, "diverged": False}
    try:
        if "result" not in begun:
            pretrain.run(config, Quiet())
        result = json.loads((out / "run.json").read_text())["result"]
        record |= {key: result[key] for key in ("nats_per_token", "excess_kurtosis", "parameters", "tokens_per_second")}
        record |= measured(out, arguments)
    except NonFiniteError as error:
        record |= {"diverged": True, "why": str(error)}
    rows = read_log(out) if (out / "log.jsonl").exists() else []
    record["curve"] = [
        (r["tokens"], round(r["heldout_nats"], 4), r["kurtosis"]) for r in rows if "heldout_nats" in r and "kurtosis" in r
    ]
    folder = RECORDS / arguments.study
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{row}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    shown = "diverged" if record["diverged"] else f"{record['nats_per_token']:.4f}, at 4 bits {record['w4a4kv4']:.3f}"
    print(f"{row:<12}{rate:<8g}{shown}", flush=True)


PROTOCOLS = {
    "w16a16kv16": PRESETS["osp"].with_bits("16-16-16"),
    "w4a4kv4": PRESETS["osp"].with_bits("4-4-4"),
    "w4a4kv4_hadamard": PRESETS["osp"].with_bits("4-4-4").rotated("ffn"),
}
PARTS = {"weights": "4-16-16", "activations": "16-4-16", "keys and values": "16-16-4"}


def measured(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kurtosis by both protocols and the loss at 4 bits of everything and of each part alone, on the same windows: of the
    report, else of what was held out."""
    loaded = load(out, device=arguments.device)
    length = fitting(loaded.model, LENGTH)
    text, split = (arguments.report, None) if arguments.report else (arguments.data, "heldout")
    texts = (document.text for document in documents(text, split=split))
    every, _ = text_windows(islice(texts, 10_000), loaded.tokenizer, length + 1, False)
    spread = torch.linspace(0, len(every) - 1, max(1, min(len(every), REPORT_TOKENS // length))).long()
    windows = every[spread]  # texts differ much in difficulty, and neighbours in a folder are alike
    fingerprint = sha256(windows.numpy().tobytes()).hexdigest()
    found: dict[str, Any] = {"protocols": {}, "window": length, "windows_sha256": fingerprint}
    for name, protocol in PROTOCOLS.items():
        found[name], found["protocols"][name] = quantized_nats(loaded.model, protocol, windows), protocol.sha256
    found["parts"] = {
        name: quantized_nats(loaded.model, PRESETS["osp"].with_bits(bits), windows) for name, bits in PARTS.items()
    }
    contextual = measure_contextual(loaded.model, windows[:, :-1], str, sequences=8)
    alone = measure_osp(loaded.model, windows[:, :-1], bos=False)
    found |= {"kurtosis": contextual.excess_kurtosis, "kurtosis_osp": alone.excess_kurtosis}
    reads = [site.later.excess_kurtosis for site in contextual.sites if site.site == "mlp-output"]
    return found | {"kurtosis_mlp_output": sum(reads) / len(reads)}


def quantized_nats(model: Any, protocol: Protocol, windows: Any) -> float:
    """Nats per token of a copy of `model` that computes as `protocol` says. windows: [N, W + 1]."""
    prepared = prepare(copy.deepcopy(model), protocol)
    round_weights(prepared, protocol)
    with prepared.computing(protocol) as quantized:
        total, count = nats(quantized, windows, 8)
    return total / count


def best(records: Records, row: str) -> dict[str, Any] | None:
    """A row at its best rate."""
    fine = [r for (name, _), r in records.items() if name == row and not r["diverged"]]
    return min(fine, key=lambda r: r["nats_per_token"], default=None)


def table(records: Records) -> str:
    heads = [
        "row", "rate", "held out", "nats", "kurtosis", "osp's", "down_proj reads", "W4A4KV4", "+ FFN Hadamard", "tokens/s",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, name in ROWS.items():
        if (r := best(records, row)) is not None:
            mark = "" if "window" in r else " †"
            lost = [f"{r[key]:.2f} (+{r[key] - r['w16a16kv16']:.2f})" for key in ("w4a4kv4", "w4a4kv4_hadamard")]
            numbers = [f"{r[key]:.2f}" for key in ("kurtosis", "kurtosis_osp", "kurtosis_mlp_output")]
            losses = [f"{r[key]:.3f}" for key in ("nats_per_token", "w16a16kv16")]
            cells = [name + mark, f"{r['rate']:g}", *losses, *numbers, *lost, f"{r['tokens_per_second']:,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    if any("†" in line for line in lines):
        lines += [
            "",
            "† on windows of twice the trained length, a coarser clip search, one scale a token at o_proj: another measure.",
        ]
    return "\n".join(lines)


def parts_table(records: Records) -> str:
    """What four bits cost every row at its best rate: all of it, and each part alone."""
    found = {name: r for row, name in ROWS.items() if (r := best(records, row)) is not None and "parts" in r}
    lines = ["| row | all | " + " | ".join(PARTS) + " |", "|---|" + "---|" * (1 + len(PARTS))]
    for name, r in found.items():
        costs = [value - r["w16a16kv16"] for value in (r["w4a4kv4"], *(r["parts"][part] for part in PARTS))]
        lines.append(f"| {name} | " + " | ".join(f"+{cost:.3f}" for cost in costs) + " |")
    return "\n".join(lines) if found else ""


def rates_table(records: Records) -> str:
    """Held-out nats and the residual stream's excess kurtosis of every row at every rate, a row's best in bold."""
    if not records:
        return ""
    rates = sorted({rate for _, rate in records})
    lines = ["| row | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for row, name in ROWS.items():
        cells = []
        for rate in rates:
            record = records.get((row, rate))
            if record is None or record["diverged"]:
                cells.append("" if record is None else "diverged")
                continue
            nats = f"{record['nats_per_token']:.3f}"
            cells.append(f"{f'**{nats}**' if record is best(records, row) else nats}, {record['kurtosis']:.2f}")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seeds_table(seeds: list[Records]) -> str:
    """Of rows that more than one seed has at one rate: held-out nats, kurtosis and what four bits cost, seed by seed."""
    lines = ["| row | rate | held out | kurtosis | W4A4KV4 | + FFN Hadamard |", "|---|---|---|---|---|---|"]
    for row, name in ROWS.items():
        for rate in sorted({rate for records in seeds[1:] for of, rate in records if of == row}):
            found = [records[row, rate] for records in seeds if (row, rate) in records]
            found = [r for r in found if not r["diverged"]]
            if len(found) > 1:
                cells = [
                    ", ".join(f"{r['nats_per_token']:.3f}" for r in found), ", ".join(f"{r['kurtosis']:.2f}" for r in found),
                    *(", ".join(f"+{r[key] - r['w16a16kv16']:.3f}" for r in found) for key in ("w4a4kv4", "w4a4kv4_hadamard")),
                ]  # fmt: skip
                lines.append(f"| {name} | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--data", required=True)
    parser.add_argument("--report", help="text that is neither trained nor chosen on; default: the held-out part of --data")
    parser.add_argument("--out", type=Path, default=Path("out/osp"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--tokens", type=parse_count)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    study = Study(arguments.tokens or study.tokens, tuple(arguments.rates or study.rates), study.settings)
    folder = RECORDS / arguments.study
    if not arguments.table:
        end = time.monotonic() + 60 * arguments.minutes
        timer = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
        try:
            for rate in (study.rates[len(study.rates) // 2], *study.rates):  # the middle one first: a table early on
                for row in arguments.rows:
                    place = arguments.out / arguments.study / f"{row}-{rate:g}"
                    with claim(place.with_name(f"{place.name}.lock")) as mine:
                        if mine and time.monotonic() < end and (row, rate) not in read_records(folder):
                            run_trial(row, rate, study, arguments)
                            shutil.rmtree(place / "checkpoints", ignore_errors=True)  # none, where it diverged early
        except (Interrupted, KeyboardInterrupt):
            pass
        timer.cancel()
    records = read_records(folder)
    print(f"{table(records)}\n\n{rates_table(records)}", flush=True)


if __name__ == "__main__":
    main()
