"""Is an extra RMSNorm all you need? Every arm of proof_arms.py on equal terms, by successive halving, resumable.

    python experiments/proof.py STUDY MODEL --data TEXT [--report TEXT] [--other TEXT] [--minutes 9] [--table]

A trial is one `trilobit tune` of an arm at a budget, a learning rate and a seed. Which trials are wanted follows from
those that are done (`wanted`), so that this can be stopped and called again, or called several times at once: processes
claim trials by locking a file, and wait for each other before the next rung.

    rung 1   budget B       every arm, all learning rates                    ranks learning rates, kills nobody
    rung 2   budget 4·B     every arm, its two best rates                    ranks arms
    rung 3   budget 16·B    references and the best third of each class, best rate, three seeds
    rung 4   B and 4·B      the same arms, the other two seeds: every claim has three seeds at three budgets

(A study may keep fewer rates and seeds: Study.)

A class is what the finished model is allowed to be (what a scale covers, int8 or full-precision inputs, what is ternary):
weights-only models would otherwise fill the third rung. Layer-by-layer reconstruction is paid for: an eighth of the budget.

Rates and arms are chosen by held-out loss; what is reported is the loss on other text (--report; for --data self, other
samples). One line a trial goes to docs/data/proof/STUDY/ARM.jsonl, curve included; a rate that diverges is a line, too.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof_arms import ALWAYS, ARMS, CONTROL
from torch import Tensor

import trilobit
from trilobit.config.fields import parse_count
from trilobit.config.tune import TuneConfig
from trilobit.corpus import documents
from trilobit.doctor import processor_name
from trilobit.errors import NonFiniteError
from trilobit.infer.hf import sample_windows
from trilobit.infer.load import load, load_pretrained
from trilobit.infer.loaded import Loaded
from trilobit.listener import Listener
from trilobit.measure.perplexity import nats, text_windows
from trilobit.surgery.roles import vocabulary_size
from trilobit.tensors import weights_fingerprint
from trilobit.train import tune
from trilobit.train.data import from_tokens
from trilobit.train.loop import Interrupted
from trilobit.train.plots import read_log
from trilobit.train.windows import evaluation_windows

RECORDS = Path(__file__).parents[1] / "docs" / "data" / "proof"
SEEDS = (0, 1, 2)
REPORT_TOKENS = 65_536
READ = 64  # times as many, of a text that is longer


@dataclass(frozen=True)
class Study:
    """A model's size decides its budgets and the learning rates worth trying."""

    budget: int
    rates: tuple[float, ...]
    settings: dict[str, Any]
    """Of TuneConfig, for every arm."""
    control_rates: float = 1.0
    """The control's rates over those of the others: what is not quantised has little to learn, and forgets at high rates."""
    one_rung: bool = False
    """Every arm at one budget, and no more."""
    rates_kept: int = 2
    """Of each arm, at the second budget."""
    seeds: tuple[int, ...] = SEEDS
    """At the third budget."""
    report_tokens: int = REPORT_TOKENS
    report_length: int | None = None
    """Of the windows that are reported on; None: as those that are trained on."""
    other_length: int | None = None
    """Of further windows of the same text, reported on as well."""

    def rates_of(self, arm: str) -> tuple[float, ...]:
        return tuple(rate * self.control_rates for rate in self.rates) if arm == CONTROL else self.rates

    @property
    def budgets(self) -> tuple[int, int, int]:
        return self.budget, 4 * self.budget, 16 * self.budget


SMALL = {"batch_tokens": 4096, "compile": "no", "eval_tokens": 16_384}
STORIES = SMALL | {  # eager: flash attention is slow backwards where heads are eight wide
    "sequence_length": 128, "sequences": 32, "attention": "eager", "self_tokens": 2_000_000, "precision": "bf16",
}  # fmt: skip
SHORT_STEPS = STORIES | {"batch_tokens": 1024, "sequences": 8}
CODE = Study(
    262_144, (1e-3, 2e-3, 4e-3, 8e-3),
    SMALL | {"sequence_length": 256, "sequences": 4, "batch_tokens": 1024, "precision": "fp32"}, control_rates=1 / 32,
)  # fmt: skip
STUDIES = {
    "stories260k": Study(
        262_144, (1.25e-3, 2.5e-3, 5e-3, 1e-2), SHORT_STEPS, control_rates=1 / 32
    ),
    "stories260k-around": Study(  # one setting of the default changed; beside it the default on the same machine
        262_144, (1.25e-3, 2.5e-3, 5e-3, 1e-2), SHORT_STEPS, one_rung=True
    ),
    "stories260k-rates": Study(  # how high may a rate be?
        262_144, (2e-2, 4e-2, 8e-2, 1.6e-1), SHORT_STEPS, one_rung=True
    ),
    "stories260k-windows": Study(  # the same tokens in shorter or longer windows
        262_144, (5e-3,), SHORT_STEPS, report_length=512, other_length=128
    ),
    "stories260k-long": Study(  # the longest that the model has positions for
        262_144, (1.25e-3, 2.5e-3, 5e-3, 1e-2), SHORT_STEPS | {"sequence_length": 512, "sequences": 2},
        control_rates=1 / 32, rates_kept=1,
    ),
    "stories260k-default": Study(  # `trilobit tune` without a flag: its own rate, batches and lengths, new samples throughout
        262_144, (3.75e-3,), {"attention": "eager", "compile": "no", "eval_tokens": 16_384}, report_length=512
    ),
    "stories260k-batches": Study(4_194_304, (5e-3, 1e-2), STORIES, one_rung=True),  # a fourth of the steps
    "stories260k-cut": Study(262_144, (2.5e-3, 5e-3, 1e-2, 2e-2), STORIES),  # docs/proof_studies.md: what was wrong with it
    "embedded": CODE,
    "embedded-twin": replace(CODE, one_rung=True),  # the same with outliers: RMSNorm, Adam (embedded_pair.sh trains it)
    "smollm2-cpu": Study(  # what two cores can do in hours: a thirty-second of the budgets, one seed
        65_536, (5e-4, 1e-3, 2e-3, 4e-3),
        {
            "sequence_length": 512, "batch_tokens": 1024, "sequences": 2, "compile": "yes", "eval_tokens": 8192,
            "attention": "eager", "precision": "bf16",  # the first 15 records: fp32, the next two: sdpa
        },
        control_rates=1 / 32, rates_kept=1, seeds=(0,), report_tokens=16_384,
    ),
    "smollm2-windows": Study(
        65_536, (2e-3,),
        {"batch_tokens": 1024, "compile": "yes", "eval_tokens": 8192, "attention": "eager", "precision": "bf16"},
        seeds=(0,), report_tokens=16_384, report_length=512, other_length=2048,
    ),
    "smollm2": Study(
        2_097_152, (2e-4, 4e-4, 8e-4, 1.6e-3),
        {
            "sequence_length": 512, "batch_tokens": 8_192, "sequences": 16, "compile": "yes", "eval_tokens": 131_072,
            "precision": "bf16",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Trial:
    arm: str
    budget: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.budget}-{self.rate:g}-{self.seed}"


Records = dict[Trial, dict[str, Any]]


def read_records(folder: Path) -> Records:
    """Every trial that is done, diverged ones among them."""
    found: Records = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[Trial(row["arm"], row["budget"], row["rate"], row["seed"])] = row
    return found


def score(records: Records, trial: Trial) -> float:
    """Held-out nats at the end; infinite for what diverged or is not known."""
    row = records.get(trial)
    return row["nats"] if row is not None and not row["diverged"] else float("inf")


def best_rates(records: Records, study: Study, arm: str, budget: int) -> list[float]:
    """Rates by held-out nats at a budget, best first, among those that were tried (post_training.py has its own)."""
    tried = sorted({trial.rate for trial in records if (trial.arm, trial.budget, trial.seed) == (arm, budget, 0)})
    return sorted(tried, key=lambda rate: score(records, Trial(arm, budget, rate, 0)))


def wanted(records: Records, study: Study, arms: list[str]) -> list[list[Trial]]:
    """The trials of each rung that can be named so far; the last one may be unfinished."""
    small, middle, large = study.budgets
    rungs = [[Trial(arm, small, rate, 0) for arm in arms for rate in study.rates_of(arm)]]
    if study.one_rung or not set(rungs[-1]) <= records.keys():
        return rungs
    kept = {arm: best_rates(records, study, arm, small)[: study.rates_kept] for arm in arms}
    rungs.append([Trial(arm, middle, rate, 0) for arm, rates in kept.items() for rate in rates])
    if not set(rungs[-1]) <= records.keys():
        return rungs
    rate = {arm: best_rates(records, study, arm, middle)[0] for arm in arms}
    ranked = sorted(arms, key=lambda arm: score(records, Trial(arm, middle, rate[arm], 0)))
    finalists = [arm for arm in ALWAYS if arm in arms]
    for kind in dict.fromkeys(map(model_class, arms)):
        rivals = [arm for arm in ranked if model_class(arm) == kind]
        finalists += [arm for arm in rivals[: max(1, len(rivals) // 3)] if arm not in finalists]
    rungs.append([Trial(arm, large, rate[arm], seed) for arm in finalists for seed in study.seeds])
    if len(study.seeds) == 1 or not set(rungs[-1]) <= records.keys():
        return rungs
    at = {
        (arm, budget): best_rates(records, study, arm, budget)[0]
        for arm in finalists for budget in (small, middle)
    }  # fmt: skip
    rungs.append([Trial(arm, budget, rate, seed) for (arm, budget), rate in at.items() for seed in study.seeds[1:]])
    return rungs


def other_seeds(records: Records, study: Study, arms: list[str]) -> list[Trial]:
    """Rung 4's trials of arms at the smallest budget, ahead of their turn."""
    at = {arm: rates[0] for arm in arms if (rates := best_rates(records, study, arm, study.budget))}
    return [Trial(arm, study.budget, rate, seed) for seed in study.seeds[1:] for arm, rate in at.items()]


def model_class(arm: str) -> tuple[str, str, str]:
    """What the arm's finished model is allowed to be."""
    config = TuneConfig(model="", data="", **{**ARMS[arm], "lr": 1.0})
    return config.scale, config.activations, config.cover


class Quiet(Listener):
    """Says nothing; a line a trial is enough."""


def run_trial(trial: Trial, study: Study, arguments: argparse.Namespace, report: Callable[[Path], dict[str, float]]) -> None:
    """Run or continue one trial and write its line. Raises Interrupted when the time is over."""
    out = arguments.out / arguments.study / trial.name
    settings = {**study.settings, **ARMS[trial.arm]}
    if arguments.data != "self":
        settings.pop("self_tokens", None)
    if trial.budget > study.budget and arguments.device == "cpu":
        settings["compile"] = "yes"
    if "distill_attention" in settings:
        settings["attention"] = "sdpa"  # the one that can be listened to
    warm = trial.budget // 8 if "reconstruct_tokens" in settings else 0
    if warm:
        settings["reconstruct_tokens"] = warm
    config = TuneConfig(
        **{
            **settings, "model": arguments.model, "data": arguments.data, "out": str(out), "max_tokens": trial.budget - warm,
            "lr": trial.rate, "seed": trial.seed, "device": arguments.device, "model_format": "none",
            "eval_every": max(trial.budget // 16, study.budget // 4), "cache_dir": str(arguments.out / "tokens"),
        }
    )  # fmt: skip
    row: dict[str, Any] = {**asdict(trial), "diverged": False, "settings": settings, "version": trilobit.__version__}
    begun = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else None
    try:
        if begun is None or "result" not in begun:
            if begun is not None and begun["config"].keys() != asdict(config).keys():  # another version began it
                shutil.rmtree(out)
                begun = None
            tune.run(replace(config, resume=begun is not None), Quiet())
        record = json.loads((out / "run.json").read_text())
        result = record["result"]
    except NonFiniteError as error:
        row |= {"diverged": True, "why": str(error)}
    else:
        row |= {"nats": result["nats_per_token"], "base_nats": result["base_nats_per_token"], **report(out)}
        row |= {"seconds": round(result["seconds"], 1), "tokens": result["tokens"], "machine": machine(arguments.device)}
        row |= {name: record[name] for name in ("base", "data_sha256")}  # fingerprints of model and tokens
    rows = read_log(out) if (out / "log.jsonl").exists() else []
    row["curve"] = [(r["tokens"], round(r["heldout_nats"], 4)) for r in rows if "heldout_nats" in r]
    if trial.budget == study.budgets[-1]:
        row["flips"] = [(r["tokens"], r["flips"]) for r in rows if "flips" in r]
    row["spikes"] = spikes([r["cross_entropy"] for r in rows])
    if rows:
        row["tokens_per_second"] = float(np.median([r["tokens_per_second"] for r in rows]))
    folder = RECORDS / arguments.study
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{trial.arm}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(out / "checkpoints" if arguments.keep else out, ignore_errors=True)
    shown = "diverged" if row["diverged"] else f"{row['nats'] - row['base_nats']:.4f} above the original, {row['seconds']} s"
    print(f"{trial.name:<56} {shown}", flush=True)


def machine(device: str) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else processor_name()


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process alone may do what `path` stands for. The system takes the lock back when a process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def spikes(losses: list[float]) -> int:
    """Steps whose training loss is 0.5 nats above the median of the 20 before."""
    return sum(losses[i] > float(np.median(losses[i - 20 : i])) + 0.5 for i in range(20, len(losses)))


def spread(windows: Tensor, number: int) -> Tensor:
    """`number` of the windows, evenly from beginning to end and off the ends of their stretches: the first documents of a
    text need not be like the rest."""
    number = min(number, len(windows))
    return windows[(2 * torch.arange(number) + 1) * len(windows) // (2 * number)]


def report_windows(base: Loaded, length: int, number: int, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """`number` windows [N, length + 1] of each text that chose nothing: of the same kind, and of another."""
    found: dict[str, Tensor] = {}
    if arguments.data == "self":
        start: Any = base.tokenizer.bos_token_id if base.tokenizer.bos_token_id is not None else base.tokenizer.eos_token_id
        sampled = from_tokens(
            f"report windows {weights_fingerprint(base.model)} {length}",
            lambda: islice(sample_windows(base.model, start, number * length, length, 1_000_003, rows=9), 9),
            base.tokenizer, vocab_size=vocabulary_size(base.model), heldout_tokens=1, sequence_length=length,
            cache_dir=arguments.out / "tokens",
        )  # fmt: skip
        found["report"] = evaluation_windows(sampled.train, length, number * length)
    for name, path in (("report", arguments.report), ("other", arguments.other)):
        if path:
            texts = (document.text for document in documents(path, split="heldout" if path == "stdlib" else None))
            found[name] = spread(text_windows(texts, base.tokenizer, length + 1, False, READ * number)[0], number)
    return found


def reporter(arguments: argparse.Namespace, study: Study) -> Callable[[Path], dict[str, float]]:
    """Measures a finished trial on text that chose nothing: nats above the original, in and out of domain."""
    base = load_pretrained(arguments.model)
    base.model.to(arguments.device)
    sets: dict[str, Tensor] = {}
    for length in {study.report_length or study.settings["sequence_length"], study.other_length} - {None}:
        suffix = f"_{length}" if length == study.other_length else ""
        windows = report_windows(base, length, max(1, study.report_tokens // length), arguments)
        sets |= {f"{name}{suffix}": value for name, value in windows.items()}
    base_nats = {name: nats(base.model, windows, 16) for name, windows in sets.items()}

    def report(out: Path) -> dict[str, float]:
        model = load(out, device=arguments.device).model
        found = {name: nats(model, windows, 16) for name, windows in sets.items()}
        return {f"{name}_gap": a / n - base_nats[name][0] / base_nats[name][1] for name, (a, n) in found.items()}

    return report


def table(records: Records, study: Study) -> str:
    """Nats above the original on the report text, at each budget with its best rate: mean and spread over seeds."""
    measure = "report_gap" if any("report_gap" in row for row in records.values()) else None
    lines = [f"{'arm':<28}" + "".join(f"{budget / 1e6:>14.1f} M" for budget in study.budgets) + f"{'rate':>10}{'spikes':>8}"]
    rows = []
    for arm in sorted({trial.arm for trial in records}):
        cells, last, rate, bumps = "", float("inf"), None, 0
        for budget in study.budgets:
            best = best_rates(records, study, arm, budget)
            found = [records[t] for s in SEEDS if best and (t := Trial(arm, budget, best[0], s)) in records]
            gaps = [r[measure] if measure else r["nats"] - r["base_nats"] for r in found if not r["diverged"]]
            if gaps:
                last, rate, bumps = float(np.mean(gaps)), best[0], sum(r["spikes"] for r in found)
                spread = f" ±{max(gaps) - min(gaps):.3f}" if len(gaps) > 1 else ""
                cells += f"{f'{last:.4f}{spread}':>16}"
            else:
                cells += f"{'diverged' if found else '':>16}"
        rows.append((len(cells.split()), last, f"{arm:<28}{cells}{rate or 0:>10g}{bumps:>8}"))
    rows.sort(key=lambda row: row[1])
    return "\n".join([*lines, *(row[2] for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--report", help="text to report on: the same kind, but seen by nothing")
    parser.add_argument("--other", help="text of another kind to report on")
    parser.add_argument("--out", type=Path, default=Path("out/proof"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--budget", type=parse_count, help="smallest budget in tokens, instead of the study's")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates, instead of the study's")
    parser.add_argument("--one-rung", action="store_true", help="every arm at --budget, and no more")
    parser.add_argument("--seeds-of", nargs="+", choices=list(ARMS), help="only other seeds of these, at the smallest budget")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", action="store_true", help="leave each trial's model where it was made")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    rates = tuple(arguments.rates or study.rates)
    study = replace(study, budget=arguments.budget or study.budget, rates=rates, one_rung=arguments.one_rung or study.one_rung)
    folder = RECORDS / arguments.study
    if not arguments.table:
        end = time.monotonic() + 60 * arguments.minutes
        timer = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # between trials; within one it saves and stops
        report = reporter(arguments, study)
        try:
            while time.monotonic() < end:
                records = read_records(folder)
                ahead = arguments.seeds_of
                rung = other_seeds(records, study, ahead) if ahead else wanted(records, study, arguments.arms)[-1]
                waiting = [trial for trial in rung if trial not in records]
                if not waiting:
                    break
                for trial in waiting:
                    with claim(arguments.out / arguments.study / f"{trial.name}.lock") as mine:
                        if mine and trial not in read_records(folder):
                            run_trial(trial, study, arguments, report)
                            break
                else:
                    time.sleep(2)
        except (Interrupted, KeyboardInterrupt):
            pass
        timer.cancel()
    print(table(read_records(folder), study), flush=True)


if __name__ == "__main__":
    main()
