import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trilobit.nn.ternary import TernaryLinear
from trilobit.quant import Granularity
from trilobit.surgery.roles import decoder_layers
from trilobit.surgery.ternary import TernarySpec, ternarize
from trilobit.train import flips as flips_module
from trilobit.train.flips import watch_flips


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=None,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("scale", "learned"), [("tensor", False), ("row", False), ("row", True), ("group-64", False)])
def test_shares_are_those_of_the_stored_codes(scale: Granularity, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's number is the share of its codes, as they would be stored, that differ from those noted before; on a sample,
    the share on the first rows."""
    model = llama()
    ternarize(model, TernarySpec(scale=scale, learned_ranges=learned))
    assert watch_flips(model)() == {"flips": [0.0, 0.0, 0.0]}
    for rows in (1000, 5):
        monkeypatch.setattr(flips_module, "ROWS", rows)
        changed = copy.deepcopy(model)
        flips = watch_flips(changed)
        with torch.no_grad():
            for parameter in decoder_layers(changed)[1][1].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        shares = []
        for (_, old), (_, new) in zip(decoder_layers(model), decoder_layers(changed), strict=True):
            pairs = zip(old.modules(), new.modules(), strict=True)
            linears = [(a, b) for a, b in pairs if isinstance(a, TernaryLinear) and isinstance(b, TernaryLinear)]
            different = [(a.quantized()[0] != b.quantized()[0])[:rows].flatten() for a, b in linears]
            shares.append(torch.cat(different).double().mean().item())
        assert flips()["flips"] == pytest.approx(shares, rel=1e-2)
        assert 0 < shares[1] < 1 and shares[0] == shares[2] == 0
