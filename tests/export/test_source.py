"""A stored model read tensor by tensor is the model, whatever form it is stored in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from export.test_hf import PROBE, TOKENIZER, made
from trilobit.errors import ModelError
from trilobit.export import hf
from trilobit.export.source import Source, StoredSource
from trilobit.tensors import Entry, stream_tensors

pytestmark = pytest.mark.filterwarnings(  # torch's own imports, on the way to transformers' bitnet classes
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("autobitlinear", "qwen2", {"placement": "every"}),
    ("bitlinear", "qwen2", {"placement": "every", "gain": "scalar"}),
    ("autobitlinear", "llama", {"placement": "output"}),
    ("autobitlinear", "gemma3_text", {"placement": "output"}),
    ("packed", "qwen3", {"placement": "every", "scale": "group-64", "gain": "scalar"}),
    ("packed", "llama", {"placement": "none", "cover": "+embeddings", "tied": True}),
    ("dense", "qwen2", {"placement": "none", "activations": "none", "scale": "row"}),
    ("latent", "llama", {"placement": "output", "scale": "group-128", "dead_zone_bias": 1e-3}),
    ("latent", "llama", {"placement": "none", "scale": "row", "learned_ranges": True}),
]


@pytest.mark.parametrize(("form", "family", "spec"), FORMS)
def test_every_form_gives_the_model_back(form: str, family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    """Codes and biases are those of the model in memory, scales and gains too to the rounding of the form, block gains that
    were moved are back in their norms, and nothing of the model is held."""
    model, plan = made(family, **spec)
    if form == "latent":
        hf.write_latent(model, plan, TOKENIZER, tmp_path / "m")
    else:
        hf.write_model(model, plan, TOKENIZER, tmp_path / "m", PROBE[:4], form, "fp32")
    stored, memory = StoredSource(tmp_path / "m"), Source(model, plan)
    assert all(p.device.type == "meta" for p in stored.model.parameters())
    assert stored.tied == memory.tied
    assert sorted(stored.kept_names) == sorted(memory.kept_names)
    for name in memory.kept_names:
        torch.testing.assert_close(stored.kept(name), memory.kept(name), rtol=1e-6, atol=1e-6)
    for path in memory.ternary:
        ours, theirs = memory.packed(path), stored.packed(path)
        assert torch.equal(ours.codes, theirs.codes)
        used = ours.codes.any(dim=1, keepdim=True).expand_as(ours.scale) if ours.scale.shape[0] > 1 else torch.ones(1, 1).bool()
        torch.testing.assert_close(theirs.scale[used], ours.scale[used], rtol=1e-6, atol=0)
        bias, other = getattr(ours, "bias", None), getattr(theirs, "bias", None)
        assert (bias is None) == (other is None)
        if bias is not None:
            torch.testing.assert_close(other, bias, rtol=1e-5, atol=1e-7)
        if path in plan.linears and plan.linears[path].normed:
            torch.testing.assert_close(stored.gain(path), memory.gain(path).expand_as(stored.gain(path)), rtol=1e-6, atol=0)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """A file that lacks a tensor is an error with the tensor's name, not a KeyError."""
    model, plan = made("llama", placement="none")
    hf.write_model(model, plan, TOKENIZER, tmp_path / "m", PROBE[:4], "packed", "fp32")
    with pytest.raises(ModelError, match=r"model\.layers\.9\.x is missing"):
        StoredSource(tmp_path / "m").tensor("model.layers.9.x")


def test_a_form_in_several_files_is_the_same_model(tmp_path: Path) -> None:
    """Above the limit a form is written as shards with an index, which transformers and trilobit read as the whole."""
    from trilobit.export.verify import compare, load_stock
    from trilobit.infer.stored import read_ours

    model, plan = made("llama")
    folder = tmp_path / "m"
    folder.mkdir()
    seen: list[tuple[int, int]] = []
    hf.write_form(Source(model, plan, TOKENIZER), folder, "autobitlinear", "fp32", most=20_000, each=lambda *a: seen.append(a))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").exists()
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    for other in (load_stock(folder), read_ours(folder).model):
        assert compare(model, other, PROBE[:2]).top1 > 0.98


def test_one_tensor_larger_than_a_file_may_be_has_its_own(tmp_path: Path) -> None:
    """No file is empty, and none but that of a single tensor is larger than the limit."""
    entries = [
        Entry(name, torch.float32, (size,), lambda s=size: torch.ones(s))
        for name, size in zip("abcd", (1, 9, 1, 1), strict=True)
    ]
    stream_tensors(entries, tmp_path, most=8)
    sizes = {p.name: p.stat().st_size for p in tmp_path.glob("*.safetensors")}
    assert sorted(sizes) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
