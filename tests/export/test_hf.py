"""model/ and latent/: the table of forms, and what stock transformers and trilobit.load make of each."""

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from families import FAMILIES, SCALED_EMBEDDING, VOCABULARY, build, logits
from infer.checkpoints import word_tokenizer
from trilobit.errors import ConfigError, ModelError, OutputError, VerificationError
from trilobit.export import forms, hf, verify
from trilobit.export.source import Source
from trilobit.export.verify import MAX_PERPLEXITY_CHANGE, MIN_TOP1, POSITIONS, compare, noise_floor, shaken
from trilobit.infer.load import load
from trilobit.infer.stored import PACKED_FILE
from trilobit.nn.packed import PackedLinear
from trilobit.nn.ternary import TernaryLinear, ternary_modules
from trilobit.quant import Granularity
from trilobit.surgery.roles import Roles, find_roles
from trilobit.surgery.ternary import Activations, Cover, Placement, Plan, TernarySpec, make_plan, ternarize
from trilobit.tensors import Entry

pytestmark = pytest.mark.filterwarnings(  # torch's own imports, on the way to transformers' bitnet classes
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
WIDTH = 256
PROBE = torch.randint(3, VOCABULARY, (POSITIONS // WIDTH, WIDTH + 1), generator=torch.Generator().manual_seed(5))
TOKENIZER = word_tokenizer(VOCABULARY)


def made(
    family: str = "llama", *, tied: bool = False, settings: dict[str, Any] | None = None, **spec: Any
) -> tuple[PreTrainedModel, Plan]:
    """A random ternary model whose inserted gains look trained: none is one, no two are alike."""
    model = build(family, tied=tied, num_hidden_layers=2, max_position_embeddings=WIDTH, **(settings or {}))
    plan = ternarize(model, TernarySpec(**spec)).plan
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".rms_norm.weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 1.5 + 0.25)
    return model, plan


def write(
    model: PreTrainedModel, plan: Plan, target: Path, form: str = "auto", store: forms.Store = "fp32", windows: int = len(PROBE)
) -> hf.Written:
    return hf.write_model(model, plan, TOKENIZER, target, PROBE[:windows], form, store)


def stock(path: Path, **options: Any) -> PreTrainedModel:
    """As a user would: transformers alone, nothing but the path."""
    with torch.compiler.set_stance("force_eager"):
        return AutoModelForCausalLM.from_pretrained(path, **options)


def agreement(model: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """Share of equal argmax and ratio of perplexities over 4,096 positions, without verify.py's code."""
    inputs, targets = PROBE[:16, :-1], PROBE[:16, 1:].flatten()
    with torch.compiler.set_stance("force_eager"):
        ours, theirs = (logits(m, inputs).float().flatten(0, 1) for m in (model, other))
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    ratio = torch.exp(F.cross_entropy(theirs.double(), targets) - F.cross_entropy(ours.double(), targets)).item()
    return same, ratio


def agrees(model: PreTrainedModel, other: PreTrainedModel) -> None:
    same, ratio = agreement(model, other)
    assert same >= MIN_TOP1
    assert abs(ratio - 1) <= MAX_PERPLEXITY_CHANGE


def tensors(path: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    with safe_open(path / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@cache
def roles_of(family: str) -> tuple[PreTrainedModel, Roles]:
    model = build(family)
    return model, find_roles(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table(family: str) -> None:
    """choose_form gives what forms.py's table says for every placement × scale × activations × cover, with its reason."""
    model, roles = roles_of(family)
    for placement, scale, activations, cover in product(*map(get_args, (Placement, Granularity, Activations, Cover))):
        plan = make_plan(roles, TernarySpec(placement=placement, scale=scale, activations=activations, cover=cover))
        form, reason = forms.choose_form(Source(model, plan))
        case = (placement, scale, activations, cover, form, reason)
        if placement == "none" and activations == "none":
            assert form == "dense", case
            continue
        bitnet = scale == "tensor" and activations == "int8" and cover == "projections"
        movable = placement != "output" or family != "olmo2"
        assert form == ("autobitlinear" if bitnet and movable else "packed"), case
        if scale != "tensor":
            assert f"one per {scale}" in reason
        elif activations == "none":
            assert "not quantised" in reason
        elif cover != "projections":
            assert "embeddings and lm_head" in reason
        elif not movable:
            assert "model.layers.0.self_attn.q_proj does not read a block norm" in reason


@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_norms_everywhere(family: str, form: str, tmp_path: Path) -> None:
    """placement every, per tensor, int8: both bitnet classes of stock transformers agree with the trained model, biases
    included; the model in memory is left as it was."""
    model, plan = made(family, tied=family in ("qwen3", "gemma3_text"))
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    written = write(model, plan, tmp_path / "model", form)
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model.eval()
    assert (written.form, written.agreement.positions) == (form, POSITIONS)
    agrees(model, stock(tmp_path / "model"))
    loaded = load(tmp_path / "model")
    agrees(model, loaded.model)
    assert loaded.form == form
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "olmo2"])
def test_stock_transformers_loads_no_norms(family: str, form: str, tmp_path: Path) -> None:
    """placement none, per tensor, int8: the same without rms_norm."""
    model, plan = made(family, placement="none")
    write(model, plan, tmp_path / "model", form)
    agrees(model, stock(tmp_path / "model"))
    agrees(model, load(tmp_path / "model").model)
    assert read(tmp_path / "model" / "config.json")["quantization_config"]["use_rms_norm"] is False
    assert not any("rms_norm" in name for name in tensors(tmp_path / "model"))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmo2"])
def test_stock_transformers_loads_output_norms(family: str, tmp_path: Path) -> None:
    """placement output: block gains move into the norms of the linears they feed (Gemma's are 1 + w), and the whole
    stays the same function for stock transformers and for trilobit, in both classes."""
    model, plan = made(family, placement="output")
    form = "autobitlinear" if family in ("llama", "gemma3_text", "phi3") else "bitlinear"
    write(model, plan, tmp_path / form, form)
    agrees(model, stock(tmp_path / form))
    agrees(model, load(tmp_path / form).model)
    stored = tensors(tmp_path / form)
    linears = [path for path, _ in ternary_modules(model)]
    assert all(f"{path}.rms_norm.weight" in stored for path in linears)
    block = stored["model.layers.1.input_layernorm.weight"] + (1 if family == "gemma3_text" else 0)
    assert block.unique().numel() == 1
    own = stored[next(f"{p}.rms_norm.weight" for p in linears if p.startswith("model.layers.1.self_attn.q"))]
    gain = model.get_parameter("model.layers.1.input_layernorm.weight") + (1 if family == "gemma3_text" else 0)
    assert torch.allclose(own / own.abs().max(), gain / gain.abs().max(), rtol=1e-5)


def test_moved_gains_keep_the_block_norms_epsilon(tmp_path: Path) -> None:
    """Where the residual is as small as its epsilon (untrained embeddings, first layers) `output` is still exact: a block
    gain of one would let the second norm undo the first one's epsilon, and the writer then refused a good model."""
    model, plan = made("llama", placement="output", settings={"initializer_range": 0.02, "rms_norm_eps": 1e-4})
    written = write(model, plan, tmp_path / "model")
    assert written.form == "autobitlinear"
    assert written.agreement.kl < 1e-7


def test_a_block_gain_of_one_is_refused_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The regression: with the block gain at one that same model fails its verification."""
    monkeypatch.setattr(forms, "SMALL_GAIN", 1.0)
    model, plan = made("llama", placement="output", settings={"initializer_range": 0.02, "rms_norm_eps": 1e-4})
    with pytest.raises(VerificationError):
        write(model, plan, tmp_path / "model", "autobitlinear")


def test_output_norms_without_block_norms_are_packed(tmp_path: Path) -> None:
    """OLMo 2 has its norms after: `output` becomes packed, and the reason names the first linear in the way."""
    model, plan = made("olmo2", placement="output")
    written = write(model, plan, tmp_path / "model")
    assert written.form == "packed"
    assert "model.layers.0.self_attn.q_proj does not read a block norm" in written.reason
    with pytest.raises(ConfigError, match=r"--model-format bitlinear cannot hold this model: .*q_proj"):
        write(model, plan, tmp_path / "other", "bitlinear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_output_norms_behind_layer_norms_are_packed(tmp_path: Path) -> None:
    """A LayerNorm (StableLM's, with bias) has no gain that could move: `output` is packed by choice, not as the way out of
    a bitnet form that fails, and --model-format bitlinear is refused before anything is trained or written."""
    model, plan = made("stablelm", placement="output")
    assert isinstance(model.get_submodule("model.layers.0.input_layernorm"), torch.nn.LayerNorm)
    obstacle = "model.layers.0.input_layernorm is no RMSNorm whose gain could move into model.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError, match=f"--model-format bitlinear cannot hold this model: .*{obstacle}"):
        forms.require_form(Source(model, plan), "bitlinear")
    written = write(model, plan, tmp_path / "model")
    assert written.form == "packed"
    assert obstacle in written.reason
    agrees(model, load(tmp_path / "model").model)


@pytest.mark.parametrize(
    ("family", "tied", "scale", "cover", "learned"),
    [
        ("llama", False, "tensor", "projections", False), ("qwen2", True, "group-64", "+embeddings", False),
        ("phi3", False, "row", "+lm_head", False), ("gemma3_text", True, "row", "projections", False),
        ("olmo2", False, "group-128", "+embeddings", False), ("smollm3", True, "tensor", "+lm_head", False),
        ("qwen2", True, "row", "projections", True),
    ],
)  # fmt: skip
def test_dense(family: str, tied: bool, scale: Granularity, cover: Cover, learned: bool, tmp_path: Path) -> None:
    """Weights-only models without norms are ordinary checkpoints: no quantization_config, code · s as weights."""
    spec = {"placement": "none", "activations": "none", "scale": scale, "cover": cover, "learned_ranges": learned}
    model, plan = made(family, tied=tied, **spec)
    written = write(model, plan, tmp_path / "model", store="bf16")
    assert written.form == "dense"
    config = read(tmp_path / "model" / "config.json")
    assert "quantization_config" not in config
    other = stock(tmp_path / "model", dtype=torch.float32)
    agrees(model, other)
    agrees(model, load(tmp_path / "model").model)
    stored = tensors(tmp_path / "model")
    assert ("lm_head.weight" in stored) == (not tied)
    assert config["tie_word_embeddings"] == tied
    path = next(path for path, _ in ternary_modules(model) if path.endswith("o_proj"))
    rows = stored[f"{path}.weight"].float()
    if scale == "row":
        assert all(row.abs().unique().numel() <= 2 for row in rows)


PACKED = [
    ("llama", False, {"scale": "row"}),
    ("qwen2", True, {"scale": "group-64", "cover": "+embeddings"}),
    ("qwen3", False, {"activations": "none"}),
    ("gemma3_text", False, {"cover": "+lm_head", "placement": "output"}),
    ("phi3", False, {"scale": "group-128", "activations": "none", "gain": "scalar"}),
    ("olmo2", True, {"scale": "group-256", "cover": "+lm_head", "placement": "none"}),
    ("smollm3", False, {"cover": "+embeddings", "scale": "row", "activations": "none"}),
    ("mistral", True, {"placement": "output", "activations": "none"}),
    ("qwen2", False, {"placement": "none", "activations": "none", "dead_zone_bias": 1e-2}),
    ("llama", True, {"placement": "none", "dead_zone_bias": 1e-2}),
    ("llama", True, {"scale": "row", "learned_ranges": True}),
]


@pytest.mark.parametrize(("family", "tied", "spec"), PACKED)
def test_packed(family: str, tied: bool, spec: dict[str, Any], tmp_path: Path) -> None:
    """Everything else is packed: trilobit reads it back to the same function, and stock transformers refuses it."""
    model, plan = made(family, tied=tied, **spec)
    written = write(model, plan, tmp_path / "model")
    assert written.form == "packed"
    assert written.agreement.top1 >= 0.999
    with pytest.raises(OSError, match=r"model\.safetensors"):
        stock(tmp_path / "model")
    loaded = load(tmp_path / "model")
    agrees(model, loaded.model)
    assert isinstance(loaded.model.get_submodule(next(iter(plan.linears))), PackedLinear)
    stored = tensors(tmp_path / "model", PACKED_FILE)
    assert ("lm_head.weight" in stored or "lm_head.codes" in stored) == (not tied)
    size = sum(p.numel() for p in model.parameters())
    ternary = sum(m.weight.numel() for n, m in ternary_modules(model) if not (tied and n == "lm_head"))
    assert written.bytes == (tmp_path / "model" / PACKED_FILE).stat().st_size
    assert written.bytes < (size - ternary) * 4 + ternary / 2 + 20_000


@pytest.mark.parametrize("tied", [False, True])
def test_packed_can_be_asked_for_and_is_exact(tied: bool, tmp_path: Path) -> None:
    """Where norms stay put and scales are per tensor, the packed form has the trained model's logits bit for bit."""
    model, plan = made("qwen2", tied=tied, placement="output")
    written = write(model, plan, tmp_path / "model", "packed")
    assert (written.form, written.reason) == ("packed", "as asked")
    assert torch.equal(logits(load(tmp_path / "model").model, PROBE[:2, :-1]), logits(model, PROBE[:2, :-1]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear"])
def test_what_a_bitnet_directory_holds(form: str, tied: bool, tmp_path: Path) -> None:
    """config.json, tensors and their meaning: class named, scale s or 1/s, bias/s or bias, gains per channel, head once."""
    model, plan = made("qwen2", tied=tied, gain="scalar")
    write(model, plan, tmp_path / "model", form, "bf16")
    config = read(tmp_path / "model" / "config.json")
    assert config["quantization_config"] == {
        "quant_method": "bitnet", "linear_class": form, "quantization_mode": "offline", "use_rms_norm": True,
        "rms_norm_eps": 1e-6, "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] == tied
    stored = tensors(tmp_path / "model")
    assert ("lm_head.weight" in stored) == (not tied)
    linear = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert isinstance(linear, TernaryLinear)
    assert linear.bias is not None
    assert linear.rms_norm is not None
    scale = linear.weight.abs().double().mean().item()
    name = "model.layers.0.self_attn.k_proj"
    assert stored[f"{name}.weight"].dtype == torch.uint8
    assert stored[f"{name}.weight"].shape == (linear.out_features // 4, linear.in_features)
    assert stored[f"{name}.weight_scale"].shape == (1,)
    multiplies = form == "autobitlinear"
    assert stored[f"{name}.weight_scale"].item() == pytest.approx(scale if multiplies else 1 / scale, rel=1e-6)
    bias = linear.bias.detach() / scale if multiplies else linear.bias.detach()
    assert torch.allclose(stored[f"{name}.bias"], bias, rtol=1e-6)
    assert torch.equal(stored[f"{name}.rms_norm.weight"], linear.rms_norm.weight.detach().expand(linear.in_features))
    kept = torch.float32
    assert stored["model.embed_tokens.weight"].dtype == kept
    assert stored["model.norm.weight"].dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_eps_of_the_inserted_norms_is_told(tmp_path: Path) -> None:
    """rms_norm_eps is that of the surgery, also where it matters."""
    model, plan = made("llama", eps=0.3)
    write(model, plan, tmp_path / "model")
    assert read(tmp_path / "model" / "config.json")["quantization_config"]["rms_norm_eps"] == 0.3
    agrees(model, stock(tmp_path / "model"))
    agrees(model, load(tmp_path / "model").model)


def test_odd_widths_are_packed(tmp_path: Path) -> None:
    """Output rows that are no multiple of four: packed, with the linear named; asked-for bitlinear is refused."""
    model, plan = made("llama", settings={"intermediate_size": 50})
    written = write(model, plan, tmp_path / "model")
    assert written.form == "packed"
    assert "multiple of 4, model.layers.0.mlp.gate_proj has 50" in written.reason
    agrees(model, load(tmp_path / "model").model)


def test_dense_is_refused_where_it_would_lie(tmp_path: Path) -> None:
    """A model with int8 activations or norms cannot be asked for as dense."""
    model, plan = made("llama", placement="none")
    with pytest.raises(ConfigError, match="--model-format dense"):
        write(model, plan, tmp_path / "model", "dense")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_latent_is_trainable_and_the_same_function(family: str, tied: bool, tmp_path: Path) -> None:
    """latent/ loads as the same trainable model: equal logits, equal gradients, every parameter trainable, tied once."""
    cover = "projections" if family in SCALED_EMBEDDING else "+embeddings"
    model, plan = made(family, tied=tied, cover=cover, gain="scalar")
    hf.write_latent(model, plan, TOKENIZER, tmp_path / "latent")
    loaded = load(tmp_path / "latent")
    assert (loaded.form, loaded.plan) == ("latent", plan)
    ours, theirs = dict(model.named_parameters()), dict(loaded.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and theirs[name].requires_grad for name in ours)
    batch = PROBE[:2, :33]
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    for each in (model, loaded.model):
        F.cross_entropy(each(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    for name, parameter in theirs.items():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, ours[name].grad), name
    assert (loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight) == tied
    with pytest.raises(ModelError, match="ternary already"):
        find_roles(loaded.model)


@pytest.mark.parametrize("tied", [False, True])
def test_full_precision_is_an_ordinary_checkpoint(tied: bool, tmp_path: Path) -> None:
    """A model without surgery is written so that stock transformers and trilobit.load have its logits bit for bit."""
    model = build("qwen3", tied=tied, max_position_embeddings=WIDTH)
    written = hf.write_full_precision(model, TOKENIZER, tmp_path / "model", PROBE)
    assert written.agreement.top1 == 1
    for other in (stock(tmp_path / "model"), load(tmp_path / "model").model):
        assert torch.equal(logits(other, PROBE[:2, :-1]), logits(model, PROBE[:2, :-1]))


def test_a_temperature_without_sampling_is_kept(tmp_path: Path) -> None:
    """A generation_config that transformers reads but refuses to save, as published checkpoints have, is written as it is."""
    model = build("llama")
    model.generation_config.update(temperature=0.7, do_sample=False)
    with pytest.raises(ValueError, match="do_sample"):
        model.generation_config.save_pretrained(tmp_path)
    hf.write_latent(model, None, TOKENIZER, tmp_path / "latent")
    assert read(tmp_path / "latent" / "generation_config.json")["temperature"] == 0.7
    assert load(tmp_path / "latent").model.generation_config.temperature == 0.7


@pytest.mark.parametrize("form", ["autobitlinear", "packed", "latent"])
def test_all_end_tokens_come_back(form: str, tmp_path: Path) -> None:
    """End-of-text tokens that only generation_config.json names are read back (old code: config.json's alone)."""
    model, plan = made("llama")
    model.generation_config.eos_token_id = [5, 6]
    if form == "latent":
        hf.write_latent(model, plan, TOKENIZER, tmp_path / "model")
    else:
        write(model, plan, tmp_path / "model", form)
    assert load(tmp_path / "model").model.generation_config.eos_token_id == [5, 6]


@pytest.mark.parametrize("form", ["autobitlinear", "packed"])
def test_damage_after_writing_is_noticed(form: str, tmp_path: Path) -> None:
    """One flipped byte in the weights, or a manifest that is gone or garbled, and load refuses with the file's name."""
    model, plan = made("llama")
    write(model, plan, tmp_path / "model", form)
    weights = tmp_path / "model" / (PACKED_FILE if form == "packed" else "model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=rf"{weights.name} is missing or damaged"):
        load(tmp_path / "model")
    weights.write_bytes(whole)
    load(tmp_path / "model")
    manifest = tmp_path / "model" / "manifest.json"
    manifest.write_text("[]")
    with pytest.raises(ModelError, match=r"manifest\.json is damaged"):
        load(tmp_path / "model")
    manifest.unlink()
    with pytest.raises(ModelError, match=r"has no manifest\.json: it was not completely written"):
        load(tmp_path / "model")


def _inverted(content: dict[str, Any], form: str) -> None:
    for name in [n for n in content["tensors"] if n.endswith("weight_scale")]:
        content["tensors"][name] = content["tensors"][name].reciprocal()


def _raw_bias(content: dict[str, Any], form: str) -> None:
    for name in [n for n in content["tensors"] if n.endswith(".bias")]:
        scale = content["tensors"][name.removesuffix("bias") + "weight_scale"]
        content["tensors"][name] = content["tensors"][name] * (scale if form == "autobitlinear" else scale.reciprocal())


def _norms_at_one(content: dict[str, Any], form: str) -> None:
    for name in [n for n in content["tensors"] if n.endswith(".rms_norm.weight")]:
        content["tensors"][name] = torch.ones_like(content["tensors"][name])


def _norms_forgotten(content: dict[str, Any], form: str) -> None:
    for name in [n for n in content["tensors"] if n.endswith(".rms_norm.weight")]:
        del content["tensors"][name]
    content["quantization_config"]["use_rms_norm"] = False


def _shuffled(content: dict[str, Any], form: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    packed = content["tensors"][name]
    content["tensors"][name] = packed[torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))]


def _one_gain(content: dict[str, Any], form: str) -> None:
    name = "model.layers.0.self_attn.o_proj.rms_norm.weight"
    content["tensors"][name] = content["tensors"][name] * torch.linspace(0.3, 3, 32)


def _config(**values: Any):
    def change(content: dict[str, Any], form: str) -> None:
        content["quantization_config"] |= values

    return change


FAULTS = {
    "weight_scale inverted": _inverted,
    "bias not divided": _raw_bias,
    "norms at one": _norms_at_one,
    "norms forgotten": _norms_forgotten,
    "one layer's codes shuffled": _shuffled,
    "one gain wrong": _one_gain,
    "config forgets use_rms_norm": _config(use_rms_norm=False),
    "config has another eps": _config(rms_norm_eps=3.0),
    "config converts the head": _config(modules_to_not_convert=["nothing"]),
}


def tampered(patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any], str, str], None]) -> None:
    """A writer whose tensors and configuration `change` alters; it is told the form and the precision."""
    right = hf.contents_of

    def wrong(source: Source, form: str, store: forms.Store) -> forms.Contents:
        contents = right(source, form, store)
        stored = {entry.name: entry.read().detach().to(entry.dtype).clone() for entry in contents.entries}
        content = {"tensors": stored, "quantization_config": contents.quantization}
        change(content, form, store)
        entries = [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in content["tensors"].items()]
        return forms.Contents(entries, contents.dtype, content["quantization_config"], contents.card)

    patch.setattr(hf, "contents_of", wrong)


@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that gets scale, bias, norms, codes or configuration wrong leaves nothing behind, and says so. The last
    three only the stock reader can see."""
    if fault == "bias not divided" and form == "bitlinear":
        pytest.skip("bitlinear does not divide its bias")
    tampered(monkeypatch, lambda content, form, store: FAULTS[fault](content, form))
    model, plan = made("qwen2")
    expected = ModelError if fault == "norms forgotten" else VerificationError
    with pytest.raises(expected):
        write(model, plan, tmp_path / "model", form, windows=4)
    assert not any(tmp_path.iterdir())


def test_swapped_class_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two classes mean opposite things by weight_scale: naming the other one is caught."""
    tampered(monkeypatch, lambda content, form, store: content["quantization_config"].update(linear_class="bitlinear"))
    model, plan = made("llama")
    with pytest.raises(VerificationError, match="transformers' reading of the autobitlinear form differs"):
        write(model, plan, tmp_path / "model", "autobitlinear")
    assert not any(tmp_path.iterdir())


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier model/ survives a later write that fails its verification."""
    model, plan = made("llama")
    write(model, plan, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def triple(content: dict[str, Any], form: str, store: str) -> None:
        content["tensors"]["model.layers.0.mlp.down_proj.scale"] *= 3

    tampered(monkeypatch, triple)
    with pytest.raises(VerificationError, match="trilobit's reading of the packed form differs"):
        write(model, plan, tmp_path / "model", "packed")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bf16_that_changes_too_much_is_stored_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 embeddings fail the verification the writer takes fp32, says so, and the directory is right."""

    def coarse(content: dict[str, Any], form: str, store: str) -> None:
        if store == "bf16":
            content["tensors"]["model.embed_tokens.weight"].sign_()

    tampered(monkeypatch, coarse)
    model, plan = made("llama", placement="none", activations="none")
    written = write(model, plan, tmp_path / "model", store="bf16")
    assert "stored in fp32" in written.reason
    assert tensors(tmp_path / "model")["model.embed_tokens.weight"].dtype == torch.float32
    agrees(model, stock(tmp_path / "model"))


def test_a_form_that_transformers_reads_differently_gives_way_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is not lost where stock software would read its model differently: it is stored packed, and the reason says why."""
    right = hf.load_stock

    def other(directory: Path) -> PreTrainedModel:
        model = right(directory)
        model.model.norm.weight.data.neg_()
        return model

    monkeypatch.setattr(hf, "load_stock", other)
    model, plan = made("llama")
    written = write(model, plan, tmp_path / "model")
    assert written.form == "packed"
    assert "transformers' reading" in written.reason
    assert not (tmp_path / "model" / "model.safetensors").exists()
    agrees(model, load(tmp_path / "model").model)
    with pytest.raises(VerificationError):
        write(model, plan, tmp_path / "asked", "autobitlinear")
    assert not (tmp_path / "asked").exists()


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    """A file where the folder should be is the user's to mend."""
    (tmp_path / "file").write_text("")
    model, plan = made("llama")
    with pytest.raises(OutputError, match="cannot write"):
        write(model, plan, tmp_path / "file" / "model")


def test_a_disk_that_is_full_for_the_tokenizer_is_an_output_error(tmp_path: Path) -> None:
    """The tokenizers library raises a plain Exception when the disk is full: the user's to mend, nothing left (old code: a
    traceback)."""

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    model, plan = made("llama")
    with pytest.raises(OutputError, match=r"cannot write the tokenizer .* No space left on device"):
        hf.write_latent(model, plan, Full(), tmp_path / "latent")
    assert list(tmp_path.iterdir()) == []


def test_compare_measures_what_it_says() -> None:
    """Of a model with itself: all argmax equal, no difference, ratio one, exactly the positions asked for; of another
    seed's: far outside the limits; and NaN logits are outside too."""
    model, other = build("llama", max_position_embeddings=WIDTH), build("llama", seed=1, max_position_embeddings=WIDTH)
    same = compare(model, model, PROBE, 300)
    assert (same.positions, same.top1, same.mean_difference, same.kl, same.perplexity_ratio) == (300, 1, 0, 0, 1)
    same.require("itself")
    with pytest.raises(VerificationError, match="another differs from the trained model"):
        compare(model, other, PROBE, 300).require("another")
    with torch.no_grad():
        other.lm_head.weight.fill_(float("nan"))
    with pytest.raises(VerificationError):
        compare(model, other, PROBE, 300).require("NaN")
    top1, ratio = agreement(model, build("llama", seed=1, max_position_embeddings=WIDTH))
    assert top1 < MIN_TOP1
    assert abs(ratio - 1) > MAX_PERPLEXITY_CHANGE


def test_a_model_is_held_to_its_own_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the limits fail, a reading as near as the model is to itself (its embeddings shaken in their last bits) is
    accepted and the floor is noted; one whose scales are 30 % off is not, nor one whose head is shifted, and nothing is left.
    (Old code: SmolLM2's stock form was refused, because int8 flips alone change 8 % of its argmax.)"""
    monkeypatch.setattr(verify, "MIN_TOP1", 1.1)  # stands in for a model deep enough for flips to breed
    model, plan = made("llama")
    monkeypatch.setattr(verify, "LAST_BITS", 1e-3)  # and this for what they then amount to
    written = write(model, plan, tmp_path / "model", "autobitlinear")
    assert written.form == "autobitlinear"
    assert written.agreement is not None
    assert written.agreement.floor_top1 is not None
    assert "embeddings changed in their last bits" in written.reason
    floor = noise_floor(model, PROBE)
    assert 0 < floor.kl < 0.1
    for damage in ("scale", "head"):
        other = load(tmp_path / "model").model
        with torch.no_grad():
            if damage == "scale":
                for module in other.modules():
                    if isinstance(module, PackedLinear):
                        module.scale *= 1.3
            else:
                other.lm_head.weight += 0.1 * other.lm_head.weight.roll(1, 0)
        found = compare(model, other, PROBE)
        with pytest.raises(VerificationError, match="the model's own noise"):
            found.require(damage, lambda: floor)
        assert found.kl > 3 * floor.kl


def test_shaking_is_small_and_always_the_same() -> None:
    """The noise floor changes embeddings by one part in four million, alike at every call, and leaves no hook behind."""
    model = build("llama", max_position_embeddings=WIDTH)
    ids = PROBE[:2, :-1]
    plain = model.get_input_embeddings()(ids)
    with shaken(model) as other:
        once, twice = other.get_input_embeddings()(ids), other.get_input_embeddings()(ids)
    assert torch.equal(once, twice)
    assert not torch.equal(once, plain)
    assert ((once - plain).abs() <= 2.0**-21 * plain.abs()).all()
    assert torch.equal(model.get_input_embeddings()(ids), plain)
