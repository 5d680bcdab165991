"""run.json: what is asked of the system when it is written."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trilobit.config.pretrain import PretrainConfig
from trilobit.config.tune import TuneConfig
from trilobit.tensors import weights_fingerprint
from trilobit.train import record


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 5)])
def test_a_git_that_does_not_answer_is_no_revision(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without git, or with one that hangs, the revision is None and the run goes on (old code: a traceback after 5 s)."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert record._git_revision() is None


def test_a_fingerprint_is_of_the_bits_alone() -> None:
    """Two swapped weights, a cast or another name change it; the number of threads, by which float sums differ, does not."""
    torch.manual_seed(0)
    model, threads = nn.Sequential(nn.Linear(1000, 1001), nn.Embedding(1, 0)), torch.get_num_threads()
    before = weights_fingerprint(model)
    try:
        torch.set_num_threads(threads + 1)
        assert weights_fingerprint(model) == before
    finally:
        torch.set_num_threads(threads)
    assert weights_fingerprint(nn.Sequential(model)) != before
    weight = model[0].weight.data
    weight[0, :2] = weight[0, :2].flip(0)
    swapped = weights_fingerprint(model)
    assert len({before, swapped, weights_fingerprint(model.bfloat16())}) == 3


def test_where_a_base_lies_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from where the run begins (old code: not at all, and a card took checkpoints/base for a repository)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "base").mkdir(parents=True)
    places = [record.base_place(model) for model in ("checkpoints/base", "./x", "some/one", "gpt2", None)]
    assert places == ["directory", "directory", "hub", "hub", None]


def test_every_run_records_where_its_base_lies(tmp_path: Path) -> None:
    """One that begins at random has none."""
    tokens: Any = SimpleNamespace(description="", key="", sha256="")
    for config, place in (
        (TuneConfig(model=str(tmp_path), data="x"), "directory"),
        (PretrainConfig(architecture="llama-3m", data="x"), None),
    ):
        assert record.new_record("a command", config, tokens, "", False)["base_place"] == place
