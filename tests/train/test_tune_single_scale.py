"""A base with single-scale norms keeps them so under scalar gains: its two norms in a row stay one, in stock llama.cpp too."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
from export.checks import check_here
from families import FAMILIES, build, logits, tokens
from surgery.fresh import difference
from train.commands import Notes
from trilobit.config.export import ExportConfig
from trilobit.config.pretrain import PretrainConfig
from trilobit.config.tune import TuneConfig
from trilobit.export import convert, llama_cpp
from trilobit.infer.load import load
from trilobit.nn.outlier_safe import SingleScaleRMSNorm
from trilobit.surgery.outlier_safe import find_norms
from trilobit.surgery.roles import find_roles
from trilobit.surgery.single_scale import hold_single_scales, release_single_scales, single_scale_norms
from trilobit.surgery.ternary import TernarySpec, make_plan
from trilobit.train import pretrain, tune
from trilobit.train.checkpoint import list_checkpoints
from trilobit.train.loop import Interrupted

# transformers' bitnet classes compile a function, and importing the compiler of torch 2.13 warns of torch's own code
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip
BLOCK_NORMS = [f"model.layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")]


def common(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "data": str(folder / "text.txt"), "cache_dir": str(folder / "cache"), "device": "cpu", "precision": "fp32",
        "sequence_length": 32, "sequences": 2, "batch_tokens": 64, "max_tokens": 640, "eval_tokens": 128, "lr": 1e-2,
        "compile": "no", **settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, and model/: tied, trained by Muon with single-scale norms."""
    folder = tmp_path_factory.mktemp("single-scale")
    (folder / "text.txt").write_text("Sphinx of black quartz, judge my vow. Pack my box with five dozen jugs. " * 80)
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(ARCHITECTURE))
    settings = {"out": str(folder / "run"), "optimizer": "muon", "embproj": False, "train_tokenizer": 300, "max_tokens": 6400}
    settings = common(folder, **settings)
    pretrain.run(PretrainConfig(architecture=str(folder / "tiny"), **settings))
    return folder


def config(place: Path, out: Path, **settings: Any) -> TuneConfig:
    every = {"model": str(place / "run" / "model"), "out": str(out), "placement": "every", "gain": "scalar", "store": "fp32"}
    return TuneConfig(**common(place, **{**every, **settings}))


def gains(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {path: model.get_parameter(f"{path}.weight").detach() for path in BLOCK_NORMS}


@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_norms_everywhere_are_a_bitnet_graph(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned with scalar gains everywhere, block norms have moved and are constant still; the gguf export verifies as a
    `bitnet` graph, and the decision is said (old code: refused, the gains had parted)."""
    monkeypatch.setattr(convert, "verify", check_here)
    forked.stand_in(llama_cpp, set_attribute=monkeypatch.setattr)
    notes = Notes()
    result = tune.run(config(place, tmp_path / "run"), notes)
    assert any("4 block norms" in note and "one scale" in note for note in notes.heard)
    before, after = gains(load(place / "run" / "model").model), gains(load(tmp_path / "run" / "latent").model)
    for path, gain in after.items():
        assert gain.shape == (64,) and bool((gain == gain[0]).all()), path
        assert gain[0] != before[path][0], path
    assert result.form == "autobitlinear"
    assert result.parameters == sum(p.numel() for p in load(tmp_path / "run" / "latent").model.parameters())
    exported = convert.run(ExportConfig(model=str(tmp_path / "run"), to="gguf", out=str(tmp_path / "gguf")))
    assert exported.form == "graph bitnet, type q2_0"
    assert exported.check.why_not is None and exported.check.rows[0].reader == "llama.cpp"


def test_it_resumes_bit_exactly(place: Path, tmp_path: Path) -> None:
    """Stopped half-way and continued, the run has the latents of the run that was not stopped; its checkpoints hold one scale
    for each of these norms."""

    class At(Notes):
        def row(self, row: dict[str, Any], max_tokens: int) -> None:
            if row["step"] == 4:
                signal.raise_signal(signal.SIGTERM)

    whole, parted = (config(place, tmp_path / name, model_format="none") for name in ("whole", "parted"))
    tune.run(whole)
    with pytest.raises(Interrupted):
        tune.run(parted, At())
    assert list_checkpoints(tmp_path / "parted")
    tune.run(replace(parted, resume=True))
    a, b = (load(tmp_path / name / "latent").model.state_dict() for name in ("whole", "parted"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings", [{"gain": "vector"}, {"placement": "output"}, {"placement": "none"}], ids=["vector", "output", "none"]
)
def test_elsewhere_gains_are_trained_channel_by_channel(settings: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """Where no norm with one gain follows, nothing is decided, and block gains are free as before."""
    notes = Notes()
    tune.run(config(place, tmp_path / "run", model_format="none", **settings), notes)
    assert not any("block norms" in note for note in notes.heard)
    assert any(bool((gain != gain[0]).any()) for gain in gains(load(tmp_path / "run" / "latent").model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_swap_keeps_the_function(family: str) -> None:
    """In every family (norms that multiply by 1 + w among them) held norms compute what the stock ones do, have one parameter
    each, and come back as stock norms with the scale that they had then in all channels."""
    model = build(family)
    with torch.no_grad():
        for index, (path, rule) in enumerate(find_norms(model).items()):
            model.get_parameter(f"{path}.{rule.parameter}").fill_(0.5 + 0.1 * index)
    plan = make_plan(find_roles(model), TernarySpec(gain="scalar"))
    paths, expected, modules = single_scale_norms(model, plan), logits(model, tokens()), dict(model.named_modules())
    held = hold_single_scales(model, paths)
    assert difference(logits(model, tokens()), expected) <= 1e-5
    for path in paths:
        assert isinstance(model.get_submodule(path), SingleScaleRMSNorm)
        model.get_parameter(f"{path}.weight").data.mul_(1.5)
    changed = logits(model, tokens())
    release_single_scales(model, held)
    assert dict(model.named_modules()) == modules
    assert difference(logits(model, tokens()), changed) <= 1e-5


def test_one_norm_that_is_not_constant_decides_for_all() -> None:
    """If a single block norm has learned a gain per channel, all are left as they are."""
    model = build("llama", num_hidden_layers=2)
    plan = make_plan(find_roles(model), TernarySpec(gain="scalar"))
    assert single_scale_norms(model, plan) == []
    with torch.no_grad():
        for path in BLOCK_NORMS:
            model.get_parameter(f"{path}.weight").fill_(0.5)
    assert single_scale_norms(model, plan) == BLOCK_NORMS
    with torch.no_grad():
        model.get_parameter(f"{BLOCK_NORMS[2]}.weight")[3] += 1e-6
    assert single_scale_norms(model, plan) == []
