"""Shares of attention, against transformers' own weights."""

import pytest
from transformers import OPTConfig, OPTForCausalLM

from families import FAMILIES, VOCABULARY, build, tokens
from trilobit.measure.sinks import sink_shares

OPT = OPTConfig(
    vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_sink_shares_are_those_of_the_attentions(family: str) -> None:
    """By layer, the share is that of transformers' own attention weights, all heads and later positions together."""
    model = OPTForCausalLM(OPT).eval() if family == "opt" else build(family)
    windows = tokens(3, 12)
    shares = sink_shares(model, windows)
    model.set_attn_implementation("eager")
    attentions = model(input_ids=windows, output_attentions=True).attentions
    assert shares == pytest.approx([(a[:, :, 1:, 0].sum() / a[:, :, 1:].sum()).item() for a in attentions], rel=1e-5)


def test_attention_that_is_not_given_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without attention weights has no share; a model without any has None."""
    model = build("llama")
    attention = model.model.layers[1].self_attn
    inner = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **options: (inner(*args, **options)[0], None))
    shares = sink_shares(model, tokens())
    assert shares is not None
    assert [share is None for share in shares] == [False, True, False]
    monkeypatch.setattr(model, "set_attn_implementation", lambda kind: None)  # stays sdpa, which has none
    assert sink_shares(model, tokens()) is None
