"""Roles are found by watching a model work; whatever cannot be understood is refused and left alone."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from families import FAMILIES, REFUSED, build, logits, tokens
from trilobit.errors import ModelError
from trilobit.nn.ternary import TernaryModule
from trilobit.surgery.roles import find_roles
from trilobit.surgery.ternary import ternarize

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FUSED = {"phi3": (("qkv_proj",), ("gate_up_proj",))}
MLP_NORM = {"gemma3_text": "pre_feedforward_layernorm", "olmo2": None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_each_family(family: str, tied: bool) -> None:
    """Every decoder linear in running order, with its role, the norm it reads directly and the inputs it shares."""
    model = build(family, tied=tied)
    attention, mlp = FUSED.get(family, (ATTENTION, MLP))
    expected, groups = [], []
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        first = None if family == "olmo2" else prefix + "input_layernorm"
        name = MLP_NORM.get(family, "post_attention_layernorm")
        second = None if name is None else prefix + name
        expected += [(prefix + "self_attn." + part, layer, "input", first) for part in attention]
        expected += [(prefix + "self_attn.o_proj", layer, "attention-output", None)]
        expected += [(prefix + "mlp." + part, layer, "input", second) for part in mlp]
        expected += [(prefix + "mlp.down_proj", layer, "mlp-output", None)]
        for index, size in enumerate((len(attention), 1, len(mlp), 1)):
            groups += [4 * layer + index] * size
    roles = find_roles(model)
    assert [(s.path, s.layer, s.role, s.norm) for s in roles.sites] == expected
    assert [s.group for s in roles.sites] == groups
    assert roles.layers == tuple(f"model.layers.{layer}" for layer in range(3))
    assert (roles.embedding, roles.head, roles.tied) == ("model.embed_tokens", "lm_head", tied)


def test_roles_do_not_come_from_names() -> None:
    """Renaming every linear to a number changes no role."""
    model = build("llama")
    roles = [s.role for s in find_roles(model).sites]

    class Renamed(nn.Module):
        def __init__(self, inner: nn.Module, order: list[str]):
            super().__init__()
            self.inner = inner
            parts = [getattr(inner, name) for name in order]
            inner._modules = OrderedDict((f"m{i}", part) for i, part in enumerate(parts))
            for name, part in zip(order, parts, strict=True):
                object.__setattr__(inner, name, part)  # found by the forward, not listed as a module

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    for layer in model.model.layers:
        layer.self_attn = Renamed(layer.self_attn, ["o_proj", "v_proj", "q_proj", "k_proj"])
        layer.mlp = Renamed(layer.mlp, ["down_proj", "act_fn", "up_proj", "gate_proj"])
    sites = find_roles(model).sites
    assert [s.role for s in sites] == roles
    assert "proj" not in "".join(s.path for s in sites)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_model_is_left_as_it_was(family: str) -> None:
    """Probing changes no parameter, mode, gradient, hook or random state."""
    model = build(family).train()
    model.model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    find_roles(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_flattened_tokens_are_understood() -> None:
    """OPT flattens batch and time before its MLP, uses LayerNorm and biases; its roles are found all the same."""
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    sites = find_roles(OPTForCausalLM(config)).sites
    assert [s.role for s in sites] == (["input"] * 3 + ["attention-output", "input", "mlp-output"]) * 2


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_say_why_and_change_nothing(kind: str) -> None:
    """A model that is not understood is refused with its reason, by the probe and by ternarize, and stays whole."""
    make, reason = REFUSED[kind]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for attempt in (find_roles, ternarize):
        with pytest.raises(ModelError, match=reason):
            attempt(model)
    assert not any(isinstance(module, TernaryModule) for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_twice_is_refused() -> None:
    """A ternary model is not made ternary again."""
    model = build("llama")
    ternarize(model)
    with pytest.raises(ModelError, match="ternary already"):
        ternarize(model)


def test_a_linear_that_does_not_run_is_refused() -> None:
    """A linear that the probe never sees, or sees on some tokens only, has no known role."""
    model = build("llama")
    model.model.layers[1].spare = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"layers\.1\.spare did not run"):
        find_roles(model)
    model = build("llama")
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.forward = lambda x: torch.cat([down(x.new_ones(1, 4, 48)), x[:, 4:]], dim=1)
    del model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match="runs on some tokens only"):
        find_roles(model)


def test_low_precision_models_can_be_probed() -> None:
    """A bf16 checkpoint has the same roles as its fp32 twin."""
    model = build("qwen2")
    expected = find_roles(model)
    assert find_roles(model.bfloat16()) == expected


def test_real_checkpoint(stories260k: Path) -> None:
    """stories260K: five layers of seven linears, and placement none at λ = 0 leaves its logits as they were."""
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    roles = find_roles(model)
    assert len(roles.sites) == 7 * len(roles.layers) == 7 * model.config.num_hidden_layers
    ids = tokens()
    before = logits(model, ids)
    surgery = ternarize(model, roles=roles, calibration=[ids])
    assert sum(row.parameters for row in surgery.rows) == surgery.parameters == sum(p.numel() for p in model.parameters())
    after = logits(model, ids)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
