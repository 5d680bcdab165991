from dataclasses import replace
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from trilobit.config.doctor import DoctorConfig
from trilobit.config.training import TrainingConfig
from trilobit.doctor import run
from trilobit.errors import ConfigError
from trilobit.train.adamw import COPY_BYTES, State
from trilobit.train.loop import make_optimizer
from trilobit.train.mesh import Arrangement
from trilobit.train.pieces import heights
from trilobit.train.plan import (
    Load,
    Rates,
    exchange,
    flops_of,
    memory_of,
    moment_bytes,
    muon_flops,
    plan,
    seconds_of,
    travel,
)
from trilobit.train.shape import VOCABULARY, Shape, read_shape, saved_by_a_layer, saved_bytes, shape_config

ONE = Arrangement("one", 1, 1, "")


@pytest.fixture(scope="module")
def small() -> Shape:
    return read_shape("llama-3m", 512)


def test_a_model_is_counted_without_memory(small: Shape) -> None:
    """Parameters, those in layers, Muon's and the embedding's are the sums that the sizes give by hand."""
    width, inner, layers, keys = 192, 512, 5, 2 * 32
    matrices = 2 * width * width + 2 * keys * width + 3 * width * inner
    assert small.muons == layers * matrices and len(small.matrices) == 7 * layers
    assert small.inside == layers * (matrices + 2 * width)
    assert small.embedding == VOCABULARY * width
    assert small.parameters == small.inside + 2 * small.embedding + width
    assert read_shape("llama-1.4b", 512).parameters == pytest.approx(1.416e9, rel=1e-3)  # arXiv 2506.19697


def test_what_autograd_keeps_is_counted_on_fake_tensors() -> None:
    """What a layer keeps, counted without memory, is what a real forward keeps: a byte a weight, and so much for each token (up
    to 5 % more: keys repeated for queries that share them); and that is how five layers and other lengths add up."""
    config = shape_config("llama-3m", 512)
    fixed, by_token = saved_by_a_layer(config)
    real = saved_by_a_layer(config, fake=False)
    assert fixed == pytest.approx(2 * 192**2 + 2 * 64 * 192 + 3 * 192 * 512, rel=0.01)
    assert real[0] == pytest.approx(fixed, rel=0.01) and 1 <= by_token / real[1] <= 1.05
    grown = saved_bytes(config, 5, 200, fake=False) - saved_bytes(config, 2, 200, fake=False)
    assert grown == pytest.approx(3 * (real[0] + 200 * real[1]), rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("state", "gradients"), [("fp32", "fp32"), ("bf16", "fp32"), ("int8", "bf16")])
def test_state_is_what_an_optimizer_holds(optimizer: str, state: State, gradients: Literal["fp32", "bf16"]) -> None:
    """Latents, gradients and moments of a plan are the bytes of a real model's after a step, but for the step counts."""
    config = shape_config("llama-3m", 64)
    config.vocab_size = 64
    model = AutoModelForCausalLM.from_config(config)
    settings = TrainingConfig(
        data="d", max_tokens=10**6, optimizer=optimizer, optimizer_state=state, gradients=gradients  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    stepper = make_optimizer(model, 1e-3, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    held_gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    stepper.step()
    held = [t for state in stepper.state.values() for t in state.values() if t.ndim]
    inside = sum(p.numel() for p in model.model.layers.parameters())
    shape = Shape(
        sum(p.numel() for p in model.parameters()), inside, read_shape("llama-3m", 64).matrices, 5, 192, 64, 64 * 192, 1, 0
    )
    found = memory_of(shape, ONE, Load(64, optimizer=optimizer, teacher=False, state=state, gradients=gradients))
    assert found["latents"] == sum(p.nbytes for p in model.parameters())
    assert found["gradients"] == held_gradients
    rounding = 0.005 if state == "int8" and optimizer == "muon" else 0  # rows that are no multiple of a block
    assert found["moments"] == pytest.approx(sum(t.nbytes for t in held), rel=rounding)


def test_parts_are_as_even_as_rows_allow() -> None:
    """The fullest of eight ranks holds 1 % more than an eighth of the 60 M Llama at most: what a plan leaves out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config("llama-60m", 512))
    fullest = sum(heights(p.shape[0], 8)[0] * p.numel() // p.shape[0] for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert total / 8 <= fullest <= 1.01 * total / 8


def test_more_ranks_hold_less_and_send_more(small: Shape) -> None:
    """Of FSDP's parts, state falls as 1/S and what is gathered stays; gradients of accumulated micro-batches stay whole; a
    machine's own links are faster than cards; Muon's work is shared by the owners."""
    load, rates = Load(512), Rates()
    four, eight = (Arrangement("fsdp", 1, n, "") for n in (4, 8))
    less, more = memory_of(small, eight, load), memory_of(small, four, load)
    assert more["latents"] == pytest.approx(2 * less["latents"], rel=1e-4) and more["gathered"] == less["gathered"]
    assert memory_of(small, eight, replace(load, accumulation=2))["gradients"] == 4 * small.parameters
    assert memory_of(small, ONE, load)["gathered"] == 0
    quiet = replace(rates, latency=0.0)
    assert travel(800, 8, quiet, 1) == pytest.approx(700 / quiet.nvlink)
    assert travel(800, 16, quiet, 1) == pytest.approx(max(400 / (8 * quiet.card), 700 / quiet.nvlink))
    assert travel(800, 16, quiet, 1, inside=1) == pytest.approx(750 / quiet.card)
    assert exchange(800, 8, quiet, 1) == pytest.approx(700 / quiet.nvlink)
    assert exchange(800, 16, quiet, 1) == pytest.approx(max(400 / quiet.card, 350 / quiet.nvlink))


def test_muon_waits_for_the_owner_of_the_most(small: Shape) -> None:
    """Ten matrices of one shape over four ranks take as long as three, over sixteen as long as one."""
    shape, free = replace(small, matrices=((64, 32),) * 10), Rates(latency=0.0, nvlink=float("inf"), card=float("inf"))
    one = muon_flops(64, 32) / (free.flops * free.muon_used)
    for parts, most in ((4, 3), (16, 1)):
        found = seconds_of(shape, Arrangement("fsdp", 1, parts, ""), Load(512), free)
        assert found["muon"] == pytest.approx(most * one)


def test_a_plan_needs_what_a_step_needs(small: Shape) -> None:
    """Nothing is counted but the parts of a step, of which those of a rank's rows fall with the ranks: however large a model
    is, enough of them hold all but what is gathered (old code: each had to hold the whole model once, 8 bytes a parameter)."""
    found = plan("m", small, 64, Load(512, teacher=True), mesh="fsdp", memory=9 * small.parameters)
    computing = sum(found.memory[name] for name in ("gathered", "activations", "logits", "loss"))
    assert found.memory["visiting"] == 0
    assert found.needed == sum(found.memory.values()) - min(computing, found.memory["muon"])
    more = 999 * small.inside  # all of it in layers
    huge = replace(small, parameters=small.parameters + more, inside=small.inside + more, layers=1000 * small.layers)
    rows = ("latents", "gradients", "moments")
    few, many = (plan("m", huge, gpus, Load(512, teacher=False), mesh="fsdp") for gpus in (64, 4096))
    assert sum(many.memory[name] for name in rows) == pytest.approx(sum(few.memory[name] for name in rows) / 64, rel=1e-4)
    assert many.needed < 8 * huge.parameters


def test_operations_of_the_iteration() -> None:
    """Five steps of two symmetric products and one more."""
    assert muon_flops(3, 5) == muon_flops(5, 3) == 5 * (4 * 9 * 5 + 2 * 27)


def test_operations_are_the_usual_six_a_parameter(small: Shape) -> None:
    """Without attention, recomputing and a teacher: 6 operations for each parameter that multiplies; a teacher and recomputing
    add a forward each."""
    bare = replace(small, layers=0)
    load = Load(512, recompute=False, teacher=False)
    assert flops_of(bare, load) == 6 * (small.parameters - small.embedding)
    assert flops_of(bare, replace(load, recompute=True, teacher=True)) == 10 * (small.parameters - small.embedding)


def test_doctor_plans_and_refuses() -> None:
    """`doctor --plan` gives memory by what it is for and the mesh with its reason; what cannot fit is a ConfigError with the
    numbers and what would help."""
    found = run(DoctorConfig(plan="llama-3m", gpus=8, sequence_length=512, optimizer="adamw"))
    said = found.summary()
    for word in (
        "ddp: a copy on each of 8 ranks",
        "latents",
        "activations",
        "tokens/s",
        "GB a rank, of 72 usable",
    ):
        assert word in said
    assert "one copy in 64 parts" in run(DoctorConfig(plan="llama-70b", gpus=64)).summary()
    with pytest.raises(ConfigError, match=r"(?s)needed .* GB a rank, of 0.*does not fit.*--gpus"):
        run(DoctorConfig(plan="llama-3m", gpus=8, gpu_memory=0.5, sequence_length=4096))
    with pytest.raises(ConfigError, match="is 16 ranks, but 8 were started"):
        run(DoctorConfig(plan="llama-3m", gpus=8, mesh="hsdp:2x8"))
    with pytest.raises(ConfigError, match="--gpus is 0"):
        DoctorConfig(plan="llama-3m", gpus=0)


def test_moments_that_visit_take_the_hosts_memory(small: Shape) -> None:
    """--offload leaves of the moments those of a few parameters, and adds their way there and back to a step."""
    load = Load(512, optimizer="adamw", teacher=False)
    here, there = plan("m", small, 1, load), plan("m", small, 1, replace(load, offload=True))
    assert here.memory["moments"] == moment_bytes(small, load) == 8 * small.parameters
    assert there.memory["moments"] == here.memory["visiting"] == 0
    assert there.memory["visiting"] == 8 * max(COPY_BYTES[False] // 4, small.embedding)
    assert there.host == here.memory["moments"] and here.host == 0
    assert there.seconds["host"] == pytest.approx(16 * small.parameters / Rates().host)
    assert there.step_seconds == pytest.approx(here.step_seconds + there.seconds["host"])
    assert "moments in the host's memory (0." in there.summary()
    parts = plan("m", small, 8, replace(load, offload=True), mesh="fsdp")
    assert parts.seconds["host"] == pytest.approx(there.seconds["host"] / 8)
    assert "in the host's memory" in run(DoctorConfig(plan="llama-3m", offload=True, sequence_length=64)).summary()


def test_rows_that_are_gathered_once_travel_once(small: Shape) -> None:
    """A step of two micro-batches gathers once instead of four times, and holds all parameters and a teacher whole for it."""
    load = Load(512, accumulation=2)
    layer, step = (plan("m", small, 8, load, mesh="fsdp", gather=how) for how in ("layer", "step"))
    fp32 = travel(4 * small.parameters, 8, Rates(), small.layers + 1)
    bf16 = travel(2 * small.parameters, 8, Rates(), small.layers + 1)
    assert step.seconds["network"] == pytest.approx(2 * fp32)
    assert layer.seconds["network"] == pytest.approx(5 * fp32 + 2 * bf16)
    layer_size, outside = small.inside // small.layers, small.parameters - small.inside
    assert step.memory["gathered"] == 4 * (small.parameters + layer_size + outside)
    assert layer.memory["gathered"] == 4 * (3 * layer_size + 2 * outside)
    assert step.memory["teacher"] - layer.memory["teacher"] == 2 * (small.inside - 2 * layer_size)
    assert "gathered once a step" in run(DoctorConfig(plan="llama-3m", gpus=4, mesh="fsdp", sequence_length=64)).summary()


def test_speed_is_bounded_by_the_slower_of_two(small: Shape) -> None:
    """A step takes the longer of computing and communicating, plus Muon; tokens a second follow."""
    found = plan("m", small, 64, Load(512), mesh="fsdp")
    assert found.step_seconds == max(found.seconds["compute"], found.seconds["network"]) + found.seconds["muon"]
    assert found.tokens_per_second == 64 * 512 / found.step_seconds


def test_narrow_gradients_are_one_gpus() -> None:
    """--gradients bf16 halves a plan's gradients on one GPU, and is refused on several."""
    settings = {"plan": "llama-60m", "gradients": "bf16", "optimizer_state": "int8"}
    found = run(DoctorConfig(**settings))
    plain = run(DoctorConfig(plan="llama-60m"))
    assert found.memory["gradients"] == plain.memory["gradients"] / 2  # pyright: ignore[reportAttributeAccessIssue]
    assert "moments in int8, gradients in bf16" in found.summary()
    with pytest.raises(ConfigError, match="for one GPU"):
        run(DoctorConfig(**settings, gpus=2))
