from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trilobit.config.bench import BenchConfig
from trilobit.config.chat import ChatConfig
from trilobit.config.demo import DemoConfig
from trilobit.config.doctor import DoctorConfig
from trilobit.config.eval import EvalConfig
from trilobit.config.generate import GenerateConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError

NAN = float("nan")


def tune(**settings: Any) -> TuneConfig:
    return TuneConfig(**{"model": "m", "data": "d", **settings})


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 100_000), st.integers(1, 10**7))
def test_steps_are_whole_micro_batches(length: int, sequences: int, batch_tokens: int, max_tokens: int) -> None:
    """A step is a whole number of micro-batches, the nearest to batch_tokens and at least one; steps fit into the budget.
    A micro-batch has no more sequences than a step."""
    micro = length * max(1, min(sequences, round(batch_tokens / length)))
    nearest = max(1, round(batch_tokens / micro))
    assume(max_tokens >= nearest * micro)
    config = tune(sequence_length=length, sequences=sequences, batch_tokens=batch_tokens, max_tokens=max_tokens)
    assert config.accumulation == nearest
    assert config.tokens_per_step == config.accumulation * micro
    assert abs(config.tokens_per_step - batch_tokens) <= micro / 2 or config.accumulation == 1
    assert config.steps * config.tokens_per_step <= max_tokens < (config.steps + 1) * config.tokens_per_step
    assert config.steps >= 1


def test_defaults_are_valid() -> None:
    """By default there are about four thousand steps, of 1,024 tokens at least and 65,536 at most; small ones have small
    micro-batches, and a run of a few tokens is a step all the same."""
    config = tune()
    assert (config.micro_batch, config.accumulation, config.tokens_per_step, config.steps) == (5, 1, 2560, 3906)
    assert [tune(max_tokens=n).tokens_per_step for n in (1_000_000, 100_000_000, 10**9)] == [1024, 24_576, 65_536]
    assert [tune(max_tokens=n).tokens_per_step for n in (600, 2048)] == [512, 1024]
    large = tune(max_tokens=100_000_000)
    assert (large.micro_batch, large.accumulation) == (8, 6)


def test_there_is_a_teacher_unless_there_is_nothing_to_learn() -> None:
    """By default a run learns from the original's logits; a full-precision control does not, having the same."""
    assert tune().learns_from_original
    assert not tune(schedule="never").learns_from_original
    assert tune(schedule="never", distill="logits").learns_from_original
    assert not tune(distill="none").learns_from_original


def test_evaluations_stay_small_beside_training() -> None:
    """By default a thirty-second of the budget is held out for each evaluation, between 4,096 tokens and 65,536."""
    assert [tune(max_tokens=n).evaluation_tokens for n in (40_000, 320_000, 10**7)] == [4096, 10_000, 65_536]
    assert tune(max_tokens=10**7, eval_tokens=64).evaluation_tokens == 64


WRONG: list[tuple[dict[str, Any], str]] = [
    *[({name: 0}, f"--{name.replace('_', '-')} is 0") for name in (
        "sequence_length", "sequences", "keep_checkpoints", "clip", "lr", "max_tokens", "batch_tokens", "eval_tokens",
        "eval_every", "checkpoint_every", "ramp_fraction", "activation_ramp_fraction", "temperature",
    )],
    *[({name: -1}, f"--{name.replace('_', '-')} is -1") for name in (
        "clip", "weight_decay", "eval_every", "warmup_fraction", "decay_fraction", "overlap",
    )],
    *[({name: NAN}, f"--{name.replace('_', '-')} is nan") for name in (
        "clip", "lr", "weight_decay", "warmup_fraction", "decay_fraction", "overlap", "ramp_fraction",
        "activation_ramp_fraction",
    )],
    *[({name: 1.01}, f"--{name.replace('_', '-')} is 1.01") for name in (
        "warmup_fraction", "decay_fraction", "overlap", "ramp_fraction", "activation_ramp_fraction",
    )],
    *[({name: float("inf")}, f"--{name.replace('_', '-')} is inf") for name in ("lr", "weight_decay")],
    *[({"seed": seed}, f"--seed is {seed}; it must be from 0") for seed in (-1, 2**63)],
    ({"distill": "logits", "distill_weight": 1.5}, "--distill-weight is 1.5"),
    ({"distill": "logits", "temperature": NAN}, "--temperature is nan"),
    ({"distill": "none", "distill_weight": 0.5}, "--distill-weight and --temperature need --distill logits"),
    ({"schedule": "never", "temperature": 2.0}, "--distill-weight and --temperature need --distill logits"),
    ({"activation_schedule": "never"}, "--activation-schedule never: .* --activations none"),
    ({"activations": "none", "activation_schedule": "global"}, "--activation-schedule and .* need --activations int8"),
    ({"activations": "none", "activation_ramp_fraction": 0.5}, "--activation-ramp-fraction need --activations int8"),
    ({"schedule": "never", "activation_schedule": "global"}, "--schedule never leaves activations alone"),
    ({"dead_zone_bias": 0.0}, "--dead-zone-bias is 0.0"),
    ({"learned_ranges": True}, "--learned-ranges needs --scale row"),
    ({"learned_ranges": True, "scale": "row", "dead_zone_bias": 1e-3}, "--learned-ranges needs .* no --dead-zone-bias"),
    ({"distill": "logits", "distill_attention": 0.0}, "--distill-attention is 0.0"),
    ({"distill": "logits", "distill_hidden": 0.0}, "--distill-hidden is 0.0"),
    ({"distill": "none", "distill_hidden": 1.0}, "--distill-hidden needs --distill logits"),
    ({"distill": "none", "distill_attention": 1.0}, "--distill-attention needs --distill logits"),
    ({"distill_attention_layer": 1}, "--distill-attention-layer needs --distill-attention"),
    ({"reconstruct_tokens": 16_384}, "--reconstruct-tokens .* needs --schedule immediate, not global"),
    ({"reconstruct_tokens": 100, "schedule": "immediate"}, "--reconstruct-tokens 100 is less than one micro-batch"),
    ({"self_tokens": 10}, "--self-tokens needs --data self"),
    ({"lr": 2e-3, "weight_decay": 500.0}, "--weight-decay 500: at --lr 0.002 a step would turn weights round"),
    ({"data": "self", "self_tokens": 0}, "--self-tokens is 0"),
    ({"max_tokens": 16_383, "batch_tokens": 16_384}, "--max-tokens 16383 is less .* lower --sequence-length or --batch-tokens"),
    ({"max_tokens": 500, "batch_tokens": 100}, r"one step of 512 tokens \(1 sequences of 512\); lower --sequence-length\."),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[f"{next(iter(s))}={s[next(iter(s))]}" for s, _ in WRONG])
def test_wrong_settings_name_their_flag(settings: dict[str, Any], message: str) -> None:
    """A setting or combination that cannot work is a ConfigError that names the flag and the value."""
    with pytest.raises(ConfigError, match=message):
        tune(**settings)


def test_ends_of_ranges_are_allowed() -> None:
    """Fractions of zero and one, no weight decay, and one step are settings like any other."""
    tune(warmup_fraction=0, decay_fraction=0, overlap=0, weight_decay=0)
    tune(warmup_fraction=1, decay_fraction=1, overlap=1, ramp_fraction=1, clip=float("inf"))
    assert tune(max_tokens=16_384, batch_tokens=16_384).steps == 1
    tune(schedule="never", activation_schedule="never")


def test_configs_are_flat_and_frozen() -> None:
    """A configuration holds plain values only, so that run.json repeats it, and cannot be changed."""
    config = tune()
    assert all(value is None or type(value) in (str, int, float, bool) for value in asdict(config).values())
    assert TuneConfig(**asdict(config)) == config
    with pytest.raises(AttributeError):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvalConfig(model="m", data="d", sequence_length=1), "--sequence-length is 1"),
        (lambda: EvalConfig(model="m", data="d", sequences=0), "--sequences is 0"),
        (lambda: GenerateConfig(model="m", prompt="p", temperature=-1), "--temperature is -1"),
        (lambda: GenerateConfig(model="m", prompt="p", temperature=NAN), "--temperature is nan"),
        (lambda: GenerateConfig(model="m", prompt="p", seed=2**63), "--seed is 9223372036854775808"),
        (lambda: DemoConfig(seed=-1), "--seed is -1"),
        (lambda: GenerateConfig(model="m", prompt="p", top_p=0), "--top-p is 0"),
        (lambda: GenerateConfig(model="m", prompt="p", top_p=1.1), "--top-p is 1.1"),
        (lambda: GenerateConfig(model="m", prompt="p", temperature=float("inf")), "--temperature is inf"),
        (lambda: GenerateConfig(model="m", prompt="p", top_p=NAN), "--top-p is nan"),
        (lambda: GenerateConfig(model="m", prompt="p", top_k=-1), "--top-k is -1; it must be 0 or above"),
        (lambda: GenerateConfig(model="m", prompt="p", min_p=-0.1), "--min-p is -0.1; it must be from 0 to 1"),
        (lambda: GenerateConfig(model="m", prompt="p", min_p=1.1), "--min-p is 1.1"),
        (lambda: GenerateConfig(model="m", prompt="p", min_p=NAN), "--min-p is nan"),
        (lambda: GenerateConfig(model="m", prompt="p", repetition_penalty=0), "--repetition-penalty is 0; it must be above 0"),
        (lambda: GenerateConfig(model="m", prompt="p", repetition_penalty=NAN), "--repetition-penalty is nan"),
        (lambda: GenerateConfig(model="m", prompt="p", repetition_penalty=float("inf")), "--repetition-penalty is inf"),
        (lambda: GenerateConfig(model="m", prompt="p", threads=0), "--threads is 0; it must be from 1 to 256"),
        (lambda: BenchConfig(model="m", threads=257), "--threads is 257"),
        (lambda: DoctorConfig(threads=0), "--threads is 0"),
        (
            lambda: BenchConfig(model="m", engine="native", device="cuda:1"),
            "--engine native runs on the CPU, not on --device cuda:1",
        ),
        (lambda: ChatConfig(model="m", context=512), "--context 512 leaves no room for a turn beside --max-tokens 512"),
        (lambda: ChatConfig(model="m", seed=-1), "--seed is -1"),
        (lambda: ChatConfig(model="m", top_p=0), "--top-p is 0"),
    ],
)
def test_other_commands_name_their_flags_too(make, message: str) -> None:
    """eval, generate, chat and bench refuse their impossible settings by name."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_ends_of_sampling_settings_are_allowed() -> None:
    """Off, all and one are settings like any other; chat samples by default, generate does not."""
    GenerateConfig(model="m", prompt="p", temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1)
    GenerateConfig(model="m", prompt="p", temperature=1e-9, top_k=1, top_p=1e-9, min_p=1, repetition_penalty=0.1, threads=256)
    assert GenerateConfig(model="m", prompt="p").temperature == 0
    assert ChatConfig(model="m").temperature > 0
    assert ChatConfig(model="m", context=513).context == 513
