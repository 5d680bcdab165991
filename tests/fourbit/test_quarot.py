"""QuaRot's rotations are orthogonal, drawn from a seed, and say what they are; fused, they change no logit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exact import exact
from families import build, logits, tokens
from fourbit.turned import attach_qk_hadamard
from trilobit.errors import UnsupportedError
from trilobit.fourbit.hadamard import hadamard_matrix
from trilobit.fourbit.online import attach_ffn_hadamard, attach_head_hadamard
from trilobit.fourbit.quarot import head_rotation, head_width, matrix, quarot, random_rotation


@pytest.mark.parametrize("width", [1, 12, 32, 92, 344])
def test_rotations_are_orthogonal_and_drawn_from_a_seed(width: int) -> None:
    """R Rᵀ = I to 1e-12, entries ± 1/√D where a Hadamard matrix exists; one seed, one matrix."""
    rotation = random_rotation(width, seed=5)
    turn = matrix(rotation)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(turn, matrix(random_rotation(width, seed=5)))
    if width > 4:
        assert not torch.equal(turn, matrix(random_rotation(width, seed=6)))
    flat = torch.allclose(turn.abs(), torch.full((width, width), width**-0.5, dtype=torch.float64), atol=1e-12)
    assert flat == (width != 92)
    assert ("no Hadamard matrix of 92" in rotation.description) == (width == 92)


def test_signs_are_in_front_of_the_transform() -> None:
    """R = diag(±1) Hᵀ/√D: undoing the transform leaves signs alone, both of them."""
    turn = matrix(random_rotation(12))
    signs = turn @ hadamard_matrix(12) / 12**0.5
    assert torch.allclose(signs, torch.diag(torch.diag(signs)), atol=1e-12)
    assert set(torch.diag(signs).round().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {}), ("phi3", {}),
    ("llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}),
    ("llama", {"hidden_size": 92, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 46}),
])  # fmt: skip
def test_fused_rotations_change_no_logit(family: str, settings: dict[str, object]) -> None:
    """In float64 to 1e-10, with Paley factors, without a Hadamard matrix for the width, without one for the heads."""
    model = exact(build(family, **{"head_dim": 8, **settings}))
    before = logits(model, tokens())
    report = quarot(model)
    assert (logits(model, tokens()) - before).abs().max() <= 1e-10 * before.abs().max()
    odd = settings.get("head_dim") == 46
    assert ("random orthogonal" in report.rotation) == odd
    assert report.values == (
        "left alone: there is no Hadamard matrix for heads of 46" if odd
        else f"{1 if settings.get('head_dim') == 12 else 2} heads of {head_width(model)} in each layer turned by "
        + head_rotation(head_width(model)).description
    )  # fmt: skip


def test_values_are_optional() -> None:
    """values=False leaves them alone."""
    assert quarot(build("llama"), values=False).values == "left alone"


def test_heads_out_of_reach_are_named() -> None:
    """A head width without a Hadamard matrix raises where it is asked for by itself."""
    with pytest.raises(UnsupportedError, match="width 46"):
        head_rotation(46)


def test_real_checkpoint(stories260k: Path) -> None:
    """stories260K (tied, four key-value heads): to 1e-4 of the logits' length; its MLP of 172 is refused, by name."""
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    before = logits(model, tokens())
    report = quarot(model)
    attach_head_hadamard(model)
    attach_qk_hadamard(model)
    with pytest.raises(UnsupportedError, match=r"width 172 .*--rotate none"):
        attach_ffn_hadamard(model)
    assert (logits(model, tokens()) - before).norm() <= 1e-4 * before.norm()
    assert report.untied and report.values.startswith("4 heads of 8")
