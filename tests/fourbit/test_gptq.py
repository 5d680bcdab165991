"""GPTQ of one matrix against its definition in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit import naive
from trilobit.errors import ModelError
from trilobit.fourbit.gptq import inverse_factor, quantize_columns
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.fourbit.rtn import round_to_nearest

OSP = PRESETS["osp"]


def quantized(weight: torch.Tensor, moment: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    return quantize_columns(weight, moment, protocol)[0]


def problem(rows: int, inputs: int, seed: int = 0, samples: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the moment of correlated inputs of very different sizes, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mix
    x *= torch.exp(torch.randn(inputs, generator=generator, dtype=torch.float64))
    return torch.randn(rows, inputs, generator=generator, dtype=torch.float64), x.T @ x


def cost(weight: torch.Tensor, other: torch.Tensor, moment: torch.Tensor) -> float:
    """‖(W − Ŵ) X‖²."""
    return ((weight - other) @ moment * (weight - other)).sum().item()


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 24), st.sampled_from([1, 3, 8, 128]), st.integers(0, 40))
def test_it_is_optimal_brain_surgery(bits: int, rows: int, inputs: int, block: int, seed: int) -> None:
    """In float64 the result is that of eliminating the inverse Hessian column by column, for any block size."""
    weight, moment = problem(rows, inputs, seed)
    got = quantized(weight, moment, replace(OSP, weight_bits=bits, gptq_block=block))
    expected = torch.tensor(naive.gptq(weight.numpy(), moment.numpy(), bits))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_it_beats_rounding() -> None:
    """The error that its inputs see is well below that of rounding to nearest, in fp32 too."""
    weight, moment = problem(24, 96)
    rounded = cost(weight, round_to_nearest(weight, OSP), moment)
    assert cost(weight, quantized(weight, moment, OSP), moment) < 0.7 * rounded
    assert cost(weight, quantized(weight.float(), moment, OSP).double(), moment) < 0.7 * rounded


def test_uncorrelated_inputs_leave_nothing_to_pay_for() -> None:
    """With a diagonal Hessian GPTQ is rounding to nearest."""
    weight, _ = problem(5, 40)
    moment = torch.diag(torch.rand(40, dtype=torch.float64) + 0.5)
    assert torch.allclose(quantized(weight, moment, OSP), round_to_nearest(weight, OSP), atol=1e-6)


def test_stacked_matrices_are_quantised_as_each_alone() -> None:
    """Rows do not know of each other: q, k and v may go through one loop."""
    weight, moment = problem(9, 32)
    whole = quantized(weight, moment, OSP)
    parts = [quantized(part, moment, OSP) for part in weight.split([4, 2, 3])]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-9)


@pytest.mark.parametrize("block", [8, 12, 128])
def test_groups_take_their_scale_when_they_begin(block: int) -> None:
    """A row of groups of 8: each column is on at most 16 levels of its group, blocks change nothing, and it beats rounding."""
    weight, moment = problem(6, 24)
    protocol = replace(OSP, weight_group=8)
    got = quantized(weight, moment, replace(protocol, gptq_block=block))
    assert torch.allclose(got, quantized(weight, moment, protocol), atol=1e-6)
    assert all(len(group.unique()) <= 16 for row in got for group in row.split(8))
    assert cost(weight, got, moment) < cost(weight, round_to_nearest(weight, protocol), moment)


@pytest.mark.parametrize(("block", "group", "inputs"), [(128, 8, 24), (5, 8, 22), (8, 3, 20), (1, 1, 9)])
def test_groups_are_of_weights_that_have_moved(block: int, group: int, inputs: int) -> None:
    """A group's scale is of what every column before it has made of its weights, which the elimination in float64 confirms."""
    weight, moment = problem(6, inputs)
    got = quantized(weight, moment, replace(OSP, weight_group=group, gptq_block=block))
    expected = torch.tensor(naive.gptq(weight.numpy(), moment.numpy(), 4, group=group))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_act_order_quantises_what_weighs_most_first() -> None:
    """It is GPTQ of the permuted problem, put back."""
    weight, moment = problem(4, 20)
    order = moment.diagonal().argsort(descending=True)
    expected = torch.empty_like(weight)
    expected[:, order] = quantized(weight[:, order], moment[order][:, order], OSP)
    got = quantized(weight, moment, replace(OSP, gptq_act_order=True))
    assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(got, quantized(weight, moment, OSP), atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_inputs_lose_their_weights(symmetric: bool) -> None:
    """A channel that is always zero gets zero weights, and the others are finite."""
    weight, moment = problem(4, 12)
    moment[3], moment[:, 3] = 0, 0
    got = quantized(weight, moment, replace(OSP, weight_symmetric=symmetric))
    assert torch.isfinite(got).all() and not got[:, 3].any() and got.any()


def test_damping_is_raised_until_it_works() -> None:
    """A moment with a negative eigenvalue is factorised with the first damping that makes it positive."""
    moment = torch.eye(6, dtype=torch.float64)
    moment[0, 1] = moment[1, 0] = 1.05
    upper, damping = inverse_factor(moment, 0.01)
    assert damping == pytest.approx(0.1)
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(moment + 0.1 * torch.eye(6)), atol=1e-9)
    assert torch.equal(upper, upper.triu())


def test_a_hessian_that_nothing_helps_is_refused() -> None:
    """Every damping that was tried is named, and the linear."""
    moment = -torch.eye(4, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"layers\.3\.q: GPTQ cannot factorise .* damping of 0\.01, 0\.1, 1, 10"):
        inverse_factor(moment, 0.01, "layers.3.q")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    """The linear is named, before anything is damped."""
    moment = torch.eye(4, dtype=torch.float64)
    moment[2, 2] = value
    with pytest.raises(ModelError, match=r"layers\.1\.down: what it reads on the calibration text is not finite"):
        inverse_factor(moment, 0.01, "layers.1.down")
