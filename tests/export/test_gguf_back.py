"""What `export` writes as GGUF is what `load` reads, and what llama.cpp makes of a file is what `load` makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from families import build
from infer.checkpoints import byte_tokenizer
from infer.ggufs import FAMILIES, MERGES, SIZES, VOCABULARY, write_gguf
from trilobit.export import llama_cpp
from trilobit.export.gguf import write
from trilobit.export.source import Source
from trilobit.export.verify import compare
from trilobit.infer.load import load
from trilobit.infer.stored import freeze
from trilobit.surgery.ternary import TernarySpec, ternarize


def windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length + 1), generator=torch.Generator().manual_seed(3))


WEIGHTS_ONLY: dict[str, Any] = {"placement": "none", "activations": "none"}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 10_000.0,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], dict[str, Any], float]] = [  # family, spec, settings, most KL
    ("llama", {**WEIGHTS_ONLY, "scale": "group-64"}, {}, 1e-6),
    ("llama", {**WEIGHTS_ONLY, "scale": "group-256"}, {"rope_parameters": LLAMA_3}, 1e-6),
    ("llama", {**WEIGHTS_ONLY, "scale": "group-64"},
     {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}, 1e-6),
    ("qwen2", {**WEIGHTS_ONLY, "scale": "group-64"}, {"tied": True}, 1e-6),
    ("qwen3", {**WEIGHTS_ONLY, "scale": "group-64", "cover": "+embeddings"}, {"head_dim": 32}, 1e-9),
    ("gemma3_text", {**WEIGHTS_ONLY, "scale": "group-64"}, {**FAMILIES["gemma3"][1], "tied": True}, 1e-6),
    ("llama", {"placement": "output", "scale": "tensor"}, {"tied": True}, 1e-3),  # bitnet: fp16 scales flip int8 codes
]  # fmt: skip


@pytest.mark.parametrize(("family", "spec", "settings", "most"), CASES, ids=lambda value: str(value)[:24])
def test_what_is_exported_comes_back(
    tmp_path: Path, family: str, spec: dict[str, Any], settings: dict[str, Any], most: float
) -> None:
    """Every graph that export writes, with an fp16 head: the model it was made from."""
    tokenizer = byte_tokenizer(merges=MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    model = build(family, **{**SIZES, **settings})
    plan = ternarize(model, TernarySpec(**spec)).plan
    write(Source(model, plan, tokenizer), tmp_path / "model.gguf", head="f16")
    loaded = load(tmp_path / "model.gguf")
    agreement = compare(freeze(model), loaded.model, windows(4, 64))
    assert agreement.kl <= most
    assert loaded.plan is not None
    assert loaded.plan.linears.keys() == plan.linears.keys()
    assert (loaded.plan.spec.scale, loaded.plan.spec.activations) == (plan.spec.scale, plan.spec.activations)
    for text in ("ab cd", "é\n 12"):
        assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
@pytest.mark.parametrize(("architecture", "scaling"), [*((name, {}) for name in FAMILIES), ("qwen3", YARN)])
def test_llama_cpp_reads_the_same_model(tmp_path: Path, architecture: str, scaling: dict[str, Any]) -> None:
    """fp32 files of each architecture, in which nothing rounds: the next tokens of stock llama.cpp, and its token ids."""

    def change(writer: Any) -> None:
        for key, value in scaling.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"{architecture}.rope.scaling.{key}", value)

    written = write_gguf(tmp_path / "model.gguf", architecture, "f32", change=change)
    loaded, probe = load(written.path), windows(1, 48)
    reading = llama_cpp.read(written.path, probe, ["hello ab é 12"], "a", top=VOCABULARY - 2, threads=1)
    agreement = llama_cpp.compare_reading(loaded.model, reading, probe)
    assert agreement.kl < 1e-5
    assert agreement.top1 > 0.95
    assert reading.tokens[0] == loaded.tokenizer("hello ab é 12")["input_ids"]
