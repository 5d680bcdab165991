"""Transforms that run with the model change no logit, are where they should be, and run in the order of attachment."""

import copy

import pytest
import torch
from torch import Tensor

from exact import exact
from families import FAMILIES, build, logits, tokens
from fourbit.turned import attach_qk_hadamard
from trilobit.errors import ModelError, UnsupportedError
from trilobit.fourbit.hadamard import transform
from trilobit.fourbit.online import attach_attention, attach_ffn_hadamard, attach_head_hadamard
from trilobit.fourbit.quarot import quarot
from trilobit.surgery.roles import find_sites


def inputs_of(model, role: str) -> list[Tensor]:
    """What each linear of a role reads, behind all hooks."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(site.path).register_forward_hook(lambda m, i, o: seen.append(i[0]))
        for site in find_sites(model)
        if site.role == role
    ]
    logits(model, tokens())
    for handle in handles:
        handle.remove()
    return seen


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-10 * b.abs().max())


@pytest.mark.parametrize("attach", [attach_ffn_hadamard, attach_head_hadamard, attach_qk_hadamard])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged(family: str, attach) -> None:
    """In float64 to 1e-10, in every family, those with norms behind the block as well."""
    model = exact(build(family))
    before = logits(model, tokens())
    report = attach(model)
    assert close(logits(model, tokens()), before)
    assert len(report.sites) == 3
    assert "3 places" in str(report)


@pytest.mark.parametrize("tied", [False, True])
def test_everything_together(tied: bool) -> None:
    """QuaRot whole: stream and values fused, MLP, heads, queries and keys online; a copy does the same; so does a cache."""
    model = exact(build("qwen2", tied=tied))
    before = logits(model, tokens())
    quarot(model)
    for attach in (attach_ffn_hadamard, attach_head_hadamard, attach_qk_hadamard):
        attach(model)
    assert close(logits(model, tokens()), before)
    assert torch.equal(logits(copy.deepcopy(model), tokens()), logits(model, tokens()))
    with torch.no_grad():
        first = model(input_ids=tokens()[:, :5], use_cache=True)
        second = model(input_ids=tokens()[:, 5:], past_key_values=first.past_key_values)
    assert close(torch.cat([first.logits, second.logits], 1), before)


def test_the_mlp_reads_the_transform() -> None:
    """What the MLP's last linear reads is H x / √n of what it read, and its weight has followed."""
    model = exact(build("llama"))
    plain, weight = inputs_of(model, "mlp-output"), model.model.layers[0].mlp.down_proj.weight.detach().clone()
    report = attach_ffn_hadamard(model)
    assert all(close(x, transform(y)) for x, y in zip(inputs_of(model, "mlp-output"), plain, strict=True))
    assert torch.allclose(model.model.layers[0].mlp.down_proj.weight, transform(weight))
    assert (report.width, report.why) == (48, "Sylvester 4 × Paley I 12 (GF(11))")


def test_heads_and_values_make_one_hadamard() -> None:
    """Values turned by head and heads transformed across: together the Hadamard transform of the whole width."""
    model = exact(build("llama"))
    plain = inputs_of(model, "attention-output")
    quarot(model)
    attach_head_hadamard(model)
    assert all(close(x, transform(y)) for x, y in zip(inputs_of(model, "attention-output"), plain, strict=True))


def test_nine_heads_have_none() -> None:
    """A number of heads without a Hadamard matrix (SmolLM2-135M's) is said, and nothing is attached."""
    model = build("llama", hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = attach_head_hadamard(model)
    assert report.sites == () and "no Hadamard matrix of 9 heads" in str(report)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_changes_run_in_order_after_rope() -> None:
    """A change attached after the transform sees transformed queries and keys, per head, and values as they are."""
    model = exact(build("llama"))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def look(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((query, key, value))
        return query, key, value

    attach_attention(model, look)
    attach_qk_hadamard(model)
    attach_attention(model, look)
    logits(model, tokens())
    assert len(seen) == 2 * 3
    for (q, k, v), (turned_q, turned_k, same_v) in zip(seen[::2], seen[1::2], strict=True):
        assert q.shape == (2, 4, 9, 8) and k.shape == v.shape == (2, 2, 9, 8)
        assert torch.equal(turned_q, transform(q)) and torch.equal(turned_k, transform(k)) and torch.equal(same_v, v)


def test_a_change_changes_until_it_is_detached() -> None:
    """Values that a change zeroes are not seen by the model; detached, nothing is left of it but what else is attached."""
    model = build("llama")
    before = logits(model, tokens())
    detach = attach_attention(model, lambda q, k, v: (q, k, torch.zeros_like(v)))
    other = attach_attention(model, lambda q, k, v: (q, k, v))
    assert not any(x.any() for x in inputs_of(model, "attention-output"))
    detach()
    assert model.config._attn_implementation != "sdpa"
    assert torch.equal(logits(model, tokens()), before)
    other()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, tokens()), before)


def test_refusals_change_nothing() -> None:
    """Widths out of reach name themselves; an attention that is not sdpa says how to load the model."""
    for settings, attach, width in (
        ({"intermediate_size": 92}, attach_ffn_hadamard, 92),
        ({"head_dim": 46}, attach_qk_hadamard, 46),
    ):
        model = build("llama", **settings)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UnsupportedError, match=f"width {width} "):
            attach(model)
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = build("llama", attn_implementation="eager")
    with pytest.raises(ModelError, match='attn_implementation="sdpa"'):
        attach_qk_hadamard(model)
    assert model.config._attn_implementation == "eager"


def test_a_layer_that_cannot_be_reached_is_refused() -> None:
    """A layer whose attention does not pass through the interface is counted, and sdpa put back."""
    model = build("llama")
    before = logits(model, tokens())
    o_proj = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.forward = lambda hidden_states, **options: (o_proj(hidden_states), None)
    with pytest.raises(ModelError, match="2 of the 3 layers"):
        attach_qk_hadamard(model)
    del model.model.layers[1].self_attn.forward
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, tokens()), before)
