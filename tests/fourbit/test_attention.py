"""Attention that is watched or changed between RoPE and the scores."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, LAYERS, build, logits, tokens
from trilobit.errors import ModelError
from trilobit.fourbit.attention import Heads, cache_quantizer, changed_attention, find_heads
from trilobit.fourbit.protocol import PRESETS
from trilobit.fourbit.rotation import hadamard

OSP = PRESETS["osp"]


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_found_in_every_family(family: str) -> None:
    """Four query heads and two key heads of eight channels in each layer; the model is as it was."""
    model, ids = build(family), tokens()
    before, name = logits(model, ids), model.config._attn_implementation
    assert find_heads(model) == [Heads(4, 2, 8, 8)] * LAYERS
    assert model.config._attn_implementation == name
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_attention_gets_is_changed(family: str) -> None:
    """Values that are doubled double what each o_proj reads, in every layer, sliding windows included."""
    model, ids = build(family, num_hidden_layers=1), tokens(length=12)

    def reads() -> Tensor:
        found: list[Tensor] = []
        wide = [m for m in model.modules() if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == (32, 32)]
        handle = wide[-1].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))  # o_proj runs last
        logits(model, ids)
        handle.remove()
        return found[0]

    before = reads()
    with changed_attention(model, lambda module, q, k, v: (q, k, 2 * v)):
        assert torch.allclose(reads(), 2 * before, rtol=1e-5, atol=1e-5)
    assert torch.equal(reads(), before)


def test_a_model_that_fails_inside_gets_its_attention_back() -> None:
    """An exception within leaves neither our name nor our attributes behind."""
    model = build("llama")
    with pytest.raises(KeyError), changed_attention(model, lambda module, q, k, v: (q, k, v)):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "_trilobit_attention") for module in model.modules())


def test_attention_beyond_the_interface_is_refused() -> None:
    """CodeGen has attention of its own: its cache would stay at 16 bits, so it is refused."""
    with pytest.raises(ModelError, match="0 of its 2 layers hand keys and values to transformers' attention interface"):
        find_heads(build("codegen", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4))


def test_scores_with_caps_are_refused() -> None:
    """Gemma 2 caps its scores, which sdpa cannot: said, not ignored."""
    model = build("gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    with pytest.raises(ModelError, match="caps its scores"):
        find_heads(model)


def test_keys_and_values_are_quantised_apart() -> None:
    """Each has its own bits; at 16 there is nothing to do; the rotation of queries and keys is there with quantised keys."""
    assert cache_quantizer(OSP.with_bits("4-4-16"), hadamard) is None
    keys = cache_quantizer(OSP.with_bits("4-4-4-16"), hadamard)
    values = cache_quantizer(OSP.with_bits("4-4-16-4"), hadamard)
    assert keys is not None and keys.keys is not None and keys.values is None and keys.turn is hadamard
    assert values is not None and values.keys is None and values.values is not None and values.turn is None
    bare = cache_quantizer(replace(OSP, query_key_hadamard="none"), hadamard)
    assert bare is not None and bare.turn is None
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    turned_q, turned_k, same = keys(nn.Identity(), q, k, v)
    assert torch.equal(turned_q, hadamard(q)) and torch.equal(turned_k, keys.keys(hadamard(k))) and same is v
    assert len(turned_k[0, 0, 0].unique()) <= 16


def test_a_cache_gives_what_a_whole_forward_gives() -> None:
    """Generation with a cache and a forward over the whole text have the same last logits: keys are quantised alike."""
    model, ids = build("llama"), tokens(length=10)
    cache = cache_quantizer(OSP, hadamard)
    assert cache is not None
    with changed_attention(model, cache), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1]
    assert torch.allclose(step, whole, rtol=1e-4, atol=1e-4)
