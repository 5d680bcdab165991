"""What transformers has loaded is what was trained, to the last bit, where that can be seen; one wrong bit leaves nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.test_hf import PROBE, TOKENIZER, made
from trilobit.errors import VerificationError
from trilobit.export import hf
from trilobit.export.check_stock import check_stock
from trilobit.export.exact import is_comparable, require_exact
from trilobit.export.source import Source, StoredSource
from trilobit.export.verify import agreement_of, compare, load_stock
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded
from trilobit.infer.stored import freeze
from trilobit.storage import atomic_directory, read_json

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # transformers' bitnet classes


def written(folder: Path, family: str = "llama", form: str = "autobitlinear", **spec: Any) -> tuple[Loaded, Path]:
    """A model, frozen, and its directory in a form."""
    model, plan = made(family, **spec)
    hf.write_latent(model, plan, TOKENIZER, folder / "latent")
    loaded = load(folder / "latent")
    freeze(loaded.model)
    with atomic_directory(folder / "out") as directory:
        hf.write_form(Source(loaded.model, loaded.plan, loaded.tokenizer), directory, form, "fp32")
    return loaded, folder / "out"


@pytest.mark.parametrize("spec", [{"placement": "every"}, {"placement": "every", "gain": "scalar"}, {"placement": "none"}])
def test_it_is_bit_exact(spec: dict[str, Any], tmp_path: Path) -> None:
    """Offline autobitlinear without biases: every code, scale, gain and whatever else was loaded is the model's, and the
    check's limits say so."""
    loaded, out = written(tmp_path, **spec)
    check = check_stock(loaded, out, PROBE)
    assert "bit for bit" in check.limits


@pytest.mark.parametrize(
    ("family", "form", "spec"),
    [
        ("llama", "bitlinear", {"placement": "every"}),
        ("qwen2", "autobitlinear", {"placement": "every"}),  # biases
        ("llama", "autobitlinear", {"placement": "output"}),  # gains moved
    ],
)
def test_other_forms_store_other_numbers(family: str, form: str, spec: dict[str, Any], tmp_path: Path) -> None:
    """1/s, bias/s and moved gains are not the model's numbers: there logits alone are compared."""
    loaded, out = written(tmp_path, family, form, **spec)
    source = Source(loaded.model, loaded.plan)
    assert not is_comparable(source, read_json(out / "config.json")["quantization_config"])
    assert "bit for bit" not in check_stock(loaded, out, PROBE).limits


def test_gains_that_were_moved_before(tmp_path: Path) -> None:
    """What `tune --placement output` leaves in model/ has its block gains in the linears. Written again for transformers they
    are moved back and again, and are not bit for bit what was loaded (old code refused them)."""
    _, first = written(tmp_path, placement="output")
    loaded = load(first)
    freeze(loaded.model)
    with atomic_directory(tmp_path / "again") as directory:
        hf.write_form(StoredSource(first), directory, "autobitlinear", "fp32")
    source = Source(loaded.model, loaded.plan)
    assert is_comparable(source, read_json(tmp_path / "again" / "config.json")["quantization_config"])
    other = load_stock(tmp_path / "again")
    path = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(other.get_parameter(f"{path}.rms_norm.weight"), source.gain(path))
    assert "two roundings" in check_stock(loaded, tmp_path / "again", PROBE).limits
    with torch.no_grad():
        other.get_parameter(f"{path}.rms_norm.weight")[3] *= 1 + 2**-20
    with pytest.raises(VerificationError, match=f"{path}.rms_norm"):
        require_exact(source, other)


def _next(tensor: Tensor) -> None:
    tensor.view(-1)[7:8].copy_(torch.nextafter(tensor.view(-1)[7:8], torch.tensor([torch.inf])))


def _flip(weight: Tensor) -> None:
    weight.view(-1)[7] = (weight.view(-1)[7] + 2) % 3 - 1


WRONG: dict[str, Callable[[Any], Any]] = {
    "one code": lambda m: _flip(m.model.layers[1].mlp.down_proj.weight.data),
    "last bit of a scale": lambda m: m.model.layers[0].mlp.up_proj.weight_scale.mul_(1 + 2**-22),
    "last bit of a gain": lambda m: _next(m.model.layers[0].self_attn.o_proj.rms_norm.weight.data),
    "last bit of the embedding": lambda m: _next(m.model.embed_tokens.weight.data),
    "last bit of a block norm": lambda m: _next(m.model.layers[1].input_layernorm.weight.data),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_bit_is_found(wrong: str, tmp_path: Path) -> None:
    """One code or the last bit of one number, which logits do not show (they stay within their limits), is refused by name."""
    loaded, out = written(tmp_path, placement="every")
    source, other = Source(loaded.model, loaded.plan), load_stock(out)
    require_exact(source, other)
    with torch.no_grad():
        WRONG[wrong](other)
    compare(loaded.model, other, PROBE).require("a model with one wrong bit")
    with pytest.raises(VerificationError, match=r"transformers' (model\.|lm_head).* is not the model's.*not left behind"):
        require_exact(source, other)


@pytest.mark.parametrize("apart", [1e-5, 1e-3, 0.3, 3.0])
def test_the_divergence_of_logits_that_hardly_differ(apart: float) -> None:
    """Close to float64's and never negative, however close two models are: a limit is made of it (check_llama_cpp.py)."""
    torch.manual_seed(0)
    a = torch.randn(16, 1000)
    b = a + apart * torch.randn_like(a)
    p, q = (x.double().log_softmax(-1) for x in (a, b))
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    found = agreement_of([(a, b, torch.zeros(16, dtype=torch.int64))]).kl
    assert found >= 0 and found == pytest.approx(exact, rel=1e-3 if apart > 1e-4 else 0.1)
    assert agreement_of([(a, a, torch.zeros(16, dtype=torch.int64))]).kl == 0
