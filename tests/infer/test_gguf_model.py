"""GGUF files of five architectures: the weights that were written, bit by bit, and transformers' logits with them."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checks import check_here
from families import logits
from infer.checkpoints import byte_tokenizer
from infer.ggufs import MERGES, VOCABULARY, write_gguf
from trilobit import quant
from trilobit.config.export import ExportConfig
from trilobit.errors import ModelError
from trilobit.export import convert as export
from trilobit.export.verify import compare, noise_floor
from trilobit.infer.load import load, load_pretrained
from trilobit.kernels import native
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import ternary_modules
from trilobit.storage import write_json

PROJECTIONS, EMBEDDINGS = "projections", "+embeddings"
CASES: list[tuple[str, str, dict[str, Any], str, str]] = [  # architecture, type, settings, scale per, cover
    ("llama", "q2_0", {}, "group-64", PROJECTIONS),
    ("llama", "tq1_0", {"tie_word_embeddings": True}, "group-256", PROJECTIONS),
    ("llama", "tq2_0", {"attention_bias": True, "mlp_bias": True}, "group-256", PROJECTIONS),
    ("llama", "q2_0", {"granule": 0}, "tensor", PROJECTIONS),
    ("qwen2", "q2_0", {"ends": "q8_0"}, "group-64", PROJECTIONS),
    ("qwen2", "q2_0-128", {"ends": "q2_0-128"}, "group-128", EMBEDDINGS),
    ("qwen3", "q2_0-128", {"ends": "q2_0-128"}, "group-128", EMBEDDINGS),  # Ternary Bonsai's class
    ("qwen3", "tq2_0", {"ends": "q2_0", "head_dim": 64}, "group-64", EMBEDDINGS),
    ("gemma3", "q2_0", {"tie_word_embeddings": True, "ends": "q2_0"}, "group-64", PROJECTIONS),
]


def windows(count: int = 16, length: int = 64) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length + 1), generator=torch.Generator().manual_seed(5))


def alike(model: Any, other: Any) -> bool:
    """Logits to a few last bits: equal matrices at other addresses are summed in another order."""
    a, b = (logits(side, windows()[:2]) for side in (model, other))
    return (a - b).abs().max().item() <= 2e-5 * b.abs().max().item()


@pytest.mark.parametrize(("architecture", "kind", "settings", "scale", "cover"), CASES, ids=lambda v: str(v)[:30])
def test_it_is_the_model_that_was_written(
    tmp_path: Path, architecture: str, kind: str, settings: dict[str, Any], scale: str, cover: str
) -> None:
    """Weights-only files: the same weights, frozen and trainable, bit by bit, and transformers' logits with them."""
    written = write_gguf(tmp_path / "model.gguf", architecture, kind, **settings)
    loaded = load(written.path)
    assert loaded.plan is not None
    assert (loaded.form, loaded.plan.spec.scale, loaded.plan.spec.cover) == ("gguf", scale, cover)
    assert loaded.plan.spec.activations == "none"
    assert len(loaded.plan.linears) == 7 * written.model.config.num_hidden_layers
    assert not any(p.requires_grad for p in loaded.model.parameters())
    for path in loaded.plan.linears:
        frozen: Any = loaded.model.get_submodule(path)
        dense = quant.ternary_dequantize(frozen.codes, frozen.scale, frozen.granularity)
        assert torch.equal(dense, written.model.get_parameter(f"{path}.weight"))
    assert alike(loaded.model, written.model)
    trainable = load_pretrained(str(written.path), trainable=True)
    assert len(ternary_modules(trainable.model)) == 7 * written.model.config.num_hidden_layers + 2 * (cover == EMBEDDINGS)
    for path, module in ternary_modules(trainable.model):
        granularity: Any = loaded.plan.spec.scale
        weight = quant.ternary_quantize(module.weight, granularity)  # pyright: ignore
        assert torch.equal(weight, written.model.get_submodule(path).weight)  # pyright: ignore
    assert alike(trainable.model, written.model)
    assert all(p.requires_grad for p in trainable.model.parameters())


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "q2_0"])
def test_bitnet_has_int8_activations(tmp_path: Path, kind: str) -> None:
    """The `bitnet` graph, one scale a matrix, is the int8 definition: dense weights behind the activation quantiser, within
    that model's own noise."""
    written = write_gguf(tmp_path / "model.gguf", "bitnet", kind, granule=0, ends="f16", hidden_act="relu2")
    loaded = load(written.path)
    assert loaded.plan is not None
    assert (loaded.plan.spec.scale, loaded.plan.spec.activations) == ("tensor", "int8")
    assert loaded.model.config.hidden_act == "relu2"
    for path in loaded.plan.linears:
        module = written.model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, inputs: (quant.int8_quantize(inputs[0]),))
        weight = module.weight
        frozen: Any = loaded.model.get_submodule(path)
        assert torch.equal(quant.ternary_dequantize(frozen.codes, frozen.scale), weight)  # pyright: ignore
    agreement = compare(written.model, loaded.model, windows())
    agreement = agreement.require("our reading", lambda: noise_floor(written.model, windows()))
    assert agreement.top1 >= 0.985
    assert loaded.plan.linears["model.layers.0.self_attn.o_proj"].fed_by == "model.layers.0.self_attn.attn_sub_norm"


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_file_without_ternary_matrices_is_an_ordinary_model(tmp_path: Path, kind: str) -> None:
    """Dequantised by the gguf package where need be; no plan."""
    written = write_gguf(tmp_path / "model.gguf", "llama", kind)
    loaded = load(written.path)
    assert loaded.plan is None
    assert alike(loaded.model, written.model)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")
@pytest.mark.parametrize(("architecture", "kind", "granule"), [("bitnet", "tq2_0", 0), ("qwen3", "q2_0", None)])
def test_the_native_engine_runs_it(
    tmp_path: Path, architecture: str, kind: str, granule: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export FILE.gguf --to native` passes its own verification."""
    written = write_gguf(tmp_path / "model.gguf", architecture, kind, granule=granule)
    monkeypatch.setattr(export, "verify", check_here)
    result = export.run(ExportConfig(model=str(written.path), out=str(tmp_path / "native")))
    assert result.check.rows[0].agreement.kl < 0.01


def test_what_stands_beside_the_matrices_counts(tmp_path: Path) -> None:
    """`.scale` tensors multiply where a graph reads them, negative scales turn codes, and end tokens come from the metadata."""

    def change(writer: Any) -> None:
        import numpy as np

        writer.add_tensor("blk.1.ffn_up.scale", np.array([0.5], dtype=np.float32))
        writer.add_eot_token_id(5)

    written = write_gguf(tmp_path / "model.gguf", "llama", "q2_0", change=change)
    with torch.no_grad():
        written.model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(0.5)
    loaded = load(written.path)
    assert alike(loaded.model, written.model)
    assert loaded.model.generation_config is not None
    assert loaded.model.generation_config.eos_token_id == [2, 5]
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.scale is none that qwen2 graphs use"):
        load(write_gguf(tmp_path / "other.gguf", "qwen2", "q2_0", change=change).path)


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 32},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ({"type": "none"}, {"rope_type": "default"}),
    ],
)  # fmt: skip
def test_stretched_positions(tmp_path: Path, scaling: dict[str, Any], says: dict[str, Any]) -> None:
    """Linear and YaRN scaling, as transformers stretches positions."""

    def change(writer: Any) -> None:
        for key, value in scaling.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"qwen3.rope.scaling.{key}", value)

    settings = {"rope_parameters": {"rope_theta": 10_000.0, **says}}
    written = write_gguf(tmp_path / "model.gguf", "qwen3", "q2_0", change=change, **settings)
    assert alike(load(written.path).model, written.model)


def test_llama_3_positions(tmp_path: Path) -> None:
    """What each frequency is divided by, in a tensor, is recognised as Llama 3's rule, or refused."""
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 10_000.0,
    }  # fmt: skip

    def change(shift: float) -> Any:
        def add(writer: Any) -> None:
            divisors = []
            for i in range(16):  # the rule, written out
                length = 2 * math.pi * 10_000.0 ** (2 * i / 32)
                smooth = (8192 / length - 1) / 3
                between = 1 / ((1 - smooth) / 8 + smooth)
                divisors.append(1.0 if length < 2048 else 8.0 if length > 8192 else between)
            divisors[0] += shift
            writer.add_tensor("rope_freqs.weight", torch.tensor(divisors).numpy())

        return add

    written = write_gguf(tmp_path / "model.gguf", "llama", "q2_0", change=change(0), rope_parameters=rope)
    agreement = compare(written.model, load(written.path).model, windows(4))
    assert agreement.top1 == 1.0
    assert agreement.kl < 1e-9
    with pytest.raises(ModelError, match="rope_freqs are not those of Llama 3"):
        load(write_gguf(tmp_path / "odd.gguf", "llama", "q2_0", change=change(0.5)).path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"llama.expert_count": 8}, "it says llama.expert_count, and what that asks of a llama model is not known"),
        ({"llama.attention.sliding_window": 4}, "llama.attention.sliding_window"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "stretched by 'longrope'"),
        ({"llama.rope.dimension_count": 16}, "only even ones that turn wholly"),
        ({"split.count": 3}, "one of several parts"),
    ],
)
def test_what_is_not_held_is_refused(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    """What a file says of its model and this program cannot do is named, not left out."""

    def change(writer: Any) -> None:
        for key, value in keys.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(key, value)

    written = write_gguf(tmp_path / "model.gguf", "llama", "q2_0", change=change)
    with pytest.raises(ModelError, match=says) as caught:
        load(written.path)
    assert str(written.path) in str(caught.value)


def test_there_has_to_be_a_file(tmp_path: Path) -> None:
    """A .gguf that is not there is not looked for on the hub."""
    for source in (tmp_path / "none.gguf", "someone/model.gguf"):
        with pytest.raises(ModelError, match="there is no file"):
            load(source)


def test_codes_land_where_they_belong(tmp_path: Path) -> None:
    """Ternary modules hold codes and scales, embedding and tied head the same tensors, and an exporter can write them."""
    written = write_gguf(tmp_path / "model.gguf", "qwen2", "q2_0", ends="q2_0")
    loaded = load(written.path)
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert head.codes.data_ptr() == embedding.codes.data_ptr()
    assert loaded.plan is not None
    assert (loaded.plan.tied, loaded.plan.head, loaded.plan.embedding) == (True, "lm_head", "model.embed_tokens")
    write_json(tmp_path / "plan.json", loaded.plan.to_json())
    ids = [loaded.tokenizer("ab é")["input_ids"], byte_tokenizer(merges=MERGES)("ab é")["input_ids"]]
    assert ids[0] == ids[1]
    for first, second in itertools.pairwise(p for _, m in loaded.model.named_modules() if isinstance(p := m, PackedLinear)):
        assert first.granularity == second.granularity == "group-64"
