"""What `tune` decides before it trains, from its settings and the original: the surgery, what gains start from, λ over time."""

from typing import Any

import torch
from transformers import PreTrainedModel

from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError
from trilobit.surgery.ternary import Plan, TernarySpec, measure_rms
from trilobit.train.loop import autocast
from trilobit.train.schedule import StrengthSchedule, sensitivity_schedule, strength_schedule
from trilobit.train.windows import Windows

CALIBRATION_WINDOWS = 8


def spec_of(config: TuneConfig) -> TernarySpec:
    """The surgery that the settings ask for."""
    return TernarySpec(
        placement=config.placement, gain=config.gain, activations=config.activations, scale=config.scale,
        cover=config.cover, dead_zone_bias=config.dead_zone_bias or 0.0, learned_ranges=config.learned_ranges,
    )  # fmt: skip


def require_as_it_is(config: TuneConfig, plan: Plan) -> None:
    """Raise ConfigError unless the settings say what a model that is ternary already is, and that it goes on at λ = 1.

    It has no full-precision original that it could learn from, and from any other λ it would start as another function.
    """
    spec = plan.spec
    wanted: dict[str, Any] = {
        "schedule": "immediate", "distill": "none", "placement": spec.placement, "activations": spec.activations,
        "scale": spec.scale, "cover": spec.cover,
    }  # fmt: skip
    differ = [name for name, value in wanted.items() if getattr(config, name) != value]
    if config.activation_schedule not in (None, "immediate"):
        raise ConfigError(f"{config.model} is ternary already: it starts at λ = 1, drop --activation-schedule.")
    if config.dead_zone_bias or config.learned_ranges or config.reconstruct_tokens is not None:
        raise ConfigError(
            f"{config.model} is ternary already, and has no original: drop --dead-zone-bias, --learned-ranges and "
            "--reconstruct-tokens."
        )
    if differ:
        flags = " ".join(f"--{name} {value}" for name, value in wanted.items())
        raise ConfigError(
            f"{config.model} is ternary already. To train it on as it is, from λ = 1 and without an original to learn from, "
            f"say so: {flags} (here {differ[0]} is {getattr(config, differ[0])})."
        )


def calibrate(
    config: TuneConfig, plan: Plan | None, model: PreTrainedModel, windows: Windows, device: torch.device
) -> dict[str, float]:
    """Measured RMS of the inputs that get a norm, by path, over the first windows of the training order: what their gains start
    from. Of a model in parts every rank has to ask."""
    if plan is None or config.gain_init == "ones":
        return {}
    batch = windows.samples(0, CALIBRATION_WINDOWS)[:, :-1].to(device)
    normed = [path for path, linear in plan.linears.items() if linear.normed]
    with autocast(config.precision, device):
        return measure_rms(model, normed, batch.split(2))


def schedules_of(config: TuneConfig, layers: int, costs: list[float]) -> list[StrengthSchedule]:
    """λ of weights, λ of activations. costs: of each layer alone, in nats, where a schedule asks for them."""
    kinds = config.schedule, config.activation_schedule or config.schedule
    ramps = config.ramp_fraction, config.activation_ramp_fraction or config.ramp_fraction
    return [
        sensitivity_schedule(costs, config.max_tokens, ramp, config.overlap)
        if kind == "sensitivity"
        else strength_schedule(kind, layers, config.max_tokens, ramp, config.overlap)
        for kind, ramp in zip(kinds, ramps, strict=True)
    ]
