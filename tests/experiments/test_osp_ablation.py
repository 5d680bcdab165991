"""The runner of the outlier-safe ablation: its rows, what is left to do, and its table."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import osp_ablation
import pytest
from osp_ablation import ROWS, STUDIES, Study, best, parts_table, rates_table, read_records, run_trial, seeds_table, table

from trilobit.config.pretrain import PretrainConfig
from trilobit.corpus import documents
from trilobit.infer.load import load
from trilobit.measure.perplexity import text_windows
from trilobit.recipes import RECIPES


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("row", ROWS)
def test_rows_are_settings_of_pretrain(study: str, row: str) -> None:
    """Each row of each study is a configuration that pretrain accepts."""
    settings: dict[str, Any] = {**STUDIES[study].settings, **RECIPES["pretrain"][row](), "max_tokens": STUDIES[study].tokens}
    assert PretrainConfig(data="d", **settings).steps > 100


def test_a_trial_is_trained_measured_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short trial of two rows leaves a line each with every number the table shows, and the table shows them."""
    sentences = [f"The {a} cat sees the {b} dog, and {a} birds see {b} cats." for a in range(40) for b in range(30)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": sentence}) for sentence in sentences))
    monkeypatch.setattr(osp_ablation, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(osp_ablation, "REPORT_TOKENS", 1024)
    study = Study(
        1024, (1e-3,),
        {"architecture": "llama-3m", "train_tokenizer": 300, "sequence_length": 32, "sequences": 4, "batch_tokens": 256},
    )  # fmt: skip
    arguments = Namespace(out=tmp_path / "out", study="tiny", data=str(text), report=str(text), device="cpu")
    for row in ("adam", "osp"):
        run_trial(row, 1e-3, study, arguments)
    records = read_records(tmp_path / "records" / "tiny")
    assert set(records) == {("adam", 1e-3), ("osp", 1e-3)}
    for record in records.values():
        assert record["w4a4kv4"] > record["w16a16kv16"] > 0 and record["curve"]
        assert len(set(record["protocols"].values())) == 3
        assert {"kurtosis", "kurtosis_osp", "kurtosis_mlp_output", "w4a4kv4_hadamard"} <= record.keys()
        assert all(record["w16a16kv16"] < cost < record["w4a4kv4"] for cost in record["parts"].values())
    shown = table(records).splitlines()
    assert len(shown) == 4 and shown[2].startswith("| Adam |") and shown[3].startswith("| all: outlier-safe |")
    assert [line.split(" | ")[0] for line in parts_table(records).splitlines()[2:]] == ["| Adam", "| all: outlier-safe"]


def test_kurtosis_and_loss_are_of_the_same_held_out_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a report: windows from beginning to end of what was held out, and of nothing that was trained on."""
    numbers = [f"Document {number} has words of its own, {number * 7919 % 1000} of them." for number in range(300)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": number}) for number in numbers))
    run = tmp_path / "run"
    osp_ablation.pretrain.run(
        PretrainConfig(
            data=str(text),
            out=str(run),
            architecture="llama-3m",
            train_tokenizer=300,
            sequence_length=16,
            sequences=2,
            batch_tokens=32,
            max_tokens=64,
            eval_tokens=64,
            device="cpu",
            cache_dir=str(tmp_path / "tokens"),
        ),
        osp_ablation.Quiet(),
    )
    seen: dict[str, list[Any]] = {}

    def spy(name: str, position: int) -> None:
        original = getattr(osp_ablation, name)

        def called(*arguments: Any, **settings: Any) -> Any:
            seen.setdefault(name, []).append(arguments[position])
            return original(*arguments, **settings)

        monkeypatch.setattr(osp_ablation, name, called)

    for name, position in {"nats": 1, "measure_contextual": 1, "measure_osp": 1}.items():
        spy(name, position)
    monkeypatch.setattr(osp_ablation, "REPORT_TOKENS", 64)
    monkeypatch.setattr(osp_ablation, "LENGTH", 16)
    osp_ablation.measured(run, Namespace(device="cpu", data=str(text), report=None))
    first, *others = (windows.tolist() for windows in seen["nats"])
    assert len(others) == 5 and all(other == first for other in others)
    for name in ("measure_contextual", "measure_osp"):
        (read,) = seen[name]
        assert read.tolist() == [window[:-1] for window in first]
    held = (document.text for document in documents(str(text), split="heldout"))
    every = text_windows(held, load(run).tokenizer, 17, False)[0].tolist()
    assert len(first) == 4 < len(every) and (first[0], first[-1]) == (every[0], every[-1])
    assert all(window in every for window in first)


def test_the_best_rate_decides() -> None:
    """A row stands at the rate with the least held-out loss; one that diverged is none."""
    records: dict[Any, dict[str, Any]] = {
        ("adam", 1.0): {"diverged": False, "nats_per_token": 3.0}, ("adam", 2.0): {"diverged": False, "nats_per_token": 2.5},
        ("adam", 3.0): {"diverged": True}, ("osp", 1.0): {"diverged": True},
    }  # fmt: skip
    assert best(records, "adam") is records["adam", 2.0]
    assert best(records, "osp") is None
    for record in records.values():
        record["kurtosis"] = 1.5
    assert rates_table(records).splitlines()[2:] == [
        "| Adam | 3.000, 1.50 | **2.500**, 1.50 | diverged |", "| all: outlier-safe | diverged |  |  |",
    ]  # fmt: skip


def test_seeds_stand_side_by_side() -> None:
    """Rows and rates that another seed has as well, in the seeds' order; what diverged or has run once is left out."""

    def record(loss: float, lost: float, diverged: bool = False) -> dict[str, Any]:
        numbers = {"nats_per_token": loss, "kurtosis": 10 * lost, "w16a16kv16": loss}
        return numbers | {"w4a4kv4": loss + lost, "w4a4kv4_hadamard": loss + lost / 2, "diverged": diverged}

    first = {("osp", 1.0): record(3, 0.1), ("muon", 1.0): record(3, 0.2), ("adam", 1.0): record(4, 0.1)}
    other = {("osp", 1.0): record(3.5, 0.3), ("muon", 1.0): record(3, 0.2, True), ("embproj", 1.0): record(3, 0.1)}
    assert seeds_table([first, other]).splitlines()[2:] == [
        "| all: outlier-safe | 1 | 3.000, 3.500 | 1.00, 3.00 | +0.100, +0.300 | +0.050, +0.150 |"
    ]


def test_older_four_bit_numbers_are_marked() -> None:
    """A record that names no window is shown apart from those that do."""
    old = {"row": "adam", "rate": 1.0, "diverged": False, "tokens_per_second": 1.0} | dict.fromkeys(
        ("nats_per_token", "w16a16kv16", "w4a4kv4", "w4a4kv4_hadamard", "kurtosis", "kurtosis_osp", "kurtosis_mlp_output"), 3.0
    )
    new = old | {"row": "osp", "window": 256}
    shown = table({("adam", 1.0): old, ("osp", 1.0): new}).splitlines()
    assert shown[2].count("†") == 1 and "†" not in shown[3] and shown[-1].startswith("†")
