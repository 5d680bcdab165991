"""Who touches the residual stream, and where values are, is found without names and proven by a turned forward."""

import pytest
import torch
from torch import nn

from families import build, logits, tokens
from trilobit.errors import ModelError
from trilobit.surgery.roles import find_roles
from trilobit.surgery.stream import _turn, _turn_back, find_stream, find_values


@pytest.mark.parametrize("width", [1, 2, 3, 8, 33])
def test_the_turn_of_the_proof_is_orthogonal(width: int) -> None:
    """It is a linear map with T Tᵀ = I, undone by its inverse, and of two or more channels it leaves none in its place."""
    x = torch.eye(width, dtype=torch.float64)
    assert torch.allclose(_turn_back(_turn(x)), x, atol=1e-14)
    assert torch.allclose(_turn(x) @ _turn(x).T, x, atol=1e-14)
    assert width == 1 or (torch.diag(_turn(x)).abs() < 0.8).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"])
def test_the_stream_of_a_family(family: str) -> None:
    """Readers with their norms, the head with the final one; writers; norms of queries and keys are none of its business."""
    model = build(family, head_dim=8)
    stream = find_stream(model)
    expected, writers = {}, []
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        expected |= {f"{prefix}self_attn.{part}_proj": f"{prefix}input_layernorm" for part in "qkv"}
        expected |= {f"{prefix}mlp.{part}_proj": f"{prefix}post_attention_layernorm" for part in ("gate", "up")}
        writers += [f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"]
    assert stream.readers == {**expected, "lm_head": "model.norm"}
    assert (stream.width, stream.writers) == (32, tuple(writers))
    assert {rule.offset for rule in stream.norms.values()} == {1.0 if family == "gemma" else 0.0}
    assert len(stream.norms) == 7


@pytest.mark.parametrize(
    ("family", "settings", "linear", "starts"),
    [("llama", {}, "v_proj", (0, 8)), ("qwen2", {"num_key_value_heads": 1}, "v_proj", (0,)),
     ("qwen3", {"num_key_value_heads": 4}, "v_proj", (0, 8, 16, 24)), ("phi3", {}, "qkv_proj", (48, 56))],
)  # fmt: skip
def test_values_are_found(family: str, settings: dict, linear: str, starts: tuple[int, ...]) -> None:
    """Linear and rows of each key-value head, also inside a fused projection behind queries and keys."""
    model = build(family, **settings)
    heads, why = find_values(model, find_roles(model), 8)
    assert why == ""
    assert [layer.linear for layer in heads] == [f"model.layers.{i}.self_attn.{linear}" for i in range(3)]
    assert {(layer.starts, layer.width) for layer in heads} == {(starts, 8)}
    assert [layer.output for layer in heads] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]


def test_parts_of_heads_are_values_and_pairs_are_not() -> None:
    """Half a head may be turned by itself. Two heads look like values at the first position, but the proof finds them out."""
    model = build("llama", num_key_value_heads=4)
    roles = find_roles(model)
    assert find_values(model, roles, 4)[0][0].starts == tuple(range(0, 32, 4))
    heads, why = find_values(model, roles, 16)
    assert heads == [] and "does not commute" in why


def test_a_head_without_a_norm_in_front_is_refused() -> None:
    """Where the head reads something else than a norm's output, there is nothing to fold the final gain into."""
    model = build("llama")
    model.lm_head.register_forward_pre_hook(lambda m, inputs: (inputs[0].sigmoid(),))
    with pytest.raises(ModelError, match="lm_head does not read a norm's output"):
        find_stream(model)


def test_a_width_in_between_is_refused() -> None:
    """A writer into fewer channels than the stream's (latent attention) is named."""
    model = build("llama")
    layer = model.model.layers[0].self_attn
    layer.o_proj = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
    with pytest.raises(ModelError, match=r"o_proj\.0 does not read or write the residual stream of 32 but 8"):
        find_stream(model)


def test_probing_leaves_no_trace() -> None:
    """Logits, hooks, modes and random state are what they were."""
    model = build("phi3").train()
    before, state = logits(model, tokens()), torch.get_rng_state()
    find_values(model, find_stream(model).roles, 8)
    assert torch.equal(logits(model, tokens()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
