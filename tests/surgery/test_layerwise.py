"""A decoder run one layer at a time."""

import pytest
import torch

from families import FAMILIES, build, tokens
from trilobit.surgery.layerwise import first_layer_inputs, hidden_states_of, layer_calls
from trilobit.surgery.roles import decoder_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_one_by_one_are_the_model(family: str) -> None:
    """Hidden states sent through each layer with what it gets make the model's logits, sliding windows included."""
    model, ids = build(family), tokens(3, 12)
    batches = ids.split(1)
    with torch.no_grad():
        states, calls = first_layer_inputs(model, batches, "fp32"), layer_calls(model, batches[0])
        for (_, layer), options in zip(decoder_layers(model), calls, strict=True):
            states = [hidden_states_of(layer(x, **options)) for x in states]
        head = model.get_output_embeddings()
        assert head is not None
        norm = model.base_model.norm  # pyright: ignore[reportAttributeAccessIssue]
        logits = torch.cat([head(norm(x)) for x in states])
        expected = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())
