import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilobit.config.training import TrainingConfig
from trilobit.train.adamw import BLOCK, AdamW, State, from_blocks, to_blocks
from trilobit.train.loop import make_optimizer
from trilobit.train.mesh import Spread
from trilobit.train.muon import Muon

BETAS = (0.9, 0.95)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 300), (5,), (1, 1), (64, 33))]


def give_gradients(parameters: list[nn.Parameter], seed: int, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad_dtype = dtype
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device, dtype)


@pytest.mark.parametrize("copy_bytes", [1, 1 << 26])
def test_moments_in_bf16_are_torchs_step_rounded(copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps equal torch's fused AdamW whose moments are rounded to bf16 after each, to the bit, few at a time or all."""
    monkeypatch.setattr("trilobit.train.adamw.COPY_BYTES", dict.fromkeys((True, False), copy_bytes))
    ours, theirs = parameters(), parameters()
    optimizer = AdamW([{"params": ours}], 1e-2, BETAS, 0.1, "bf16")
    torchs = torch.optim.AdamW(theirs, lr=1e-2, betas=BETAS, weight_decay=0.1, fused=True)
    for seed in range(10):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimizer.step()
        torchs.step()
        for state in torchs.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    held = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert {t.dtype for t in held} == {torch.bfloat16}


def test_gradients_in_bf16_are_torchs_of_those_gradients() -> None:
    """Moments in fp32 see bf16 gradients as torch's see the same numbers in fp32."""
    ours, theirs = parameters(), parameters()
    optimizer = AdamW([{"params": ours}], 1e-2, BETAS)
    torchs = torch.optim.AdamW(theirs, lr=1e-2, betas=BETAS, weight_decay=0.0, fused=True)
    for seed in range(3):
        give_gradients(ours, seed, torch.bfloat16)
        for a, b in zip(ours, theirs, strict=True):
            assert a.grad is not None
            b.grad = a.grad.float()
        optimizer.step()
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_moments_in_bf16_do_not_stand_still() -> None:
    """Gradients of one size for 200 steps, where nothing but rounding stops a moment: the second ends within 8 % of their
    square, the first within 4 % of them, from above as from below. (At β₂ = 0.999 the second would stay where it began.)"""
    for start in (0.1, 10.0):
        (parameter,) = found = [nn.Parameter(torch.ones(100))]
        optimizer = AdamW([{"params": found}], 1e-4, BETAS, state="bf16")
        for size in (start, *[1.0] * 200):
            parameter.grad = torch.full((100,), size)
            optimizer.step()
        state = optimizer.state[parameter]
        assert (state["exp_avg_sq"].float() - 1).abs().max() <= 0.08
        assert (state["exp_avg"].float() - 1).abs().max() <= 0.04


@given(st.integers(0, 9), st.integers(1, 3 * BLOCK), st.integers(-30, 30), st.integers(0, 99))
@settings(deadline=None)
def test_blocks_hold_what_they_say(rows: int, columns: int, exponent: int, seed: int) -> None:
    """Of any shape and size, rows of zeros among them: within half a step of each block's scale; what was stored once is
    stored again as it is."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values[::3] = 0
    codes, scales = to_blocks(values)
    assert codes.shape == values.shape and scales.shape == (rows, -(-columns // BLOCK))
    back = from_blocks(codes, scales)
    steps = scales.repeat_interleave(BLOCK, dim=1)[:, :columns]
    assert ((back - values).abs() <= 0.5001 * steps).all()
    again, same = to_blocks(back)
    assert torch.equal(again, codes) and torch.allclose(same, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("state", "most"), [("bf16", 0.02), ("int8", 0.06)])
def test_muons_momentum_may_be_narrower(state: State, most: float) -> None:
    """Thirty steps along gradients that mostly agree: what the matrices have moved differs from fp32's by a few hundredths,
    and the momentum takes a half or little more than a quarter of its bytes."""
    start = torch.randn(48, 600, generator=torch.Generator().manual_seed(1))
    ends, states = [], []
    for kind in ("fp32", state):
        matrix = nn.Parameter(start.clone())
        optimizer = Muon([{"params": [matrix], "muon": True}], 1e-2, BETAS, state=kind)  # pyright: ignore[reportArgumentType]
        generator = torch.Generator().manual_seed(2)
        common = torch.randn(matrix.shape, generator=generator)
        for _ in range(30):
            matrix.grad = common + 2 * torch.randn(matrix.shape, generator=generator)
            optimizer.step()
        ends.append(matrix.detach() - start)
        states.append(sum(t.nbytes for t in optimizer.state[matrix].values()))
    assert 0 < (ends[1] - ends[0]).norm() <= most * ends[0].norm()
    assert states[1] <= {"bf16": 0.5, "int8": 0.27}[state] * states[0]


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig(data="d", max_tokens=10**6, **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("copy_bytes", [1, 1 << 26])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_moments_that_visit_change_nothing(state: State, copy_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that are copied for each step and copied back: AdamW's and Muon's steps to the bit, momentum in blocks and
    NorMuon's rows among them; one step's moments are another tensor than the step works on. On a GPU they are page-locked."""
    monkeypatch.setattr("trilobit.train.adamw.COPY_BYTES", dict.fromkeys((True, False), copy_bytes))
    ends = []
    for offload in (False, True):
        found = [nn.Parameter(parameter.detach().to(device)) for parameter in parameters()]
        groups = [{"params": found[:1], "muon": True}, {"params": found[1:]}]
        optimizer = Muon(groups, 1e-2, BETAS, 0.1, normuon=True, state=state, offload=offload)
        for seed in range(5):
            give_gradients(found, seed)
            optimizer.step()
        optimizer.settle()
        states = {f"{i}{name}": value for i, p in enumerate(found) for name, value in optimizer.state[p].items()}
        ends.append([*found, *(states[name] for name in sorted(states))])
        brought = optimizer.bring(optimizer.state[found[1]]["exp_avg"], found[1])
        same = brought.data_ptr() == optimizer.state[found[1]]["exp_avg"].data_ptr()
        assert same == (not offload and state == "fp32")
        assert optimizer.state[found[1]]["exp_avg"].is_pinned() == (offload and device == "cuda")
    assert len(ends[0]) == len(ends[1]) and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*ends, strict=True))


def test_a_backward_leaves_gradients_as_asked() -> None:
    """--gradients bf16: a backward leaves bf16, which is clipped by a norm in fp32 and stepped."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
    optimizer = make_optimizer(model, 1e-3, config(gradients="bf16"))
    model(torch.randn(5, 40)).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 4
    exact = torch.cat([g.float().flatten() for g in gradients]).norm()
    norm = Spread(model).clip(exact.item() / 2)
    assert norm.dtype == torch.float32 and torch.allclose(norm, exact)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad.float(), gradient.float() / 2, rtol=0.01, atol=0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
