"""`trilobit export --to native`: what is written is what was asked for, read back, and left behind only if it agrees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checks import check_here
from families import build
from infer.checkpoints import BYTES, byte_model, byte_tokenizer, save
from infer.natives import latent
from trilobit.config.export import ExportConfig
from trilobit.errors import ModelError, OutputError, TrilobitError, VerificationError
from trilobit.export import convert, verification
from trilobit.export import native as export
from trilobit.export.convert import ExportResult, run
from trilobit.export.hf import write_latent
from trilobit.export.verify import Agreement
from trilobit.infer import compiler, native_file
from trilobit.infer.compiler import NotNative
from trilobit.infer.engine import Engine, open_engine, open_native
from trilobit.infer.load import load
from trilobit.infer.stored import freeze
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.listener import SILENT
from trilobit.storage import verify_manifest
from trilobit.surgery.ternary import TernarySpec, ternarize

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")


@pytest.fixture(autouse=True)
def checked_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in this process, where the engine can be made to lie, but for tests that ask for the real one."""
    if request.node.get_closest_marker("interpreter") is None:
        monkeypatch.setattr(convert, "verify", check_here)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model's trainable form."""
    return latent(tmp_path_factory.mktemp("latent") / "model", max_position_embeddings=128)


def agreed(result: ExportResult) -> Agreement:
    """The one comparison of a native export."""
    (row,) = result.check.rows
    return row.agreement


@pytest.mark.parametrize("layout", ["auto", "two-bit", "base-3"])
def test_the_written_model_is_the_model(trained: Path, tmp_path: Path, layout: Any) -> None:
    """A whole directory with its checksums, which opens as the model it was made from; layout, size and agreement are said."""
    out = tmp_path / "out"
    result = run(ExportConfig(model=str(trained), out=str(out), layout=layout))
    verify_manifest(out)
    assert {"native.safetensors", "config.json", "trilobit.json", "tokenizer.json", "manifest.json"} <= {
        p.name for p in out.iterdir()
    }
    opened, source = open_engine(out), open_engine(trained)
    ids = torch.randint(3, BYTES, (60,))
    assert torch.equal(opened.logits(ids), source.logits(ids))
    assert opened.stops == {2}
    assert result.details["layout"] == opened.graph.header.layout
    assert layout in ("auto", result.details["layout"])
    assert result.bytes == (out / native_file.NAME).stat().st_size
    assert agreed(result).positions == 8 * 127
    assert agreed(result).top1 > 0.9
    assert 0 <= agreed(result).kl < 0.005
    assert agreed(result).perplexity_ratio == pytest.approx(1, abs=0.01)
    assert list(opened.stream([5], 3, Sampling())) == list(source.stream([5], 3, Sampling()))


@pytest.mark.interpreter
def test_the_check_is_a_process_of_its_own(trained: Path, tmp_path: Path) -> None:
    """Without a stand-in the engine's reading comes from another process, with its table; a wrong one is refused there."""
    result = run(ExportConfig(model=str(trained), out=str(tmp_path / "out")))
    assert agreed(result).positions == 8 * 127
    assert 0 <= agreed(result).kl < 0.005
    loaded = load(trained)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight.neg_()  # pyright: ignore
    assert loaded.plan is not None
    write_latent(loaded.model, loaded.plan, loaded.tokenizer, tmp_path / "other")
    with pytest.raises(VerificationError, match="the engine reads another model"):
        verification.verify(tmp_path / "other", tmp_path / "out", "native", None, SILENT)


def test_bits_a_weight(trained: Path) -> None:
    """Bits are those of the packed bytes and scales over the weights of the layers: 2 and 1.6 where shapes need no padding,
    more where they do."""
    settings = {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 10, "num_key_value_heads": 10}
    model = build("llama", num_hidden_layers=1, **settings)
    ternarize(model)
    freeze(model)
    assert export.bits_per_weight(compiler.compile(model, "two-bit")) == pytest.approx(2, rel=1e-3)
    assert export.bits_per_weight(compiler.compile(model, "base-3")) == pytest.approx(1.6, rel=1e-3)
    assert export.bits_per_weight(open_engine(trained).graph) > 2


def test_a_given_text_is_what_it_is_compared_on(trained: Path, tmp_path: Path) -> None:
    """--data takes the probe from a text; a short one gives fewer positions, but a thousand at least."""
    text = tmp_path / "text.txt"
    text.write_text("Sphinx of black quartz, judge my vow. " * 30)
    result = run(ExportConfig(model=str(trained), out=str(tmp_path / "out"), data=str(text)))
    assert agreed(result).positions == 1140 // 128 * 127 == 1016


def test_weights_only_models_are_exported_with_their_loss(tmp_path: Path) -> None:
    """A model trained with full-precision activations is written with int8 ones in groups, and how far off that is is said."""
    model = byte_model(max_position_embeddings=128)
    plan = ternarize(model, TernarySpec(activations="none", scale="group-64")).plan
    write_latent(model, plan, byte_tokenizer(), tmp_path / "model")
    result = run(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "out")))
    assert open_native(tmp_path / "out")[0].header.activations == "group"
    assert 0 < agreed(result).kl < 0.05
    assert 0.9 < agreed(result).perplexity_ratio < 1.1


def _ordinary(folder: Path) -> Path:
    return save(folder / "model")


def _gemma(folder: Path) -> Path:
    model = build("gemma3_text", vocab_size=BYTES, num_hidden_layers=2)
    write_latent(model, ternarize(model, TernarySpec()).plan, byte_tokenizer(), folder / "model")
    return folder / "model"


def _no_start(folder: Path) -> Path:
    tokenizer = byte_tokenizer(has_bos=False)
    tokenizer.eos_token = None
    return latent(folder / "model", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_ordinary, NotNative, "not ternary"),
        (_gemma, NotNative, "no graph for Gemma3ForCausalLM"),
        (_no_start, ModelError, "no token to sample a text from: give --data"),
        (lambda folder: folder / "nothing", ModelError, "nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_leaves_nothing(make: Any, error: type[TrilobitError], says: str, tmp_path: Path) -> None:
    """A model without a graph, a tokenizer without a token to start from, a missing model: an error, and no directory."""
    source = make(tmp_path)
    with pytest.raises(error, match=says):
        run(ExportConfig(model=str(source), out=str(tmp_path / "out")))
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_what_is_there_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    """An --out that exists is refused, and stays as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match=r"out exists already\. Choose another --out"):
        run(ExportConfig(model=str(trained), out=str(tmp_path / "out")))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_native_directory_is_not_exported_again(trained: Path, tmp_path: Path) -> None:
    """What is written for the engine is no source of anything else, and the error says what it is (old code: that there is
    no model.safetensors)."""
    run(ExportConfig(model=str(trained), out=str(tmp_path / "once")))
    with pytest.raises(ModelError, match="once is written for the native engine"):
        run(ExportConfig(model=str(tmp_path / "once"), out=str(tmp_path / "twice")))


def test_a_reading_that_is_another_model_is_not_left_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine's logits are another model's, or no numbers, nothing is written, and the error says how far off."""
    honest = Engine.logits
    for change in (lambda y: y.roll(1, dims=-1), lambda y: y * torch.nan, lambda y: y * 1.3):
        monkeypatch.setattr(Engine, "logits", lambda self, ids, change=change: change(honest(self, ids)))
        with pytest.raises(VerificationError, match=r"the engine reads another model: KL .* perplexity × .* not left behind"):
            run(ExportConfig(model=str(trained), out=str(tmp_path / "out")))
        assert not list(tmp_path.iterdir())


def test_limits_of_agreement() -> None:
    """KL below its limit, or within twice the model's own noise, and the loss within a thousandth and three standard errors;
    for a model that int8 activations change, a tenth of a nat. The noise is measured only where it is needed."""

    def agreement(kl: float, ratio: float, error: float = 0.0) -> Agreement:
        return Agreement(1000, 0.5, 0.1, kl, ratio, error)

    def never() -> Agreement:
        raise AssertionError("the noise was measured")

    def noise() -> Agreement:
        return agreement(0.01, 1.0)

    export._require_same(agreement(0.004, 1.0009), "token", never)
    export._require_same(agreement(0.019, 1.0), "token", noise)
    export._require_same(agreement(0.004, 1.003, 0.001), "token", never)
    export._require_same(agreement(0.3, 1.09), "group", never)
    export._require_same(agreement(0.004, 1.0045), "token", never, sampled=True)
    for wrong, activations in (
        (agreement(0.021, 1.0), "token"), (agreement(0.004, 1.003), "token"), (agreement(0.004, 0.997), "token"),
        (agreement(float("nan"), 1.0), "token"), (agreement(0.004, 0.0), "token"), (agreement(0.3, 1.2), "group"),
        (agreement(float("nan"), 1.0), "group"), (agreement(0.3, float("inf")), "group"),
        (agreement(0.3, float("nan")), "group"),
    ):  # fmt: skip
        with pytest.raises(VerificationError):
            export._require_same(wrong, activations, noise)
    for wrong in (agreement(0.004, 1.006), agreement(0.004, 0.997), agreement(float("nan"), 1.0)):
        with pytest.raises(VerificationError):
            export._require_same(wrong, "token", noise, sampled=True)


def test_the_card_says_native(trained: Path, tmp_path: Path) -> None:
    """trilobit.json names the form, and the plan of the surgery survives."""
    run(ExportConfig(model=str(trained), out=str(tmp_path / "out")))
    card = json.loads((tmp_path / "out" / "trilobit.json").read_text())
    assert card["form"] == "native"
    assert card["plan"] == load(trained).plan.to_json()  # pyright: ignore
    assert open_native(tmp_path / "out")[2] == [2]
