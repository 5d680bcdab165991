"""`trilobit outliers` as a whole: ternary runs, results, summaries, settings."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.checkpoints import byte_model, byte_tokenizer, save
from trilobit.config.outliers import OutliersConfig
from trilobit.errors import ConfigError, ModelError
from trilobit.export.hf import write_latent, write_model
from trilobit.infer.load import load
from trilobit.measure.contextual import Contextual, SiteOutliers, measure_contextual
from trilobit.measure.kurtosis import measure_osp
from trilobit.measure.outliers import OutliersResult, measure, verdict
from trilobit.measure.probes import SiteName
from trilobit.surgery.ternary import TernarySpec, ternarize

pytestmark = pytest.mark.filterwarnings(  # torch's own imports, on the way to transformers' bitnet classes
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
TEXT = "Ein naïver Satz, ✓ geprüft 😀, und noch einer.\n" * 20
INSIDE: tuple[SiteName, ...] = ("attention-input", "attention-output", "mlp-input", "mlp-output", "residual")


def at(result: Contextual, layer: int | None, site: SiteName) -> SiteOutliers:
    row = result.at(layer, site)
    assert row is not None, (layer, site)
    return row


@pytest.mark.parametrize("form", ["latent", "auto", "packed"])
@pytest.mark.parametrize("cover", ["projections", "+embeddings"])
def test_ternary_runs_are_measured(tmp_path: Path, form: str, cover: Any) -> None:
    """A run directory, in any form, has the sites of its original, read by ternary linears, by both protocols."""
    model, tokenizer = byte_model(), byte_tokenizer()
    plan = ternarize(model, TernarySpec(cover=cover)).plan
    if form == "latent":
        write_latent(model, plan, tokenizer, tmp_path / "run" / "latent")
    else:
        probe = torch.randint(3, 250, (64, 33))
        write_model(model, plan, tokenizer, tmp_path / "run" / "model", probe, form, "fp32")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"result": {}}))
    (tmp_path / "text.txt").write_text(TEXT)
    config = OutliersConfig(
        model=str(tmp_path / "run"), data=str(tmp_path / "text.txt"), protocol="both", sequence_length=32, max_tokens=300
    )  # fmt: skip
    loaded = load(config.model)
    result = measure(loaded, config)
    assert result.contextual is not None and result.osp is not None
    assert {(row.layer, row.site) for row in result.contextual.sites} >= {(i, site) for i in range(2) for site in INSIDE}
    assert at(result.contextual, 1, "mlp-output").width == 48
    expected = measure_contextual(model, torch.tensor(tokenizer(TEXT)["input_ids"])[: 9 * 32].view(9, 32), str)
    assert result.contextual.excess_kurtosis == pytest.approx(expected.excess_kurtosis, rel=0.05, abs=0.02)


def test_the_command_end_to_end(tmp_path: Path) -> None:
    """Defaults, limits and headline are as stated; the result is JSON without NaN, and the summary has each layer."""
    save(tmp_path / "model", tokenizer=byte_tokenizer(adds_bos=True))
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"model": str(tmp_path / "model"), "data": str(tmp_path / "text.txt"), "device": "cpu"}
    loaded = load(settings["model"])
    both = measure(loaded, OutliersConfig(**settings, protocol="both", sequence_length=16, max_tokens=100))
    assert both.contextual is not None and both.osp is not None
    assert both.excess_kurtosis == both.contextual.excess_kurtosis
    assert (both.contextual.windows, both.contextual.tokens, both.contextual.bos) == (6, 96, True)
    assert both.osp.windows == 6
    assert at(both.contextual, 0, "residual").first.channels[0].token == "<s>"
    assert json.loads(json.dumps(asdict(both), allow_nan=False))["excess_kurtosis"] == both.excess_kurtosis
    lines = both.summary().splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert "sink share" in lines[1] and "%" in lines[2]
    assert all(word in both.summary() for word in ("mlp-output", "6 × 16", "osp, by hidden state"))
    osp = measure(loaded, OutliersConfig(**settings, protocol="osp", sequence_length=16, max_tokens=100))
    assert osp.contextual is None and osp.osp == both.osp
    assert osp.excess_kurtosis == both.osp.excess_kurtosis
    assert "excess kurtosis, osp" in osp.summary()
    half = measure(load(settings["model"], dtype=torch.bfloat16), OutliersConfig(**settings, sequence_length=16))
    assert half.contextual is not None
    assert half.contextual.windows == min(128, len(TEXT.encode()) // 15)
    with pytest.raises(ModelError, match="--sequence-length 512 is longer than the model's 64 positions"):
        measure(loaded, OutliersConfig(**settings))


def test_the_verdict_is_of_the_headline() -> None:
    """By the excess kurtosis between the layers: none, some or strong, then the channel that has most, then the MLP's sites."""
    model, windows = byte_model(), torch.randint(3, 250, (2, 16))
    found = measure_contextual(model, windows, str)
    for kurtosis, says in (
        (0.99, "no outliers to speak of"),
        (-0.001, "kurtosis 0.00 "),
        (1.0, "has outliers"),
        (10.0, "strong"),
    ):
        first, second = verdict(OutliersResult("m", "d", "contextual", "fp32", kurtosis, found))
        assert says in first and ("channel" in first) == (kurtosis >= 1)
        assert second.startswith("What the MLPs' last linears read (mlp-output) has ")
    between = replace(found, sites=[row for row in found.sites if row.site == "residual"])
    assert len(verdict(OutliersResult("m", "d", "contextual", "fp32", 2.0, between))) == 1
    alone = OutliersResult("m", "d", "osp", "fp32", 86.0, None, measure_osp(model, windows, False))
    (said,) = verdict(alone)
    assert said == "The residual stream has strong outliers: excess kurtosis 86.00 (a Gaussian has 0), each token alone."


def test_settings() -> None:
    """128 sequences of 512 tokens, or of 2,048 for osp, unless given; what cannot work names its flag."""
    config = OutliersConfig(model="m", data="d")
    assert [(config.windows(p), config.length(p)) for p in ("contextual", "osp")] == [(128, 512), (128, 2048)]
    config = OutliersConfig(model="m", data="d", sequence_length=100, max_tokens=50)
    assert (config.windows("osp"), config.length("osp")) == (1, 100)
    for bad in ({"sequence_length": 1}, {"sequences": 0}, {"max_tokens": 0}):
        with pytest.raises(ConfigError, match=f"--{next(iter(bad)).replace('_', '-')} is"):
            OutliersConfig(model="m", data="d", **bad)
