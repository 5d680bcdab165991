"""Sites are found by role in every family."""

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from families import FAMILIES, VOCABULARY, build, tokens
from trilobit.measure.probes import SiteName, activations, find_probes

INSIDE: tuple[SiteName, ...] = ("attention-input", "attention-output", "mlp-input", "mlp-output", "residual")
OPT = OPTConfig(
    vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_sites_of_every_family(family: str) -> None:
    """Each layer has its five sites, read by the linears that the family has, and the final norm's output is what the head
    reads."""
    model = OPTForCausalLM(OPT).eval() if family == "opt" else build(family)
    layers = model.config.num_hidden_layers
    probes = {(probe.layer, probe.site): probe.module.split(".")[-1] for probe in find_probes(model)[0]}
    expected = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    if family == "phi3":
        expected[0], expected[2] = "qkv_proj", "gate_up_proj"
    if family == "opt":
        expected[1:] = ["out_proj", "fc1", "fc2"]
    for layer in range(layers):
        assert [probes[layer, site] for site in INSIDE] == [*expected, str(layer)]
    assert len(probes) == 5 * layers + 1
    read: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    windows = tokens(2, 9)
    model(input_ids=windows)
    for row, window in zip(read[0], windows, strict=True):
        assert torch.allclose(activations(model, None, "final-norm", window), row.abs(), atol=1e-5)
