"""Ternary checkpoints of others: transformers' `bitnet` directories are read as transformers and the definition read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checks import check_here
from families import logits
from infer.bitnets import BITNET, FORMS, stock, windows, write_bitnet
from infer.checkpoints import byte_model, save
from infer.ggufs import write_gguf
from trilobit import quant
from trilobit.config.eval import EvalConfig
from trilobit.config.export import ExportConfig
from trilobit.config.generate import GenerateConfig
from trilobit.errors import ModelError
from trilobit.export import convert as export
from trilobit.export.hf import write_model
from trilobit.export.verify import compare, noise_floor
from trilobit.infer import generate
from trilobit.infer.engine import engine_of, open_engine
from trilobit.infer.load import load, load_pretrained
from trilobit.infer.stored import freeze
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.measure import evaluate
from trilobit.nn.packed import PackedLinear
from trilobit.nn.ternary import TernaryLinear, ternary_modules

# transformers' bitnet classes compile a function, and importing the compiler of torch 2.13 warns of torch's own code
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
Q_PROJ = "model.layers.0.self_attn.q_proj"

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bitnet", BITNET),
    ("bitnet", {**BITNET, "dtype": torch.bfloat16}),
    ("bitnet", {"hidden_act": "relu2", "attention_bias": True}),
    ("llama", {"norms": True}),
    ("llama", {"norms": True, "tied": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "norms": True}),
    ("llama", {"skip": ["lm_head", "model.layers.1.mlp.down_proj"]}),
    ("llama", {"skip": ["model.layers.0.self_attn"], "norms": True, "vocab_size": 260}),  # lm_head is ternary, with a norm
    ("llama", {"skip": ["model.layers.0.self_attn"], "vocab_size": 260}),
    ("qwen2", {}),
    ("qwen3", {"tied": True, "norms": True}),
    ("gemma3_text", {"tied": True}),
    ("phi3", {"norms": True}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_it_is_what_transformers_reads(tmp_path: Path, form: str, family: str, settings: dict[str, Any]) -> None:
    """Both conventions of weight_scale and latents quantised as they are used, with and without norms, biases, tied heads and
    modules left out: frozen modules with transformers' argmax at 98.5 % of the positions; trainable ones, the same bits."""
    folder = write_bitnet(tmp_path / "model", form, family, **settings)
    loaded, reference = load(folder), stock(folder)
    agreement = compare(reference, loaded.model, windows()).require("our reading", lambda: noise_floor(reference, windows()))
    assert agreement.top1 >= 0.985
    assert agreement.kl < 1e-4
    assert (loaded.form, loaded.plan is None) == (form, False)
    assert not [n for n, p in loaded.model.named_parameters() if p.requires_grad]
    assert not hasattr(loaded.model.config, "quantization_config")
    assert not any(getattr(loaded.model, name, None) for name in ("hf_quantizer", "is_quantized", "quantization_method"))
    packed = {name for name, module in loaded.model.named_modules() if isinstance(module, PackedLinear)}
    assert loaded.plan is not None
    assert packed == {*loaded.plan.linears, *([loaded.plan.head] if loaded.plan.head else [])}
    trainable = load_pretrained(str(folder), trainable=True)
    assert trainable.plan == loaded.plan
    assert {name for name, _ in ternary_modules(trainable.model)} == packed
    assert torch.equal(logits(trainable.model, windows()[:2]), logits(loaded.model, windows()[:2]))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trainable.model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_are_those_stored(tmp_path: Path, form: str) -> None:
    """A linear is the written definition of what its tensors say: codes and scale bit by bit."""
    folder = write_bitnet(tmp_path / "model", form, attention_bias=True)
    tensors = load_file(folder / "model.safetensors")
    weight, bias = tensors[f"{Q_PROJ}.weight"], tensors[f"{Q_PROJ}.bias"]
    if form == "online":
        scale = weight.double().abs().mean().float().reshape(1, 1)
        codes = (weight * scale.reciprocal()).round().clamp(-1, 1).to(torch.int8)
    else:
        scale = tensors[f"{Q_PROJ}.weight_scale"].reshape(1, 1)
        scale, bias = (1 / scale, bias) if form == "bitlinear" else (scale, bias * scale[0])
        rows = weight.shape[0]
        codes = torch.stack([(weight[r % rows].int() >> 2 * (r // rows)) % 4 - 1 for r in range(4 * rows)]).to(torch.int8)
    module = load(folder).model.get_submodule(Q_PROJ)
    assert isinstance(module, PackedLinear)
    assert torch.equal(module.codes, codes)
    assert torch.equal(module.scale, scale)
    x = torch.randn(7, codes.shape[1])
    assert torch.equal(module(x), quant.integer_linear(*quant.int8_codes(x), codes, scale, bias, "tensor"))


def _change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def _configure(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= values
        path.write_text(json.dumps(config))

    return damage


def _scale(value: float) -> Callable[[Path], None]:
    return _change(lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(value))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_scale(0.0), "weight_scale that is no positive number"),
        (_scale(-1.0), "weight_scale that is no positive number"),
        (_scale(float("nan")), "weight_scale that is no positive number"),
        (_change(lambda t: t[f"{Q_PROJ}.weight"].fill_(255)), "a code that is none of −1, 0, 1"),
        (_change(lambda t: t.pop(f"{Q_PROJ}.weight_scale")), "lacks 1 of the model's weights"),
        (_change(lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(32, 32)})), r"q_proj.weight is \(32, 32\), not \(8, 32\)"),
        (_configure(use_rms_norm=False), "14 weights that its config.json gives no place"),
        (_configure(quant_method="gptq", bits=4), r"quantised checkpoint \(gptq\): only ternary ones"),
        (_configure(linear_class="other"), "linears of class 'other'"),
        (_configure(quantization_mode="sometimes"), "'sometimes'"),
        (_configure(quantization_mode="online", linear_class="bitlinear"), "only packed weights"),
        (_configure(modules_to_not_convert=["model", "lm_head"]), "Its config is mistaken|gives no place|fit its config.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], Any], says: str) -> None:
    """What a `bitnet` directory cannot mean is a ModelError of one line that names it."""
    folder = write_bitnet(tmp_path / "model", "autobitlinear", norms=True)
    damage(folder)
    with pytest.raises(ModelError, match=says) as caught:
        load(folder)
    assert "model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_ternary_head_has_no_full_precision_twin(tmp_path: Path) -> None:
    """A head that is said to be ternary and tied to an embedding that is not: refused, transformers would run garbage."""
    folder = write_bitnet(tmp_path / "model", "bitlinear", tied=True, skip=["embed_tokens"])
    with pytest.raises(ModelError, match="could not be loaded"):  # transformers' refusal
        load(folder)
    folder = write_bitnet(tmp_path / "latents", "online", tied=True, skip=["embed_tokens"])
    with pytest.raises(ModelError, match="add lm_head to modules_to_not_convert"):
        load(folder)


def test_ordinary_checkpoints_stay_ordinary(tmp_path: Path) -> None:
    """`trainable` changes nothing where nothing is ternary."""
    folder = save(tmp_path / "model")
    assert load_pretrained(str(folder), trainable=True).plan is None
    assert torch.equal(logits(load(folder).model, windows()[:1]), logits(byte_model(), windows()[:1]))


def test_the_activations_may_be_bf16(tmp_path: Path) -> None:
    """`dtype` is that of what is not ternary; scales and norms of ternary modules stay fp32."""
    folder = write_bitnet(tmp_path / "model", "bitlinear", norms=True)
    model = load(folder, dtype=torch.bfloat16).model
    module = model.get_submodule(Q_PROJ)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert module.rms_norm.weight.dtype == torch.float32  # pyright: ignore
    assert torch.isfinite(logits(model, windows()[:1])).all()


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_stored_as_ours(tmp_path: Path, form: str) -> None:
    """What was read can be written by our own exporter, which has transformers read it back and compares."""
    loaded = load_pretrained(str(write_bitnet(tmp_path / "theirs", form, "bitnet", **BITNET)), trainable=True)
    assert loaded.plan is not None
    loaded.model.eval()
    written = write_model(loaded.model, loaded.plan, loaded.tokenizer, tmp_path / "ours", windows(), store="fp32")
    assert written.form == "autobitlinear"
    ours = load(tmp_path / "ours")
    assert torch.equal(logits(ours.model, windows()[:2]), logits(freeze(loaded.model), windows()[:2]))


@pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")
@pytest.mark.parametrize(("family", "settings"), [("bitnet", BITNET), ("llama", {"norms": True})], ids=["bitnet", "llama"])
def test_the_native_engine_runs_it(
    tmp_path: Path, family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export --to native` of both classes passes its own verification, and the engine continues a text."""
    folder = write_bitnet(tmp_path / "model", "autobitlinear", family, **settings)
    monkeypatch.setattr(export, "verify", check_here)
    result = export.run(ExportConfig(model=str(folder), out=str(tmp_path / "native")))
    assert result.check.rows[0].agreement.kl < 0.005
    assert result.check.rows[0].agreement.top1 > 0.9
    read, compiled = open_engine(tmp_path / "native"), engine_of(load(folder))
    ids = windows()[0]
    assert torch.equal(read.logits(ids), compiled.logits(ids))
    assert len(list(read.stream([5, 17], 4, Sampling(), ends=False))) == 4


def test_latents_have_the_codes_and_scales_they_came_from() -> None:
    """quant.latent_weight is exact for every granule: sparse and dense, single columns, zeros, short last groups."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(1000):
        granularity: Any = ["tensor", "row", "group-64", "group-128", "group-256"][trial % 5]
        rows, columns = (int(torch.randint(1, most, (), generator=generator)) for most in (9, 400 if trial % 3 else 6))
        codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
        codes *= torch.rand(rows, columns, generator=generator) < torch.rand((), generator=generator)
        scale = quant.absmean_scale(torch.randn(rows, columns, generator=generator) * 10.0 ** -(trial % 4), granularity)
        latent = quant.latent_weight(codes, scale, granularity)
        expected = quant.ternary_dequantize(codes, scale, granularity)
        assert torch.equal(quant.ternary_quantize(latent, granularity), expected), (trial, granularity, rows, columns)


def test_scales_that_training_does_not_have_are_refused() -> None:
    """A scale below quant's floor, and a group scale that is no fp16 number, run frozen and cannot be trained."""
    codes = torch.ones(2, 64, dtype=torch.int8)
    for scale, granularity in ((torch.tensor([[1e-7]]), "tensor"), (torch.tensor([[0.1], [0.3]]), "group-64")):
        frozen = PackedLinear(codes, scale, None, None, granularity, False)  # pyright: ignore[reportArgumentType]
        assert torch.isfinite(frozen(torch.randn(3, 64))).all()
        with pytest.raises(ModelError, match="can be run and measured, not tuned"):
            frozen.to_ternary()
    held = PackedLinear(codes, torch.tensor([[0.5], [0.25]]), torch.ones(2), None, "group-64", True)
    assert isinstance(held.to_ternary(), TernaryLinear)
    x = torch.randn(3, 64)
    assert torch.equal(held.to_ternary()(x), held(x))


@pytest.mark.parametrize("kind", ["a directory", "a GGUF file"])
def test_commands_take_it(kind: str, tmp_path: Path) -> None:
    """`eval` and `generate` run on what others wrote as they do on our own (`tune` and `export` have tests of their own)."""
    if kind == "a directory":
        place = write_bitnet(tmp_path / "model", "bitlinear", "bitnet", **BITNET)
    else:
        place = write_gguf(tmp_path / "m.gguf", "llama", "q2_0").path
    (tmp_path / "text.txt").write_text("Sphinx of black quartz, judge my vow. " * 20)
    measured = evaluate.run(EvalConfig(model=str(place), data=str(tmp_path / "text.txt"), sequence_length=32, device="cpu"))
    assert measured.perplexity is not None and 1 < measured.perplexity < 1e9
    written = generate.run(GenerateConfig(model=str(place), prompt="Sphinx", max_tokens=4))
    assert 1 <= written.tokens <= 4


def test_what_its_config_need_not_say(tmp_path: Path) -> None:
    """Falcon-E's config.json names the method and the head alone: packed weights of class bitlinear, without norms."""
    folder = write_bitnet(tmp_path / "model", "bitlinear", "llama", skip=["lm_head"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert loaded.form == "bitlinear"
    assert compare(stock(folder), loaded.model, windows()).top1 >= 0.985
