"""Models of others, tensor by tensor: what is read is what load() reads, and every export takes them where its format can."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM

from export.ggufs import stored
from families import build, logits
from infer.bitnets import BITNET, FORMS, write_bitnet
from infer.checkpoints import byte_tokenizer, save
from infer.ggufs import MERGES, VOCABULARY, write_gguf
from infer.test_foreign import CASES
from trilobit import quant
from trilobit.config.export import ExportConfig
from trilobit.errors import ExportError, ModelError
from trilobit.export import convert, gguf, gguf_graph, llama_cpp
from trilobit.export.check import Check, activations
from trilobit.export.foreign import BitnetSource, GgufSource, open_source
from trilobit.export.source import Source, StoredSource
from trilobit.export.verify import compare, load_stock
from trilobit.infer.foreign import sites_of
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded
from trilobit.infer.stored import freeze
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.surgery.roles import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # transformers' bitnet classes
GGUFS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "q2_0", {}),
    ("llama", "tq1_0", {"granule": 0, "ends": "tq2_0"}),
    ("llama", "q2_0-128", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", "tq2_0", {}),
    ("qwen3", "q2_0", {"ends": "q2_0", "tie_word_embeddings": True}),
    ("gemma3", "q2_0", {"ends": "q8_0"}),
    ("bitnet", "tq2_0", {"granule": 0}),
    ("bitnet", "q2_0", {"hidden_act": "relu2", "ends": "f16"}),
    ("qwen2", "f16", {}),
]  # fmt: skip
SILU = {"tied": True, "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": VOCABULARY}  # fmt: skip


def windows(count: int = 1, length: int = 33) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def require_same(source: Source, loaded: Loaded) -> None:
    """Structure, codes, scales, biases, gains and everything else of a source, bit for bit."""
    model = freeze(loaded.model)
    assert source.plan == loaded.plan
    assert all(parameter.is_meta for parameter in source.model.parameters())
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    assert source.ternary.keys() == packed.keys()
    for path, theirs in packed.items():
        ours = source.packed(path)
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale), path
        assert ours.granularity == theirs.granularity
        if isinstance(theirs, PackedLinear):
            assert isinstance(ours, PackedLinear) and ours.int8_activations == theirs.int8_activations
            assert source.has_bias(path) == (theirs.bias is not None)
            assert theirs.bias is None or torch.equal(ours.bias, theirs.bias)  # pyright: ignore[reportArgumentType]
            assert theirs.rms_norm is None or torch.equal(source.gain(path), theirs.rms_norm.weight)
    kept = {n: p for n, p in model.named_parameters() if not any(n.startswith(f"{path}.") for path in packed)}
    assert sorted(source.kept_names) == sorted(kept)
    assert all(torch.equal(source.kept(name), parameter) for name, parameter in kept.items())
    assert source.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_bitnet_directories(form: str, family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Both classes and latents, norms, biases, tied heads and modules left out: what load() has, without its storage."""
    place = write_bitnet(tmp_path / "model", form, family, **settings)
    source = open_source(place)
    assert isinstance(source, BitnetSource)
    require_same(source, load(place))


@pytest.mark.parametrize(("architecture", "kind", "settings"), GGUFS)
def test_gguf_files(architecture: str, kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Every graph and type, ternary ends, biases, and a file that is not ternary: what load() has, without its storage."""
    place = write_gguf(tmp_path / "m.gguf", architecture, kind, **settings).path
    source = open_source(place)
    assert isinstance(source, GgufSource)
    require_same(source, load(place))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "bitnet", "olmo2", "phi3", "smollm3"])
def test_roles_are_found_without_the_weights(family: str) -> None:
    """The sites of one layer with random weights, repeated, are those that watching the whole model finds."""
    model = build(family)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    state = torch.get_rng_state()
    found = {(s.path, s.layer, s.role, s.norm) for s in sites_of(empty)}
    assert torch.equal(torch.get_rng_state(), state)
    assert found == {(s.path, s.layer, s.role, s.norm) for s in find_sites(model)}


def test_ours_and_ordinary_ones_are_what_they_were(tmp_path: Path) -> None:
    """An ordinary checkpoint is no BitnetSource, a missing file and folder are named."""
    assert type(open_source(save(tmp_path / "model"))) is StoredSource
    for place in (tmp_path / "no.gguf", tmp_path / "nothing"):
        with pytest.raises(ModelError, match=place.name):
            open_source(place)


def exported(place: Path, out: Path, to: str, **settings: Any) -> convert.ExportResult:
    return convert.run(ExportConfig(model=str(place), out=str(out), to=to, **settings))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "verify", lambda *arguments: Check(why_not="a test"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("form", "other"), [("autobitlinear", "bitlinear"), ("bitlinear", "autobitlinear")])
@pytest.mark.parametrize(("family", "settings"), [("bitnet", BITNET), ("llama", {"norms": True, "mlp_bias": True})])
def test_from_one_convention_to_the_other(
    family: str, settings: dict[str, Any], form: str, other: str, tmp_path: Path
) -> None:  # fmt: skip
    """A directory of one class is written as the other, and stock transformers computes the same from both."""
    place = write_bitnet(tmp_path / "model", form, family, **settings)
    result = exported(place, tmp_path / "out", "hf", form=other)
    assert result.form == other
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["linear_class"] == other
    agreement = compare(load(place).model, load_stock(tmp_path / "out"), windows(4, 65).clamp_max(250))
    assert agreement.top1 >= 0.985
    assert agreement.kl < 1e-4


@pytest.mark.usefixtures("unchecked")
def test_gguf_to_hf(tmp_path: Path) -> None:
    """A bitnet file becomes a `bitnet` directory, with its codes; a weights-only one an ordinary checkpoint of code · scale."""
    place = write_gguf(tmp_path / "b.gguf", "bitnet", "tq2_0", granule=0).path
    assert exported(place, tmp_path / "b", "hf").form == "autobitlinear"
    ours, theirs = load(tmp_path / "b").model, load(place).model
    assert torch.equal(logits(ours, windows()), logits(theirs, windows()))
    assert compare(theirs, load_stock(tmp_path / "b"), windows(4)).kl < 1e-4
    place = write_gguf(tmp_path / "l.gguf", "llama", "q2_0").path
    assert "an ordinary checkpoint of code · scale" in exported(place, tmp_path / "l", "hf").form
    assert compare(load(place).model, load_stock(tmp_path / "l"), windows(4)).kl < 1e-3


@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
@pytest.mark.parametrize(
    ("graph", "form", "family", "settings"),
    [
        ("bitnet", "bitlinear", "bitnet", SILU),
        ("bitnet", "online", "bitnet", SILU),
        ("llama", "autobitlinear", "llama", {**SILU, "tied": False}),
        ("llama", "autobitlinear", "llama", {**SILU, "skip": ["lm_head", "model.layers.1.mlp.down_proj"]}),
        ("qwen2", "bitlinear", "qwen2", SILU),
    ],
)
def test_bitnet_directories_run_in_llama_cpp(
    graph: str, form: str, family: str, settings: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    """Written in full, stock llama.cpp's next tokens are the model's without quantised activations; packed, its codes are."""
    place = write_bitnet(tmp_path / "model", form, family, **settings)
    _with_tokenizer(place)
    contents = gguf.write(open_source(place), tmp_path / "m.gguf", "f32", "f32")
    assert contents.graph == graph
    read = llama_cpp.read(tmp_path / "m.gguf", windows(), [], "", top=VOCABULARY - 2, threads=1)
    loaded = load(place)
    freeze(loaded.model)
    with activations(loaded.model, False) as model:
        agreement = llama_cpp.compare_reading(model, read, windows())
    assert agreement.top1 > 0.96
    assert agreement.kl < 1e-4
    gguf.write(open_source(place), tmp_path / "t.gguf", "tq2_0")
    source, again = open_source(place), open_source(tmp_path / "t.gguf")
    for path in again.ternary:
        assert torch.equal(source.packed(path).codes, again.packed(path).codes)
        assert torch.equal(source.packed(path).scale.half().float(), again.packed(path).scale)


def _with_tokenizer(place: Path) -> None:
    """One that llama.cpp has a name for, in place of that of bytes."""
    tokenizer: Any = byte_tokenizer(merges=MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(place)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "q2_0"])
@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("llama", {"scale": "row", "settings": {"tie_word_embeddings": True}}),
        ("qwen2", {"scale": "group-256", "activations": "none"}),  # biases
        ("qwen3", {"settings": {"head_dim": 64}, "cover": "+embeddings", "activations": "none"}),  # q/k norms
        ("gemma3_text", {"activations": "none"}),
    ],
)
def test_what_was_written_as_gguf_is_read_bit_for_bit(kind: str, family: str, model: dict[str, Any], tmp_path: Path) -> None:
    """Codes, scales to fp16, biases, block norms, q/k norms: through a file of every ternary type they stay as they were,
    though `llama` has its rows in another order and `gemma3` its norms plus one."""
    source = open_source(stored(tmp_path / "model", family, placement="none", **model))
    gguf.write(source, tmp_path / "m.gguf", kind, "f32")
    again = open_source(tmp_path / "m.gguf")
    assert again.ternary.keys() == source.ternary.keys()
    for path in source.ternary:
        ours, theirs = again.packed(path), source.packed(path)
        assert torch.equal(ours.codes, theirs.codes), path
        width = ours.codes.shape[1]
        spread = (quant.spread_scale(p.scale, width, p.granularity).expand(ours.codes.shape) for p in (ours, theirs))
        here, there = (scale[theirs.codes != 0] for scale in spread)
        assert torch.equal(here, there.half().float()), path
        bias = getattr(theirs, "bias", None)
        assert bias is None or torch.equal(ours.bias, bias)  # pyright: ignore
    assert sorted(again.kept_names) == sorted(source.kept_names)
    for name in source.kept_names:
        plus = 1 if family == "gemma3_text" and name.endswith("norm.weight") else 0
        assert torch.equal(again.kept(name), source.kept(name) + plus - plus), name


@pytest.mark.usefixtures("unchecked")
def test_blocks_of_128_become_llama_cpps(tmp_path: Path) -> None:
    """A file with PrismML's blocks of 128 columns comes out in the 64 that stock llama.cpp reads: codes and scales stay."""
    place = write_gguf(tmp_path / "m.gguf", "qwen3", "q2_0-128").path
    result = exported(place, tmp_path / "out", "gguf")
    assert result.form == "graph qwen3, type q2_0"
    source, again = open_source(place), open_source(tmp_path / "out" / "out.gguf")
    assert source.plan is not None and source.plan.spec.scale == "group-128"
    for path in source.plan.linears:
        ours, theirs = again.packed(path), source.packed(path)
        assert torch.equal(ours.codes, theirs.codes)
        used = theirs.codes.unflatten(1, (-1, 64)).any(dim=2)
        assert torch.equal(ours.scale[used], theirs.scale.repeat_interleave(2, dim=1)[used])


@pytest.mark.parametrize(
    ("make", "to", "says"),
    [
        (lambda f: write_bitnet(f, "bitlinear", "bitnet", **BITNET), "gguf", "silu, whatever a file says.*gate is relu2.*--to"),
        (lambda f: write_bitnet(f, "bitlinear", "bitnet", **{**SILU, "tied": False}), "gguf", "its head is the embedding"),
        (lambda f: write_bitnet(f, "bitlinear", "bitnet", **SILU, attention_bias=True), "gguf", "it has no biases"),
        (lambda f: write_bitnet(f, "bitlinear", "llama", **SILU, norms=True), "gguf", "gain per channel"),
        (lambda f: write_bitnet(f, "bitlinear", "olmo2"), "gguf", "no llama.cpp graph is known here for Olmo2"),
        (lambda f: write_bitnet(f, "bitlinear", "llama", norms=True), "bf16", "no norm in front of"),
        (lambda f: write_gguf(f.with_suffix(".gguf"), "bitnet", "tq2_0", hidden_act="relu2").path, "gguf", "gate is relu2"),
        (lambda f: write_gguf(f.with_suffix(".gguf"), "llama", "q2_0").path, "hf", "--form bitlinear cannot hold"),
    ],
)  # fmt: skip
def test_what_the_target_cannot_hold_is_refused(make: Any, to: str, says: str, tmp_path: Path) -> None:
    """Each refusal comes before anything is written, and says why: relu² too, which llama.cpp would run as silu."""
    place = make(tmp_path / "model")
    settings = {"form": "bitlinear"} if to == "hf" else {}
    with pytest.raises(ExportError, match=says):
        exported(place, tmp_path / "out", to, **settings)
    assert [p.name for p in tmp_path.iterdir()] == [place.name]


@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_llama_cpp_runs_relu2_as_silu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is refused: with the refusal away, a relu² file that names its gate is read as the same model with silu."""
    place = write_bitnet(tmp_path / "model", "autobitlinear", "bitnet", **{**SILU, "hidden_act": "relu2"})
    _with_tokenizer(place)
    monkeypatch.setattr(gguf_graph, "_unlike_its_graph", lambda *_: None)
    metadata = gguf._metadata
    monkeypatch.setattr(gguf, "_metadata", lambda *a: metadata(*a) | {"bitnet.hidden_activation": "relu2"})
    gguf.write(open_source(place), tmp_path / "m.gguf", "f32", "f32")
    read = llama_cpp.read(tmp_path / "m.gguf", windows(), [], "", top=VOCABULARY - 2, threads=1)
    found = {}
    for gate in ("relu2", "silu"):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "hidden_act": gate}))
        with activations(load(place).model, False) as model:
            found[gate] = llama_cpp.compare_reading(model, read, windows()).kl
    assert found["silu"] < 1e-4
    assert found["relu2"] > 100 * found["silu"]
