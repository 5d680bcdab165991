"""Post-training ternary weights beside the arms of proof.py: rounding, GPTQ and CAT-Q, measured as its trials are.

    python experiments/post_training.py STUDY MODEL --data TEXT [--report TEXT] [--other TEXT] [--arms ptq-catq ...]

Weights only, one scale per group of 128, projections of the decoder layers, no norm, head and embeddings as they are: the
class of recipe-weights-only and none-group-128-weights-only-kl. A budget is the number of different calibration tokens, the
first ones of the order that `trilobit tune` with that seed trains in; `proof.py STUDY … --table` shows them all together.

CAT-Q's budget is not its cost. Every token passes every window in every epoch: at 5 layers each layer is in 4 windows, at
30 layers in 2.3 on average, so the published 60 epochs over 1 M tokens are as many layer passes (forward and backward) as
tuning a model of 30 layers on 143 M tokens. A line therefore has `token_layers`, what went forward and backward through one
layer, `forward_token_layers`, what only went forward, and `as_tuned_tokens`: token_layers / layers, what tuning (without
a teacher) would have seen for the same passes. One epoch is the default, for that is four times a tuning's cost already.

With so few steps (256 a window at 262,144 tokens, 3,400 to 15,000 as published) the published rates are too small: CAT-Q's
are tuned, that of its factors (a line's `rate`) and, as a multiple of it, that of its low-rank part (`--low-rank`). Rounding
and GPTQ have none: 0. Rounding needs no tokens either: its lines, one a budget, are the same model. Done trials are skipped.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from catq import Catq, catq
from proof import RECORDS, STUDIES, Study, Trial, claim, read_records, reporter
from ternary_gptq import gptq, rtn
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.config.fields import parse_count
from trilobit.config.tune import TuneConfig
from trilobit.infer.load import load_pretrained
from trilobit.infer.loaded import Loaded, pick_device
from trilobit.measure.perplexity import nats
from trilobit.surgery.roles import decoder_layers
from trilobit.train.loop import Signals
from trilobit.train.text import read_tokens
from trilobit.train.windows import Windows, evaluation_windows

ARMS = ("ptq-rtn", "ptq-rtn-mse", "ptq-gptq", "ptq-gptq-mse", "ptq-catq")
SEEDS = {"ptq-gptq": (0, 1, 2), "ptq-gptq-mse": (0, 1, 2), "ptq-catq": (0, 1, 2)}


def quantize(trial: Trial, model: PreTrainedModel, batches: list[Tensor], arguments: argparse.Namespace) -> dict[str, Any]:
    """Make `model` ternary in place as the trial says; what its line tells of the cost."""
    rule, precision = "mse" if trial.arm.endswith("-mse") else "absmean", arguments.precision
    if trial.arm.startswith("ptq-rtn"):
        rtn(model, rule)
        return {"calibration_tokens": 0, "token_layers": 0, "forward_token_layers": 0}
    tokens = sum(batch.numel() for batch in batches)
    if trial.arm.startswith("ptq-gptq"):
        return {"calibration_tokens": tokens, "token_layers": 0, "forward_token_layers": gptq(model, batches, rule, precision)}
    settings = Catq(
        rate=trial.rate, low_rank_rate=trial.rate * arguments.low_rank, rank=arguments.rank, epochs=arguments.epochs,
        huber=arguments.huber, restart=not arguments.no_restart, seed=trial.seed,
    )  # fmt: skip
    windows: list[tuple[str, float, float]] = []

    def note(window: range, first: float, last: float) -> None:
        windows.append((f"{window.start}-{window.stop - 1}", float(f"{first:.4g}"), float(f"{last:.4g}")))
        print("   ", *windows[-1], flush=True)

    cost = catq(model, batches, settings, precision, note)
    return {
        "calibration_tokens": tokens, "token_layers": cost.trained, "forward_token_layers": cost.forward,
        "as_tuned_tokens": round(cost.trained / len(decoder_layers(model))), "windows": windows,
        "settings": asdict(settings) | {"sequences": arguments.sequences},
    }  # fmt: skip


class Bench:
    """The original, its text, and its measures: the same for every trial of a study."""

    def __init__(self, study: Study, arguments: argparse.Namespace) -> None:
        self.study, self.arguments = study, arguments
        self.report = reporter(arguments, study)
        self.length = study.settings["sequence_length"]
        base = self.load()
        settings = {name: value for name, value in study.settings.items() if name != "self_tokens" or arguments.data == "self"}
        config = TuneConfig(
            **{**settings, "model": arguments.model, "data": arguments.data, "max_tokens": study.budgets[-1],
               "cache_dir": str(arguments.out / "tokens")}
        )  # fmt: skip
        self.tokens = read_tokens(config, base, Signals())
        self.heldout = evaluation_windows(self.tokens.heldout, self.length, config.evaluation_tokens)
        self.base_nats = self.measure(base.model)

    def load(self) -> Loaded:
        loaded = load_pretrained(self.arguments.model)
        loaded.model.to(self.arguments.device).eval()
        return loaded

    def measure(self, model: PreTrainedModel) -> float:
        total, count = nats(model, self.heldout, 16)
        return total / count

    def batches(self, budget: int, seed: int) -> list[Tensor]:
        """The first `budget` tokens of the training order of a seed, [N, T] each."""
        size = self.arguments.sequences
        windows = Windows(self.tokens.train, self.length, seed)
        return [windows.samples(i * size, size)[:, :-1] for i in range(budget // (size * self.length))]

    def run(self, trial: Trial) -> dict[str, Any]:
        """A trial's line."""
        loaded, batches = self.load(), self.batches(trial.budget, trial.seed)
        start = time.perf_counter()
        cost = quantize(trial, loaded.model, batches, self.arguments)
        seconds = time.perf_counter() - start
        require_ternary(loaded.model)
        found = self.measure(loaded.model)
        row = {**asdict(trial), "diverged": not np.isfinite(found), "nats": found, "base_nats": self.base_nats}
        with TemporaryDirectory(dir=self.arguments.out) as folder:  # proof.py's measures read what was written
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            row |= self.report(Path(folder))
        return {**row, "seconds": round(seconds, 1), "tokens": trial.budget, **cost, "curve": [], "spikes": 0}


def require_ternary(model: PreTrainedModel) -> None:
    """Assert that each linear of the decoder layers has at most 0 and ± one value of fp16 in every group of 128."""
    for path, layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                for group in module.weight.detach().abs().split(128, dim=1):
                    scale = group.amax(dim=1, keepdim=True)
                    assert bool(((group == 0) | (group == scale)).all()), path
                    assert torch.equal(scale, scale.half().float()), path


def trials(arguments: argparse.Namespace) -> list[Trial]:
    """Cheapest arm first; CAT-Q with every rate at the first seed, and at the others where `--seeds` asks for them."""
    found = []
    for arm in arguments.arms:
        seeds = [seed for seed in SEEDS.get(arm, (0,)) if seed in arguments.seeds]
        rates = arguments.rates if arm == "ptq-catq" else [0.0]
        found += [Trial(arm, budget, rate, seed) for budget in arguments.budgets for rate in rates for seed in seeds]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--report", help="text to report on: the same kind, but seen by nothing")
    parser.add_argument("--other", help="text of another kind to report on")
    parser.add_argument("--out", type=Path, default=Path("out/proof"))
    parser.add_argument("--records", type=Path, help="where the lines go, instead of docs/data/proof/STUDY")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budgets", nargs="+", type=parse_count, help="calibration tokens, instead of the study's first two")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.02, 0.04, 0.08], help="CAT-Q's, for its factors")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=1, help="CAT-Q's, in each window (published: 60)")
    parser.add_argument("--low-rank", type=float, default=1.0, help="rate of its low-rank part over `rate` (published: 0.2)")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--huber", type=float, default=1.0, help="where CAT-Q's loss turns from square to linear")
    parser.add_argument("--no-restart", action="store_true", help="CAT-Q's layers soften in their first window only")
    parser.add_argument("--sequences", type=int, default=8, help="a batch")
    parser.add_argument("--eval-tokens", type=parse_count, help="held out, instead of the study's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.device = str(pick_device(arguments.device))
    study = STUDIES[arguments.study]
    if arguments.eval_tokens:
        study = replace(study, settings=study.settings | {"eval_tokens": arguments.eval_tokens})
    arguments.budgets = arguments.budgets or list(study.budgets[:2])
    folder = arguments.records or RECORDS / arguments.study
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(study, arguments)
    for trial in trials(arguments):
        with claim(arguments.out / "post_training" / folder.name / f"{trial.name}.lock") as mine:
            if not mine or trial in read_records(folder):
                continue
            row = bench.run(trial)
            with (folder / f"{trial.arm}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            gaps = [f"{row['nats'] - row['base_nats']:.4f} above the original"]
            gaps += [f"{name} {row[name]:.4f}" for name in ("report_gap", "other_gap") if name in row]
            print(f"{trial.name:<40} {', '.join(gaps)}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
