"""`--to native` writes, a matrix at a time, the file that compiling the whole model in memory gives, byte for byte."""

from pathlib import Path
from typing import Any

import pytest
import torch

from export.test_hf import TOKENIZER, made
from infer.bitnets import BITNET, write_bitnet
from infer.ggufs import write_gguf
from trilobit.errors import ModelError
from trilobit.export import hf, native
from trilobit.export.foreign import open_source
from trilobit.export.source import Source, StoredSource
from trilobit.infer import compiler, native_file
from trilobit.infer.load import load
from trilobit.infer.stored import freeze
from trilobit.kernels import native as kernels
from trilobit.storage import atomic_directory

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="no C++ compiler has built the kernels"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),  # transformers' bitnet classes
]
LAYOUTS: list[Any] = ["two-bit", "base-3"]
WEIGHTS_ONLY = {"placement": "none", "activations": "none"}
OURS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "latents": ("latent", "llama", {"placement": "every"}),
    "latents, tied": ("latent", "llama", {"placement": "every", "gain": "scalar", "tied": True}),
    "latents of rows": ("latent", "qwen3", {"placement": "output", "scale": "row"}),
    "latents of groups": ("latent", "qwen2", {**WEIGHTS_ONLY, "scale": "group-64", "tied": True}),
    "latents with a dead zone": ("latent", "llama", {"dead_zone_bias": 1e-3}),
    "latents with learned ranges": ("latent", "llama", {"scale": "row", "learned_ranges": True}),
    "ternary throughout, tied": ("latent", "llama", {"cover": "+embeddings", "tied": True, "dead_zone_bias": 1e-3}),
    "packed": ("packed", "smollm3", {"scale": "group-128"}),
    "packed in bf16": ("packed-bf16", "llama", {"placement": "output"}),
    "packed, a window": ("packed", "mistral", {"settings": {"sliding_window": 7, "intermediate_size": 150}}),
    "packed, ternary throughout": ("packed", "llama", {"cover": "+embeddings", "tied": True, "dead_zone_bias": 1e-3}),
    "packed, a ternary head": ("packed", "qwen2", {**WEIGHTS_ONLY, "cover": "+lm_head"}),
    "autobitlinear": ("autobitlinear", "qwen2", {"placement": "every"}),
    "autobitlinear, gains moved": ("autobitlinear", "llama", {"placement": "output"}),
    "bitlinear, scalar gains": ("bitlinear", "qwen2", {"placement": "every", "gain": "scalar"}),
}


def ours(folder: Path, form: str, family: str, spec: dict[str, Any]) -> Path:
    """A directory in one of our forms, unchecked."""
    model, plan = made(family, **spec)
    if form == "latent":
        hf.write_latent(model, plan, TOKENIZER, folder)
        return folder
    with atomic_directory(folder) as directory:
        hf.write_form(Source(model, plan, TOKENIZER), directory, form.removesuffix("-bf16"), "bf16" if "-" in form else "fp32")
    return folder


def in_memory(place: Path, layout: Any, file: Path) -> bytes:
    """The oracle: the whole model loaded, frozen, compiled and written."""
    native_file.write(compiler.compile(freeze(load(place).model), layout), file)
    return file.read_bytes()


def streamed(source: Source, layout: str, folder: Path) -> bytes:
    folder.mkdir()
    native.write(source, folder, layout)
    return (folder / native_file.NAME).read_bytes()


def require_equal(place: Path, folder: Path) -> None:
    for layout in LAYOUTS:
        source = open_source(place, as_stored=True)
        assert streamed(source, layout, folder / layout) == in_memory(place, layout, folder / f"{layout}.safetensors"), layout
        assert all(parameter.is_meta for parameter in source.model.parameters())  # nothing of it was kept


@pytest.mark.parametrize("case", OURS)
def test_of_what_trilobit_wrote(case: str, tmp_path: Path) -> None:
    """Every form, family, granule and cover: the bytes are those of the model in memory, whose parameters stay on disk here."""
    require_equal(ours(tmp_path / "model", *OURS[case]), tmp_path)


@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "online"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bitnet", BITNET),
        ("llama", {"norms": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "dtype": torch.bfloat16}),
        ("llama", {"skip": ["nothing"], "vocab_size": 260}),  # a ternary head
    ],
)
def test_of_bitnet_directories_of_others(family: str, settings: dict[str, Any], form: str, tmp_path: Path) -> None:
    """transformers' `bitnet` directories, of both classes and with latents: the same bytes."""
    require_equal(write_bitnet(tmp_path / "model", form, family, **settings), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "kind", "settings"),
    [
        ("llama", "q2_0", {}),
        ("qwen2", "tq2_0", {}),
        ("qwen3", "q2_0-128", {"ends": "q2_0-128", "tie_word_embeddings": True}),
        ("bitnet", "tq1_0", {"granule": 0}),
    ],
)
def test_of_gguf_files(architecture: str, kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """GGUF files of each graph the engine has: the same bytes."""
    require_equal(write_gguf(tmp_path / "m.gguf", architecture, kind, **settings).path, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen3", {"scale": "row", "tied": True, "settings": {"intermediate_size": 150}}),  # q/k norms
        ("qwen2", {"placement": "output", "scale": "group-64"}),  # biases
        ("llama", {"cover": "+embeddings", "settings": {"attention_bias": True, "mlp_bias": True}}),
    ],
)
def test_codes_scales_biases_and_norms_come_back(family: str, spec: dict[str, Any], layout: Any, tmp_path: Path) -> None:
    """What is read from the file is what was stored, bit for bit, whatever its layout: codes, scales, biases, gains, norms."""
    source = StoredSource(ours(tmp_path / "model", "latent", family, spec))
    streamed(source, layout, tmp_path / "out")
    graph = native_file.read(tmp_path / "out" / native_file.NAME)
    places = {f"layers.{i}.{n}": f"model.layers.{i}.{p}" for i in range(2) for n, p in compiler.MODULES.items()}
    if spec.get("cover"):
        places |= {"embedding": source.embedding_path, "head": source.head_path}
    for name, path in places.items():
        packed = source.packed(path)
        matrix = kernels.PackedMatrix(graph.tensors[f"{name}.codes"], *packed.codes.shape, graph.header.group, layout)
        assert torch.equal(kernels.unpack(matrix), packed.codes), name
        assert torch.equal(graph.tensors[f"{name}.scales"], packed.scale.T if graph.header.group else packed.scale[:, 0]), name
        bias = getattr(packed, "bias", None)
        assert (f"{name}.bias" in graph.tensors) == (bias is not None) and (
            bias is None or torch.equal(graph.tensors[f"{name}.bias"], bias)
        )
        if source.plan is not None and path in source.plan.linears and source.plan.linears[path].normed:
            assert torch.equal(graph.tensors[f"{name}.gain"], source.gain(path)), name
    if family == "qwen3":
        assert torch.equal(graph.tensors["layers.1.k_norm"], source.kept("model.layers.1.self_attn.k_norm.weight"))
    assert torch.equal(graph.tensors["layers.1.mlp_norm"], source.kept("model.layers.1.post_attention_layernorm.weight"))


def test_each_module_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is frozen once for its codes, scales and bias together, though they lie far apart in the file."""
    source = StoredSource(ours(tmp_path / "model", "latent", "qwen2", {"placement": "every"}))
    seen: list[str] = []
    right = StoredSource._freeze
    monkeypatch.setattr(StoredSource, "_freeze", lambda self, path: (seen.append(path), right(self, path))[1])
    streamed(source, "two-bit", tmp_path / "out")
    assert sorted(seen) == sorted(source.ternary)


def test_codes_times_scales_are_native_too(tmp_path: Path) -> None:
    """An ordinary checkpoint of code · scale is read as the codes and scales it was made from (old code: refused, because
    transformers sees no ternary modules in it)."""
    model, plan = made("llama", **WEIGHTS_ONLY, scale="row")
    hf.write_latent(model, plan, TOKENIZER, tmp_path / "latent")
    with atomic_directory(tmp_path / "dense") as directory:
        hf.write_form(Source(model, plan, TOKENIZER), directory, "dense", "fp32")
    dense, latent = (streamed(StoredSource(tmp_path / n), "two-bit", tmp_path / f"of {n}") for n in ("dense", "latent"))
    assert dense == latent


def test_gains_are_where_they_were_or_where_they_are_stored(tmp_path: Path) -> None:
    """A directory whose block gains were moved is read either way; the engine's file keeps what load() sees."""
    place = ours(tmp_path / "model", "autobitlinear", "llama", {"placement": "output"})
    moved, back = StoredSource(place, as_stored=True), StoredSource(place)
    q = "model.layers.0.self_attn.q_proj"
    assert (moved.kind(q), back.kind(q)) != (None, None)
    assert moved.kind(q).eps is not None and back.kind(q).eps is None  # pyright: ignore[reportOptionalMemberAccess]
    assert moved.kept("model.layers.0.input_layernorm.weight").max() < 1e-5
    assert back.kept("model.layers.0.input_layernorm.weight").max() > 0.1


def test_a_scale_that_fp16_does_not_have(tmp_path: Path) -> None:
    """What is found out when a tensor's turn comes is the same refusal as before: no file is taken for whole."""
    model, plan = made("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = 1e9  # pyright: ignore
    hf.write_latent(model, plan, TOKENIZER, tmp_path / "model")
    with pytest.raises(ModelError, match="fp16 holds no scale"):
        streamed(StoredSource(tmp_path / "model"), "two-bit", tmp_path / "out")
