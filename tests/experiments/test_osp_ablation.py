"""The runner of the outlier-safe ablation: its rows, what is left to do, and its table."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import osp_ablation
import pytest
from osp_ablation import ROWS, STUDIES, Study, best, rates_table, read_records, run_trial, table

from trilobit.config.pretrain import PretrainConfig
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
    shown = table(records).splitlines()
    assert len(shown) == 4 and shown[2].startswith("| Adam |") and shown[3].startswith("| all: outlier-safe |")


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


def test_older_four_bit_numbers_are_marked() -> None:
    """A record that names no window is shown apart from those that do."""
    old = {"row": "adam", "rate": 1.0, "diverged": False, "tokens_per_second": 1.0} | dict.fromkeys(
        ("nats_per_token", "w16a16kv16", "w4a4kv4", "w4a4kv4_hadamard", "kurtosis", "kurtosis_osp", "kurtosis_mlp_output"), 3.0
    )
    new = old | {"row": "osp", "window": 256}
    shown = table({("adam", 1.0): old, ("osp", 1.0): new}).splitlines()
    assert shown[2].count("†") == 1 and "†" not in shown[3] and shown[-1].startswith("†")
