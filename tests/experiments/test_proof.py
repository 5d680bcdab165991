"""The runner of the proof study: which trials are wanted, and what the page shows of those that are done."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import proof
import proof_report
import pytest
import torch
from proof import (
    STUDIES,
    Records,
    Study,
    Trial,
    best_rates,
    claim,
    model_class,
    other_seeds,
    read_records,
    spikes,
    spread,
    wanted,
)
from proof_arms import ALWAYS, ARMS, CONTROL
from proof_report import (
    IN_ANSWER,
    IN_README,
    NAMES,
    OURS,
    RIVALS,
    SHOWN,
    equal_time,
    floor_law,
    overview,
    power_law,
    ratios,
    readme_table,
    table,
    windows_table,
)

import forked
from trilobit.config.tune import TuneConfig

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src" / "trilobit" / "assets" / "model"
STUDY = STUDIES["stories260k"]


def done(trials: list[Trial], nats: dict[str, float] | None = None) -> Records:
    """Records in which an arm's loss is its place in ARMS (or what `nats` says), best at the second rate."""
    order = nats or {arm: 2 + 0.01 * index for index, arm in enumerate(ARMS)}
    return {
        trial: {
            "diverged": False, "nats": order[trial.arm] + abs(trial.rate - STUDY.rates_of(trial.arm)[1]), "base_nats": 1.0,
            "spikes": 0,
            "report_gap": order[trial.arm] - 1, "other_gap": 0.5, "tokens_per_second": 1000.0, "curve": [],
        }
        for trial in trials
    }  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_arms_are_settings_of_tune(arm: str) -> None:
    """Every arm is a configuration that tune accepts, and what the study sets for all arms does not undo it."""
    for study in STUDIES.values():
        settings = {**study.settings, **ARMS[arm]}
        settings.pop("self_tokens", None)
        config = TuneConfig(**{"model": "m", "data": "d", **settings, "max_tokens": study.budget})
        assert all(getattr(config, name) == value for name, value in ARMS[arm].items())


def test_a_trial_is_tuned_measured_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short trial leaves a line with what it gave on both texts, on windows of both lengths; its directory is gone."""
    for name, words in (("train", "reads a line"), ("report", "writes a line"), ("other", "It was a dark night")):
        lines = [json.dumps({"text": f"{words} and {n} more, {n * 7919 % 1000} in all."}) for n in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(proof, "RECORDS", tmp_path / "records")
    study = Study(
        512, (1e-3,), {"batch_tokens": 128, "compile": "no", "eval_tokens": 128, "sequence_length": 32, "sequences": 4},
        report_tokens=128, report_length=32, other_length=64,
    )  # fmt: skip
    arguments = Namespace(
        model=str(MODEL), data=str(tmp_path / "train.jsonl"), report=str(tmp_path / "report.jsonl"), keep=False, study="tiny",
        other=str(tmp_path / "other.jsonl"), device="cpu", out=tmp_path / "out",
    )  # fmt: skip
    trial = Trial("every-global-kl", 512, 1e-3, 0)
    proof.run_trial(trial, study, arguments, proof.reporter(arguments, study))
    records = read_records(tmp_path / "records" / "tiny")
    assert set(records) == {trial}
    row = records[trial]
    gaps = {key: value for key, value in row.items() if key.endswith("_gap")}
    assert set(gaps) == {"report_gap", "other_gap", "report_64_gap", "other_64_gap"}
    assert len(set(gaps.values())) == 4 and all(0 < value < 20 for value in gaps.values())
    assert row["tokens"] == 512 and not row["diverged"] and len(row["curve"]) == 4
    assert not (tmp_path / "out" / "tiny" / trial.name).exists()


def test_a_text_is_reported_on_from_beginning_to_end() -> None:
    """Windows lie in the middle of as many equal stretches; all of them where there are no more."""
    windows = torch.arange(100)[:, None].expand(100, 3)
    assert spread(windows, 4)[:, 0].tolist() == [12, 37, 62, 87]
    assert torch.equal(spread(windows, 100), windows) and torch.equal(spread(windows, 1000), windows)


def test_rungs_follow_from_what_is_done() -> None:
    """All arms at all rates; then at their two best; then references and the best third of each class with three seeds; then
    the same arms at the smaller budgets. Nothing is wanted of a later rung before the one under it is done."""
    arms = list(ARMS)
    small, middle, large = STUDY.budgets
    (first,) = wanted({}, STUDY, arms)
    assert first == [Trial(arm, small, rate, 0) for arm in arms for rate in STUDY.rates_of(arm)]
    assert max(STUDY.rates_of(CONTROL)) < min(STUDY.rates) and len(STUDY.rates_of(CONTROL)) == len(STUDY.rates)
    records = done(first)
    del records[first[-1]]
    assert wanted(records, STUDY, arms) == [first]
    records = done(first)
    second = wanted(records, STUDY, arms)[1]
    assert {(t.budget, t.seed) for t in second} == {(middle, 0)} and len(second) == 2 * len(arms)
    assert all(STUDY.rates_of(arm)[1] in [t.rate for t in second if t.arm == arm] for arm in arms)
    records |= done(second)
    ahead = other_seeds(records, STUDY, arms[1:3])
    assert {(t.arm, t.budget, t.rate) for t in ahead} == {(arm, small, STUDY.rates_of(arm)[1]) for arm in arms[1:3]}
    assert sorted(t.seed for t in ahead) == [1, 1, 2, 2] and other_seeds({}, STUDY, arms) == []
    third = wanted(records, STUDY, arms)[2]
    finalists = list(dict.fromkeys(t.arm for t in third))
    assert set(ALWAYS) <= set(finalists) and len(finalists) < len(arms)
    assert {model_class(arm) for arm in finalists} == {model_class(arm) for arm in arms}, "no class is left out"
    assert {(t.budget, t.rate) for t in third} == {(large, STUDY.rates_of(t.arm)[1]) for t in third}
    assert all(sorted(t.seed for t in third if t.arm == arm) == [0, 1, 2] for arm in finalists)
    records |= done(third)
    fourth = wanted(records, STUDY, arms)[3]
    assert {t.arm for t in fourth} == set(finalists) and {t.budget for t in fourth} == {small, middle}
    assert wanted(records | done(fourth), STUDY, arms)[3] == fourth


def test_a_study_may_be_content_with_less() -> None:
    """One rate of each arm at the second budget, one seed at the third, and then nothing more."""
    study, arms = replace(STUDY, rates_kept=1, seeds=(0,)), list(ALWAYS)
    records = done(wanted({}, study, arms)[0])
    second = wanted(records, study, arms)[1]
    assert second == [Trial(arm, study.budgets[1], study.rates_of(arm)[1], 0) for arm in arms]
    records |= done(second)
    third = wanted(records, study, arms)[2]
    assert [(t.arm, t.seed) for t in third] == [(arm, 0) for arm in arms]
    assert wanted(records | done(third), study, arms)[-1] == third


def test_a_rate_that_diverges_is_not_the_best() -> None:
    """It is known, and last."""
    arm = ALWAYS[1]
    records = done([Trial(arm, STUDY.budget, rate, 0) for rate in STUDY.rates])
    records[Trial(arm, STUDY.budget, STUDY.rates[1], 0)] = {"diverged": True}
    assert best_rates(records, STUDY, arm, STUDY.budget)[0] == STUDY.rates[0]
    assert best_rates(records, STUDY, arm, STUDY.budget)[-1] == STUDY.rates[1]


def test_a_trial_has_one_owner(tmp_path: Path) -> None:
    """While one process holds a claim another does not get it; when it ends, however it ends, the claim is free."""
    path = tmp_path / "a" / "trial.lock"
    for ends in (lambda process, told: told.send("end"), lambda process, told: process.kill()):
        told, heard = Pipe()
        process = forked.server().Process(target=forked.hold, args=(claim, path, heard), daemon=True)
        process.start()
        assert told.poll(60) and told.recv() is True
        with claim(path) as mine:
            assert not mine
        ends(process, told)
        process.join(60)
        with claim(path) as mine:
            assert mine


def test_spikes_are_counted_against_the_median_before_them() -> None:
    """A step half a nat above the median of the twenty before it is one; a slow rise is none."""
    calm = [3.0 - 0.01 * i for i in range(60)]
    assert spikes(calm) == spikes([0.02 * i for i in range(60)]) == 0
    assert spikes([*calm[:30], 3.5, *calm[31:]]) == 1


def test_a_law_with_a_floor_is_found_again() -> None:
    """floor_law returns floor, scale and exponent of exact data, and nothing where the gap falls faster and faster."""
    budgets = [1e5, 4e5, 1.6e6]
    assert floor_law(budgets, [0.2 + 30 * n**-0.4 for n in budgets]) == pytest.approx((0.2, 30, 0.4))
    assert floor_law(budgets, [0.5, 0.4, 0.2]) is None


def test_equal_time_gives_a_faster_arm_its_time() -> None:
    """Ours gets the tokens that it can see while the other sees the largest budget, its gap between budgets interpolated in
    the logarithms: at half the speed, half the tokens."""
    ours, other = "every-global-kl", "recipe-hf-blog"
    rows = {b: {"report_gap": 100 * b**-0.5, "diverged": False, "nats": 1.0} for b in STUDY.budgets}
    records = {Trial(ours, b, STUDY.rates[0], 0): row for b, row in rows.items()}
    records[Trial(other, STUDY.budgets[-1], STUDY.rates[0], 0)] = {"report_gap": 0.5, "diverged": False, "nats": 1.0}
    lines = equal_time(records, STUDY, {ours: [10.0, 10.0, 30.0], other: [20.0]}, ours).splitlines()
    assert len(lines) == 4
    half = 100 * (STUDY.budgets[-1] / 2) ** -0.5
    assert f"| {STUDY.budgets[-1] / 2e6:.2f} M | {half:.3f} | {half / 0.5:.2f} |" in lines[3]


def test_a_power_law_is_found_again() -> None:
    """From three exact points."""
    assert power_law([1e5, 4e5, 1.6e6], [3 * n**-0.2 for n in (1e5, 4e5, 1.6e6)]) == pytest.approx((3, 0.2))


def test_the_page_names_arms_that_exist() -> None:
    """Names and colours are for arms of the study, and every arm with a record has a row."""
    assert set(NAMES) <= set(ARMS) and set(SHOWN) <= set(NAMES)
    arms = list(ARMS)[:7]
    rows = table(done([Trial(arm, STUDY.budget, rate, 0) for arm in arms for rate in STUDY.rates]), STUDY).splitlines()
    assert len(rows) == 2 + len(arms)
    assert len({row.count("|") for row in rows}) == 1, "as many cells as columns"


def test_the_readme_shows_the_defaults() -> None:
    """The first arm of README's table is what `tune` does without flags; only budgets that all its arms reached are shown."""
    assert set(IN_README) <= set(ARMS)
    ours = TuneConfig(model="m", data="d", **ARMS[next(iter(IN_README))])
    default = TuneConfig(model="m", data="d")
    assert ours.learns_from_original == default.learns_from_original
    for name in (
        "placement",
        "gain",
        "gain_init",
        "activations",
        "scale",
        "cover",
        "schedule",
        "ramp_fraction",
        "optimizer",
        "decay",
    ):
        assert getattr(ours, name) == getattr(default, name), name
    small, middle, _ = STUDY.budgets
    trials = [Trial(arm, small, STUDY.rates[1], 0) for arm in IN_README]
    trials += [Trial(arm, middle, STUDY.rates[1], 0) for arm in list(IN_README)[:-1]]
    lines = readme_table(done(trials), STUDY).splitlines()
    assert len(lines) == 2 + len(IN_README) and lines[0].count("|") == 3


def test_the_overview_has_a_column_a_model() -> None:
    """Means of the budgets that were run, from the smallest on, one seed in italics, and a row for every arm."""
    arm = IN_ANSWER[1]
    trials = [Trial(arm, budget, STUDY.rates[1], 0) for budget in STUDY.budgets[:2]]
    records = done([*trials, replace(trials[0], seed=1)])
    lines = overview({"one": (records, STUDY), "two": ({}, STUDY)}).splitlines()
    gap = f"{records[Trial(arm, STUDY.budget, STUDY.rates[1], 0)]['report_gap']:.3f}"
    assert lines[0] == "| arm | one: 0.26, 1, 4.2 M | two: 0.26, 1, 4.2 M |"
    assert lines[3] == f"| {NAMES[arm]} | {gap}, *{gap}* |  |" and len(lines) == 2 + len(IN_ANSWER)


def test_windows_are_shown_by_their_length() -> None:
    """From short to long, each budget on both lengths; an empty cell has not run."""
    study = STUDIES["stories260k-windows"]
    trials = [Trial(f"every-global-kl-windows-{n}", study.budgets[b], 5e-3, 0) for n, b in ((128, 0), (64, 0), (64, 1))]
    records: Records = {
        trial: {"report_gap": 1 + i, "report_128_gap": 0.5, "diverged": False} for i, trial in enumerate(trials)
    }
    assert windows_table(records, study).splitlines()[2:] == [
        "| 64 | 2.000 | 0.500 | 3.000 | 0.500 |", "| 128 | 1.000 | 0.500 |  |  |",
    ]  # fmt: skip


def test_ratios_are_of_budgets_that_both_reached() -> None:
    """Ours over a rival's, in italics where either has one seed; nothing where one has not run."""
    rival, (small, middle, _), rate = RIVALS[0], STUDY.budgets, STUDY.rates[1]
    trials = [Trial(arm, small, rate, seed) for arm in (OURS, rival) for seed in (0, 1)] + [Trial(rival, middle, rate, 0)]
    records = done(trials)
    for trial in records:
        records[trial]["report_gap"] = 0.25 if trial.arm == OURS else 0.5
    assert ratios({"one": (records, STUDY)}).splitlines()[2] == f"| {NAMES[rival]} | 0.50 |"
    records |= done([Trial(OURS, middle, rate, 0)])
    records[Trial(OURS, middle, rate, 0)]["report_gap"] = 0.1
    lines = ratios({"one": (records, STUDY), "two": ({}, STUDY)}).splitlines()
    assert lines[2:4] == [f"| {NAMES[rival]} | 0.50, *0.20* |  |", f"| {NAMES[RIVALS[1]]} |  |  |"]


STUDIES_SHOWN = [
    "stories260k-around", "stories260k-rates", "stories260k-cut", "stories260k-default", "stories260k-batches",
    "stories260k-windows", "stories260k-long", "embedded", "embedded-twin", "smollm2-cpu", "smollm2-windows", "smollm2",
]  # fmt: skip


@pytest.mark.parametrize("study", STUDIES_SHOWN)
def test_the_page_shows_the_records(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/proof.md and docs/proof_studies.md have the tables that experiments/proof_report.py makes of docs/data/proof."""
    monkeypatch.setattr(sys, "argv", ["proof_report.py", study, "--check"])
    proof_report.main()


def test_the_page_shows_the_records_of_the_first_study() -> None:
    """The same, by the command."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "experiments" / "proof_report.py"), "stories260k", "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
