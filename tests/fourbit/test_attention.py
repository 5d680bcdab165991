"""Fake-quantised keys and values, and attention that is changed for a while."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, build, logits, tokens
from fourbit.turned import attach_qk_hadamard
from trilobit.errors import ModelError, UnsupportedError
from trilobit.fourbit.attention import cache_quantizer, changed_attention
from trilobit.fourbit.hadamard import transform
from trilobit.fourbit.protocol import PRESETS

OSP = PRESETS["osp"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_attention_gets_is_changed_for_a_while(family: str) -> None:
    """Values that are doubled double what o_proj reads, sliding windows included; afterwards the model is as it was."""
    model, ids = build(family, num_hidden_layers=1), tokens(length=12)

    def reads() -> Tensor:
        found: list[Tensor] = []
        wide = [m for m in model.modules() if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == (32, 32)]
        handle = wide[-1].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))  # o_proj is the last
        logits(model, ids)
        handle.remove()
        return found[0]

    before = reads()
    with changed_attention(model, lambda q, k, v: (q, k, 2 * v)):
        assert torch.allclose(reads(), 2 * before, rtol=1e-5, atol=1e-5)
    assert torch.equal(reads(), before) and model.config._attn_implementation == "sdpa"


def test_other_changes_stay() -> None:
    """An online transform that was attached before is still there after a change has come and gone."""
    model, ids = build("llama"), tokens()
    attach_qk_hadamard(model)
    before, name = logits(model, ids), model.config._attn_implementation
    with changed_attention(model, lambda q, k, v: (q, k, -v)):
        assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    assert torch.equal(logits(model, ids), before) and model.config._attn_implementation == name != "sdpa"


def test_a_model_that_fails_inside_gets_its_attention_back() -> None:
    """An exception within leaves the attention that was there."""
    model = build("llama")
    with pytest.raises(KeyError), changed_attention(model, lambda q, k, v: (q, k, v)):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_attention_beyond_the_interface_is_refused() -> None:
    """CodeGen has attention of its own: its cache would stay at 16 bits, so it is refused."""
    model = build("codegen", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    with pytest.raises(ModelError), changed_attention(model, lambda q, k, v: (q, k, v)):
        pass


def test_scores_with_caps_are_refused() -> None:
    """Gemma 2 caps its scores, which transformers' sdpa does not do: said, and the model is as it was."""
    model = build("gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    with pytest.raises(ModelError, match="runs its attention as eager"), changed_attention(model, lambda q, k, v: (q, k, v)):
        pass
    assert model.config._attn_implementation == "eager"


def test_keys_and_values_are_quantised_apart() -> None:
    """Each has its own bits; at 16 there is nothing to do; queries and keys are turned where keys are quantised."""
    model = build("llama")
    assert cache_quantizer(model, OSP.with_bits("4-4-16")) is None
    keys, values = (cache_quantizer(model, OSP.with_bits(bits)) for bits in ("4-4-4-16", "4-4-16-4"))
    assert keys is not None and keys.keys is not None and keys.values is None and keys.turn
    assert values is not None and values.keys is None and values.values is not None and not values.turn
    bare = cache_quantizer(model, replace(OSP, query_key_hadamard="none"))
    assert bare is not None and not bare.turn
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    turned_q, turned_k, same = keys(q, k, v)
    assert torch.equal(turned_q, transform(q)) and torch.equal(turned_k, keys.keys(transform(k))) and same is v
    assert len(turned_k[0, 0, 0].unique()) <= 16


def test_a_head_without_a_hadamard_matrix_is_refused() -> None:
    """Heads of six channels have none: said when the cache is to be quantised, not in the middle of a forward."""
    model = build("llama", head_dim=6)
    with pytest.raises(UnsupportedError, match="width 6"):
        cache_quantizer(model, OSP)
    assert cache_quantizer(model, OSP.with_bits("4-4-16-4")) is not None


def test_a_cache_gives_what_a_whole_forward_gives() -> None:
    """Generation with a cache and a forward over the whole text have the same last logits: keys are quantised alike."""
    model, ids = build("llama"), tokens(length=10)
    cache = cache_quantizer(model, OSP)
    assert cache is not None
    with changed_attention(model, cache), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1]
    assert torch.allclose(step, whole, rtol=1e-4, atol=1e-4)
