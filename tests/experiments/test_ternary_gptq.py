"""experiments/ternary_gptq.py against its definition, in float64."""

import pytest
import torch
from ternary_gptq import gptq, group_scale, linears_by_input, quantize_columns, round_to_nearest, rtn
from torch import Tensor, nn

from families import build
from trilobit.fourbit.gptq import inverse_factor
from trilobit.quant import ternary_dequantize, ternary_levels, ternary_quantize
from trilobit.surgery.layerwise import first_layer_inputs, layer_calls
from trilobit.surgery.roles import decoder_layers

OUTPUTS, INPUTS = 5, 300  # two whole groups and a short one


def data(outputs: int = OUTPUTS, inputs: int = INPUTS) -> tuple[Tensor, Tensor]:
    """A weight [O, K] and correlated inputs [T, K], float64."""
    mix = torch.randn(inputs, inputs, dtype=torch.float64) * 0.2 + torch.eye(inputs, dtype=torch.float64)
    return torch.randn(outputs, inputs, dtype=torch.float64), torch.randn(4 * inputs, inputs, dtype=torch.float64) @ mix


def naive(weight: Tensor, moment: Tensor, rule: str, damping: float) -> Tensor:
    """Optimal brain quantisation in a fixed order: the inverse of what is left of H, made anew for every column."""
    weight, columns = weight.clone(), weight.shape[1]
    h = moment + damping * moment.diagonal().mean() * torch.eye(columns, dtype=moment.dtype)
    quantized = torch.zeros_like(weight)
    for j in range(columns):
        if j % 128 == 0:
            scale = group_scale(weight[:, j : j + 128], rule)
        inverse = torch.linalg.inv(h[j:, j:])
        quantized[:, j] = (ternary_levels(weight[:, j : j + 1], scale, "row") * scale)[:, 0]
        weight[:, j:] -= torch.outer((weight[:, j] - quantized[:, j]) / inverse[0, 0], inverse[0])
    return quantized


@pytest.mark.parametrize("rule", ["absmean", "mse"])
def test_columns_are_those_of_the_naive_definition(rule):
    """Cholesky factors and lazy updates by group change nothing."""
    weight, x = data()
    codes, scales = quantize_columns(weight, x.T @ x, rule)
    expected = naive(weight, x.T @ x, rule, 0.01)
    assert torch.equal(ternary_dequantize(codes, scales, "group-128"), expected)


def test_compensation_pays_on_correlated_inputs():
    """GPTQ's outputs are nearer to the original's than those of rounding with the same rule."""
    weight, x = data()
    quantized = ternary_dequantize(*quantize_columns(weight, x.T @ x, "mse"), "group-128")
    rounded = ternary_dequantize(*round_to_nearest(weight, "mse"), "group-128")
    assert (x @ (weight - quantized).T).square().sum() < 0.7 * (x @ (weight - rounded).T).square().sum()


def test_best_scale_has_the_least_error():
    """No scale on a fine grid leaves less squared error than the exact one, but for its rounding to fp16."""
    weight = torch.randn(16, 100)
    scale = group_scale(weight, "mse")

    def error(scale: Tensor) -> Tensor:
        return (weight - ternary_levels(weight, scale, "row") * scale).square().sum(dim=1)

    grid = torch.stack([error(torch.full((16, 1), s)) for s in torch.linspace(0.2, 3, 1000).tolist()])
    assert (error(scale) <= grid.amin(dim=0) * (1 + 1e-5)).all()


def test_rounding_is_that_of_quant():
    """RTN with the absmean rule is quant.py's ternary weight."""
    weight = torch.randn(OUTPUTS, INPUTS)
    assert torch.equal(
        ternary_dequantize(*round_to_nearest(weight, "absmean"), "group-128"), ternary_quantize(weight, "group-128")
    )


def test_a_moment_without_full_rank_is_damped_until_it_factorises():
    """Channels that are always zero and fewer tokens than channels give a finite factor, whatever the damping starts from."""
    x = torch.randn(3, 20, dtype=torch.float64)
    x[:, 7] = 0
    moment = x.T @ x
    for damping in (0.01, 1e-40):
        factor, used = inverse_factor(moment, damping)
        assert torch.isfinite(factor).all() and used >= damping


def test_linears_that_share_an_input_go_together():
    """q, k, v, then o, then gate, up, then down."""
    model = build("llama")
    ids = torch.randint(3, 60, (2, 8))
    layer = decoder_layers(model)[0][1]
    names = {id(module): name.split(".")[-1] for name, module in layer.named_modules()}
    with torch.no_grad():
        found = linears_by_input(layer, first_layer_inputs(model, [ids], "fp32")[0], layer_calls(model, ids)[0])
    assert [[names[id(m)] for m in group] for group in found] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip


def test_a_model_becomes_ternary_and_stays_nearer_than_rounded():
    """Every linear of the decoder layers has three values a group, nothing else changes, and logits are nearer than RTN's."""
    ids = torch.randint(3, 60, (8, 16))
    models = [build("llama") for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    gptq(models[1], list(ids.split(2)), "mse", "fp32")
    rtn(models[2], "mse")
    inside = [m for _, layer in decoder_layers(models[1]) for m in layer.modules() if isinstance(m, nn.Linear)]
    assert all(len(group.abs().unique()) <= 2 for m in inside for row in m.weight for group in row.split(128))
    kept = {id(m.weight) for m in inside}
    for (name, a), b in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.equal(a, b) == (id(a) not in kept), name
    with torch.no_grad():
        wanted, near, far = (model(input_ids=ids).logits for model in models)
    assert (near - wanted).square().sum() < (far - wanted).square().sum()
