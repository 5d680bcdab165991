"""Tables and plots of docs/proof.md, docs/proof_studies.md and README's first table, from experiments/proof.py's records.

    python experiments/proof_report.py STUDY [--check]

Writes a study's tables between their markers in docs/proof_studies.md and the one of all models in docs/proof.md; for
stories260k also the one in README and three plots to docs/: nats above the original against tokens; against the budget, with
two laws fitted to it; λ and flips of codes by layer.
--check writes nothing and fails if a table is not the one the records give.

Gap means nats per token above the original, on text that nothing was trained or chosen on; ± is half the range over seeds.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from pages import with_table
from proof import RECORDS, SEEDS, STUDIES, Records, Study, Trial, best_rates, model_class, read_records
from proof_arms import ARMS, CONTROL

from trilobit.train.plots import ACCENT, INK, MUTED, SECOND
from trilobit.train.schedule import strength_schedule

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {
    "none-immediate-ce": "nothing: no norm, quantised at once",
    "none-layerwise-ce": "schedule alone",
    "every-immediate-ce": "norms (calibrated) alone",
    "every-layerwise-ce": "norms (calibrated) + schedule",
    "every-ones-layerwise-ce": "norms (ones) + schedule: the paper, as we read it",
    "every-ones-immediate-ce": "norms (ones), quantised at once: AutoBitLinear",
    "output-layerwise-ce": "norms at two places + schedule",
    "none-immediate-kl": "distillation alone",
    "none-layerwise-kl": "distillation + schedule",
    "every-immediate-kl": "distillation + norms",
    "every-layerwise-kl": "distillation + norms + schedule",
    "every-global-ce": "norms (calibrated) + all layers' λ at once",
    "every-global-kl": "distillation + norms + all layers' λ at once",
    "none-global-kl": "distillation + all layers' λ at once",
    "none-immediate-kl-row": "distillation alone, one scale a row",
    "every-global-kl-row": "distillation + norms + all layers' λ at once, one scale a row",
    "every-kl-muon": "distillation + norms + schedule, Muon",
    "every-kl-wsd": "distillation + norms + schedule, rate held for half the tokens",
    "warm-every-kl": "distillation + norms, layers reconstructed first",
    "recipe-hf-blog": "Hugging Face's recipe (no norm, all layers' λ at once over a fifth)",
    "none-global-ce": "all layers' λ at once alone",
    "output-global-kl": "distillation + norms at two places + all layers' λ at once",
    "every-global-kl-wsd": "distillation + norms + all layers' λ at once, rate held for half the tokens",
    "none-kl-wsd": "distillation alone, rate held for half the tokens",
    "recipe-tequila": "Tequila (weights only, group-128)",
    "recipe-paretoq": "ParetoQ's quantiser (weights only, row)",
    "recipe-weights-only": "schedule (weights only, group-128, embeddings and head ternary)",
    "recipe-weights-only-kl": "distillation + all layers' λ at once (weights only, group-128, embeddings and head ternary)",
    "none-group-128-weights-only-global-kl": "distillation + all layers' λ at once (weights only, group-128)",
    "none-group-128-weights-only-kl": "distillation + schedule (weights only, group-128)",
    "every-group-128-weights-only-kl": "distillation + norms + schedule (weights only, group-128)",
    "recipe-bitdistill": "BitDistill, published constants",
    "recipe-bitdistill-normalised": "BitDistill, losses of one size",
    CONTROL: "the original, tuned equally",
    "every-reverse-ce": "norms (calibrated) + schedule, last layer first",
    "every-reverse-kl": "distillation + norms + schedule, last layer first",
    "every-kl-sensitivity": "distillation + norms + schedule, longer for layers that cost more",
    "every-global-kl-soft": "all three, temperature 2",
    "every-global-mix": "all three, half of the loss cross-entropy",
    "every-global-kl-hidden": "all three, the original's hidden states as well",
    "every-global-kl-then-decay": "all three, a rate that falls when λ is one",
    "every-global-kl-short-ramp": "all three, λ over a tenth of the tokens",
    "every-global-kl-long-ramp": "all three, λ over half of the tokens",
    "every-global-kl-late-activations": "all three, λ of activations over half of the tokens",
    "every-global-kl-weight-decay": "all three, weight decay 0.1",
    "every-global-kl-muon": "all three, Muon",
    "every-global-kl-scalar": "all three, one gain a norm",
    "every-global-kl-group-128": "all three, one scale for 128 weights",
    "every-global-kl-group-64": "all three, one scale for 64 weights",
    "every-global-kl-weights-only": "all three, weights only",
    "every-global-kl-embeddings": "all three, embeddings and head ternary",
}
IN_README = {
    "every-global-kl": "**trilobit tune**: norms, λ rising in all layers at once, the original's logits",
    "none-immediate-kl": "the original's logits alone, quantised at once",
    "recipe-hf-blog": "Hugging Face's 1.58-bit recipe",
    "every-ones-layerwise-ce": "arXiv 2505.08823 as we read it: norms, layer-wise λ, cross-entropy",
    "every-ones-immediate-ce": "transformers' AutoBitLinear, from the first step",
}
"""Arms of README's first table. The first is what `tune` does without flags."""
IN_ANSWER = (
    "every-global-kl", "every-global-kl-row", "every-immediate-kl", "none-global-kl", "none-immediate-kl", "every-global-ce",
    "every-layerwise-ce", "every-ones-layerwise-ce", "recipe-hf-blog", "every-ones-immediate-ce", "none-immediate-ce", CONTROL,
)  # fmt: skip
"""Arms of the first page's table."""
OURS = "every-global-kl"
RIVALS = ("none-immediate-kl", "none-global-kl", "recipe-hf-blog", "every-ones-layerwise-ce", "every-ones-immediate-ce")
"""What `tune` does without flags, at the study's rate and lengths, and what the first page's targets compare it with."""
MODELS = {"stories260K": "stories260k", "code": "embedded", "SmolLM2": "smollm2-cpu"}
"""Its models, and their studies."""
AFTER_TRAINING = {
    "ptq-catq": "CAT-Q (weights only, group-128; every token passes a layer four times)",
    "ptq-gptq": "GPTQ, absmean (weights only, group-128)",
    "ptq-gptq-mse": "GPTQ, least square error (weights only, group-128)",
    "ptq-rtn": "round to nearest, absmean (weights only, group-128)",
    "ptq-rtn-mse": "round to nearest, least square error (weights only, group-128)",
}
"""Arms of experiments/post_training.py. Their budget is calibration tokens."""
SHOWN = {
    "none-immediate-ce": (MUTED, "nothing"), "none-immediate-kl": (SECOND, "distillation"),
    "every-layerwise-ce": ("#d69e2e", "norms + schedule"), "every-global-kl": (ACCENT, "all three"),
}  # fmt: skip
"""Arms of the plots: colour, label."""
FLIPS = "every-layerwise-ce"
SHORT = {"every-global-kl": "ours", "none-immediate-kl": "distillation"}
"""Arms that others are given equal time with."""
SAME_STEP = {"every-layerwise-ce": "every-ones-layerwise-ce"}
"""An arm whose steps are those of another, from another start."""


@dataclass(frozen=True)
class Cell:
    """An arm at a budget, at its best rate: gaps of the seeds that were run."""

    gaps: list[float]
    other: list[float]
    rate: float
    diverged: int

    def __str__(self) -> str:
        if not self.gaps:
            return "diverged" if self.diverged else ""
        half = (max(self.gaps) - min(self.gaps)) / 2
        return f"{np.mean(self.gaps):.3f}" + (f" ± {half:.3f}" if len(self.gaps) > 1 else "")


def cell(records: Records, study: Study, arm: str, budget: int) -> Cell:
    rates = best_rates(records, study, arm, budget)
    if not rates:
        return Cell([], [], 0.0, 0)
    rows = [records[t] for seed in SEEDS if (t := Trial(arm, budget, rates[0], seed)) in records]
    fine = [row for row in rows if not row["diverged"]]
    other = [row["other_gap"] for row in fine if "other_gap" in row]
    return Cell([row["report_gap"] for row in fine], other, rates[0], len(rows) - len(fine))


def highest_rate(records: Records, study: Study, arm: str) -> str:
    """The highest rate tried at the smallest budget whose loss stays below that of the best rate plus 0.5 nats."""
    rows = {rate: records.get(Trial(arm, study.budget, rate, 0)) for rate in study.rates_of(arm)}
    if None in rows.values():  # not all have run
        return ""
    best = min((row["nats"] for row in rows.values() if row and not row["diverged"]), default=float("inf"))
    fine = [rate for rate, row in rows.items() if row and not row["diverged"] and row["nats"] < best + 0.5]
    return f"{max(fine):.3g}" if fine else ""


def table(records: Records, study: Study) -> str:
    """Arms by their gap at the largest budget they reached."""
    known = {trial.arm for trial in records}
    arms = [arm for arm in [*ARMS, *AFTER_TRAINING] if arm in known]
    assert known == set(arms), known - set(arms)
    budgets = [budget for budget in study.budgets if any(trial.budget == budget for trial in records)]
    cells = {arm: [cell(records, study, arm, budget) for budget in budgets] for arm in arms}

    def order(arm: str) -> tuple[int, float]:
        reached = [c for c in cells[arm] if c.gaps]
        return -len(reached), float(np.mean(reached[-1].gaps)) if reached else 0.0

    heads = [
        "arm",
        *(f"{budget / 1e6:.2g} M" for budget in budgets),
        "other text",
        "rate",
        "highest rate",
        "spikes",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm in sorted(arms, key=order):
        last = next((c for c in reversed(cells[arm]) if c.gaps), None)
        bumps = sum(row["spikes"] for trial, row in records.items() if trial.arm == arm and trial.rate == (last and last.rate))
        name = NAMES.get(arm) or AFTER_TRAINING.get(arm) or _described(arm)
        other = f"{np.mean(last.other):.3f}" if last and last.other else ""
        rate = f"{last.rate:.3g}" if last else ""
        highest = highest_rate(records, study, arm) if arm in ARMS else ""
        row = [name, *map(str, cells[arm]), other, rate, highest, str(bumps)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) if arms else ""


def rates_table(records: Records, study: Study, digits: int = 2) -> str:
    """Arms at every rate of the smallest budget, by the gap at their best."""
    rates = sorted({trial.rate for trial in records if trial.budget == study.budget})
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|" + "---|" * (len(rates) + 1)]
    known: dict[str, list[dict[str, Any] | None]] = {}
    for arm in dict.fromkeys(trial.arm for trial in records if trial.budget == study.budget):
        known[arm] = [records.get(Trial(arm, study.budget, rate, 0)) for rate in rates]

    def gap(row: dict[str, Any] | None) -> float:
        return float("inf") if row is None or row["diverged"] else row["report_gap"]

    for arm, rows in sorted(known.items(), key=lambda item: min(map(gap, item[1]))):
        cells = ["" if row is None else "diverged" if row["diverged"] else f"{gap(row):.{digits}f}" for row in rows]
        lines.append("| " + " | ".join([NAMES.get(arm, f"`{arm}`"), *cells]) + " |")
    return "\n".join(lines)


def windows_table(records: Records, study: Study) -> str:
    """What windows an arm `…-windows-N` was trained on, and its gaps on windows of either length that is reported."""
    lengths = {study.report_length: "report_gap", study.other_length: f"report_{study.other_length}_gap"}
    budgets = sorted({trial.budget for trial in records})
    heads = [f"{budget / 1e6:.2g} M, on windows of {length}" for budget in budgets for length in lengths]
    lines = ["| trained on windows of | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for arm in sorted({trial.arm for trial in records}, key=_trained_length):
        rows = [records.get(Trial(arm, budget, study.rates[0], 0)) for budget in budgets]
        cells = [f"{row[key]:.3f}" if row else "" for row in rows for key in lengths.values()]
        lines.append(f"| {_trained_length(arm)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if records else ""


def _trained_length(arm: str) -> int:
    return int(arm.rpartition("-")[2])


def benchmarks_table(result: dict[str, Any]) -> str:
    """Scores of `trilobit eval --tasks five --original …`, as its JSON has them: those that the average is of."""
    lines = ["| task | original | ternary | guessing |", "|---|---|---|---|"]
    for row in result["tasks"]:
        if row["averaged"]:
            scores = [f"{row[f'{whose}score']:.3f} ± {row[f'{whose}stderr']:.3f}" for whose in ("original_", "")]
            lines.append(f"| {row['task']} | {' | '.join(scores)} | {row['chance']:.2f} |")
    chance = float(np.mean([row["chance"] for row in result["tasks"] if row["averaged"]]))
    error, original_error = (
        float(np.linalg.norm([row[f"{whose}stderr"] for row in result["tasks"] if row["averaged"]]))
        for whose in ("", "original_")
    )
    number, kept = sum(row["averaged"] for row in result["tasks"]), result["retention"]
    spread = float(np.hypot(error, kept * original_error)) / number / (result["original_average"] - chance)
    lines.append(f"| average | {result['original_average']:.3f} | {result['average']:.3f} | {chance:.2f} |")
    lines.append(f"| of what is above guessing | | {kept:.0%} ± {spread:.0%} | |")
    return "\n".join(lines)


def readme_table(records: Records, study: Study) -> str:
    """A few arms at the budgets that all of them reached."""
    cells = {arm: [cell(records, study, arm, budget) for budget in study.budgets] for arm in IN_README}
    reached = [i for i in range(len(study.budgets)) if all(row[i].gaps for row in cells.values())]
    heads = ["nats per token above the original", *(f"{study.budgets[i] / 1e6:.2g} M tokens" for i in reached)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([name, *(str(cells[arm][i]) for i in reached)]) + " |" for arm, name in IN_README.items()]
    return "\n".join(lines)


def overview(studies: dict[str, tuple[Records, Study]]) -> str:
    """The arms that matter, on every model: means at each budget, from left to right, in italics where there is one seed.
    studies: by the model's name."""
    heads = [f"{name}: {', '.join(f'{budget / 1e6:.2g}' for budget in s.budgets)} M" for name, (_, s) in studies.items()]
    lines = ["| " + " | ".join(["arm", *heads]) + " |", "|" + "---|" * (1 + len(heads))]
    for arm in IN_ANSWER:
        row = [NAMES[arm]]
        for records, study in studies.values():
            found = [cell(records, study, arm, budget) for budget in study.budgets]
            shown = [f"{np.mean(c.gaps):.3f}" if len(c.gaps) > 1 else f"*{c.gaps[0]:.3f}*" for c in found if c.gaps]
            row.append(", ".join(shown))  # budgets are run from the smallest on
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def ratios(studies: dict[str, tuple[Records, Study]]) -> str:
    """Our gap over each rival's, equal tokens: budgets that both reached, in italics where either has one seed."""
    lines = ["| " + " | ".join(["our gap over that of", *studies]) + " |", "|" + "---|" * (1 + len(studies))]
    for rival in RIVALS:
        row = [NAMES[rival]]
        for records, study in studies.values():
            shown: list[str] = []
            for budget in study.budgets:
                ours, theirs = (cell(records, study, arm, budget).gaps for arm in (OURS, rival))
                if ours and theirs:
                    ratio = f"{np.mean(ours) / np.mean(theirs):.2f}"
                    shown.append(ratio if min(len(ours), len(theirs)) > 1 else f"*{ratio}*")
            row.append(", ".join(shown))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def equal_time(records: Records, study: Study, rates: dict[str, list[float]], ours: str) -> str:
    """What `ours` reaches in the time that another arm takes for the largest budget that it has been given.

    rates: tokens per second, round by round (proof_steps.py). Between two budgets a gap is interpolated in the logarithms.
    """
    gaps = [float(np.mean(cell(records, study, ours, budget).gaps)) for budget in study.budgets]
    heads = ["", "tokens/s", "tokens", "gap", f"tokens of {SHORT[ours]}", f"gap of {SHORT[ours]}", "ratio"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, measured in [*rates.items(), *((arm, rates[like]) for arm, like in SAME_STEP.items() if like in rates)]:
        reached = {budget: found for budget in study.budgets if (found := cell(records, study, arm, budget).gaps)}
        if not reached:
            continue
        largest = max(reached)
        tokens = largest * float(np.median(rates[ours])) / float(np.median(measured))
        log_gap = np.interp(np.log(tokens), np.log(study.budgets), np.log(gaps))
        theirs, own = float(np.mean(reached[largest])), float(np.exp(log_gap))
        row = [
            NAMES[arm],
            f"{np.median(measured):,.0f}",
            f"{largest / 1e6:.1f} M",
            f"{theirs:.3f}",
            f"{tokens / 1e6:.2f} M",
            f"{own:.3f}",
            f"{own / theirs:.2f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _described(arm: str) -> str:
    scale, activations, cover = model_class(arm)
    parts = [scale] * (scale != "tensor") + ["weights only"] * (activations == "none") + [cover] * (cover != "projections")
    return f"`{arm}`" + (f" ({', '.join(parts)})" if parts else "")


def power_law(budgets: list[float], gaps: list[float]) -> tuple[float, float]:
    """a, b of gap = a · tokens^−b, by least squares of the logarithms."""
    slope, intercept = np.polyfit(np.log(budgets), np.log(gaps), 1)
    return float(np.exp(intercept)), float(-slope)


def floor_law(budgets: list[float], gaps: list[float]) -> tuple[float, float, float] | None:
    """c, a, b of gap = c + a · tokens^−b through three budgets a constant factor apart; None where they do not flatten."""
    (first, second, third), factor = gaps, budgets[1] / budgets[0]
    assert np.isclose(budgets[2] / budgets[1], factor), budgets
    ratio = (second - third) / (first - second)
    if not 0 < ratio < 1:
        return None
    b = -np.log(ratio) / np.log(factor)
    c = third - (second - third) * ratio / (1 - ratio)
    return float(c), float((first - c) * budgets[0] ** b), float(b)


def plot_budgets(records: Records, study: Study, axes: Axes) -> dict[str, dict[str, float]]:
    """Gap against budget, extended to 1 B tokens by a power law (dotted) and, where three budgets flatten, by one with a floor
    (dashed). Returns what each arm's laws say."""
    said: dict[str, dict[str, float]] = {}
    for arm, (color, label) in SHOWN.items():
        found = [(b, c) for b in study.budgets if (c := cell(records, study, arm, b)).gaps]
        if len(found) < 2:
            continue
        budgets, means = [float(b) for b, _ in found], [float(np.mean(c.gaps)) for _, c in found]
        a, b = power_law(budgets, means)
        reach = np.geomspace(budgets[0], 1e9, 50)
        axes.plot(reach, a * reach**-b, color=color, linestyle=":", linewidth=1.2)
        laws = {"exponent": b, "100 M": a * 1e8**-b, "1 B": a * 1e9**-b}
        if len(means) == 3 and (law := floor_law(budgets, means)):
            floor, scale, power = law
            axes.plot(reach, floor + scale * reach**-power, color=color, linestyle="--", linewidth=1.2)
            laws |= {"floor": floor, "100 M, floor": floor + scale * 1e8**-power, "1 B, floor": floor + scale * 1e9**-power}
        for budget, c in found:
            axes.plot([budget] * len(c.gaps), c.gaps, color=color, marker="o", markersize=4, linestyle="none")
        ends = [f"{laws[at]:.2f} to {laws.get(f'{at}, floor', laws[at]):.2f} at {at}" for at in ("100 M", "1 B")]
        axes.plot([], [], color=color, marker="o", markersize=4, label=f"{label}: {', '.join(ends)}")
        said[arm] = {name: round(value, 4) for name, value in laws.items()}
    axes.set(xscale="log", yscale="log", xlabel="tokens trained on", ylabel="nats above the original")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7]))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    if said:
        axes.legend(frameon=False, fontsize=8)
    return said


def plot_curves(records: Records, study: Study, axes: Axes) -> None:
    """Held-out nats above the original while training, at the largest budget, seed 0."""
    for arm, (color, label) in SHOWN.items():
        rates = best_rates(records, study, arm, study.budgets[-1])
        row = records.get(Trial(arm, study.budgets[-1], rates[0], 0)) if rates else None
        if row and not row["diverged"]:
            tokens, nats = zip(*row["curve"], strict=True)
            axes.plot(tokens, [value - row["base_nats"] for value in nats], color=color, linewidth=1.6, label=label)
    axes.set(xlabel="tokens", ylabel="nats above the original, held out", ylim=(0, None))
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def plot_flips(records: Records, study: Study, figure: Figure) -> None:
    """λ and flips of each layer: norms and layer-wise schedule, at the largest budget, seed 0."""
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
    budget = study.budgets[-1]
    rates = best_rates(records, study, FLIPS, budget)
    flips: list[Any] = records.get(Trial(FLIPS, budget, rates[0], 0), {}).get("flips", []) if rates else []
    if not flips:
        return
    layers = len(flips[0][1])
    schedule = strength_schedule("layerwise", layers, budget, 0.25, 0.5)
    ticks = sorted({0.0, float(budget), *schedule.starts, *(schedule.ends or ())})
    for layer in range(layers):
        light = (layers - 1 - layer) / max(layers - 1, 1)
        color = (0.77 + 0.18 * light, 0.28 + 0.42 * light, 0.17 + 0.5 * light)
        top.plot(ticks, [schedule.at(tick)[layer] for tick in ticks], color=color)
        bottom.plot([t for t, _ in flips], [100 * row[layer] for _, row in flips], color=color)
    top.set(ylabel="λ")
    bottom.set(xlabel="tokens", ylabel="% of codes changed by one step", ylim=(0, None))
    top.set_title(f"{layers} layers, first (light) to last (dark)", fontsize=9, color=INK, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    study, records = STUDIES[arguments.study], read_records(RECORDS / arguments.study)
    studies = DOCS / "proof_studies.md"
    digits = 3 if arguments.study == "stories260k-around" else 2
    shown = windows_table if study.other_length else table
    lines = rates_table(records, study, digits) if study.one_rung else shown(records, study)
    tables = [(studies, arguments.study, lines)]
    if arguments.study == "smollm2-cpu":
        tables.append((studies, "smollm2-cpu-rates", rates_table(records, study)))
        tables.append((studies, "smollm2-five", benchmarks_table(json.loads((RECORDS / "smollm2-five.json").read_text()))))
    if (steps := RECORDS / f"{arguments.study}-steps.json").exists():
        for ours, name in SHORT.items():
            times = equal_time(records, study, json.loads(steps.read_text()), ours)
            tables.append((studies, f"{arguments.study}-time-with-{name}", times))
    if arguments.study in MODELS.values():
        everywhere = {name: (read_records(RECORDS / known), STUDIES[known]) for name, known in MODELS.items()}
        tables.append((DOCS / "proof.md", "answer", overview(everywhere)))
        tables.append((DOCS / "proof.md", "ratios", ratios(everywhere)))
    if arguments.study == "stories260k":
        tables.append((DOCS.parent / "README.md", "proof", readme_table(records, study)))
    for path, marker, shown in tables:
        page = path.read_text(encoding="utf-8")
        new = with_table(page, marker, shown)
        if arguments.check and new != page:
            raise SystemExit(f"{path.name} does not show the records of {arguments.study}")
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
    if arguments.check or arguments.study != "stories260k":
        return
    for name, draw in (("curves", plot_curves), ("budgets", plot_budgets)):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        print(name, json.dumps(draw(records, study, axes)))
        figure.savefig(DOCS / f"proof_{name}.png", dpi=120)
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    plot_flips(records, study, figure)
    figure.savefig(DOCS / "proof_flips.png", dpi=120)


if __name__ == "__main__":
    main()
