import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilobit.config.training import TrainingConfig
from trilobit.errors import ModelError, NonFiniteError, OutputError
from trilobit.nn.ternary import TernaryLinear
from trilobit.train import loop as loop_module
from trilobit.train.checkpoint import list_checkpoints
from trilobit.train.distill import Losses
from trilobit.train.loop import Hooks, Interrupted, Signals, autocast, fit, make_optimizer
from trilobit.train.schedule import learning_rate
from trilobit.train.windows import Windows

VOCABULARY, WIDTH, STEPS = 11, 6, 8
CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    data="d", sequence_length=4, sequences=2, batch_tokens=24, max_tokens=24 * STEPS, precision="fp32", seed=3,
    warmup_fraction=0.2, checkpoint_every=72, eval_every=48,
)  # fmt: skip
TIMES = {"seconds", "tokens_per_second"}


class Toy(nn.Module):
    """Next-token logits from the token alone, through a matrix, a gain and dropout."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(ids)))


def windows() -> Windows:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 401).astype(np.uint16)
    return Windows(tokens, CONFIG.sequence_length, CONFIG.seed)


def objective_of(model: nn.Module) -> Callable[[Tensor], Losses]:
    def objective(batch: Tensor) -> Losses:
        loss = F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        return Losses(loss, loss.detach())

    return objective


def train(run: Path, model: nn.Module | None = None, config: TrainingConfig = CONFIG, **options: Any) -> nn.Module:
    run.mkdir(exist_ok=True)
    model = Toy() if model is None else model
    objective = options.pop("objective", objective_of(model))
    signals = options.pop("signals", Signals())
    fit(model, windows(), objective, config, 0.05, run, CPU, signals, Hooks(**options))
    return model


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_the_loop_is_adamw(tmp_path: Path) -> None:
    """Steps are a naive loop's: windows in order, mean gradient of the micro-batches, clipped norm, AdamW (.9, .95), the
    schedule's rate; weight decay on matrices only."""
    config = replace(CONFIG, weight_decay=0.3, clip=0.05)
    found = train(tmp_path / "run", config=config)
    model = Toy()
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(STEPS):
        model.zero_grad()
        batch = windows().samples(step * 6, 6)  # one batch: the mean over equal micro-batches is the mean over all
        objective_of(model)(batch).total.backward()
        grads = {name: p.grad.double() for name, p in model.named_parameters()}  # pyright: ignore
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        assert rows(tmp_path / "run")[step]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert norm > config.clip
        rate = learning_rate(config, 0.05, step * 24)
        assert rows(tmp_path / "run")[step]["lr"] == rate
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = grads[name] * (config.clip / (norm + 1e-6))
                m, v = state[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                if p.ndim >= 2:
                    p.mul_(1 - rate * config.weight_decay)
                p.sub_(rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    for (name, x), y in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5), name


def test_a_row_a_step(tmp_path: Path) -> None:
    """Each step is one row with step, tokens, losses, rate, gradient norm, speed and what the hook returns; held-out numbers
    come every eval_every tokens and at the end; listeners hear the same rows."""
    heard: list[dict[str, Any]] = []
    train(
        tmp_path / "run", before_step=lambda tokens: {"lambda": tokens / 192}, evaluate=lambda: {"heldout_nats": 1.5},
        log=[heard.append],
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == heard
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in lines] == [24 * step for step in range(1, STEPS + 1)]
    assert [row["lambda"] for row in lines] == [step / 8 for step in range(STEPS)]
    assert [row["step"] for row in lines if "heldout_nats" in row] == [2, 4, 6, 8]
    for row in lines:
        assert {"loss", "cross_entropy", "lr", "gradient_norm", *TIMES} <= row.keys()
        assert row["tokens_per_second"] > 0
    seconds = [row["seconds"] for row in lines]
    assert seconds == sorted(seconds)


def test_ternary_weights_are_quantised_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several micro-batches all use the codes made before the first; with one, or outside a step, nothing is kept; what is
    trained is what it would be without keeping them."""
    made: list[bool] = []
    quantized = TernaryLinear.quantized

    def counted(self: TernaryLinear) -> tuple[Tensor, Tensor]:
        made.append(self.kept is None)
        return quantized(self)

    monkeypatch.setattr(TernaryLinear, "quantized", counted)
    trained = []
    for folder, sequences in (("one", 6), ("three", 2), ("anew", 2)):
        model = Toy()
        model.head = TernaryLinear.from_linear(model.head)
        with monkeypatch.context() as patch:
            if folder == "anew":
                patch.setattr("trilobit.train.loop.kept_codes", lambda model: nullcontext())
            made.clear()
            train(tmp_path / folder, model, replace(CONFIG, sequences=sequences))
        assert made == [True] * (STEPS if folder == "three" else 0)
        assert model.head.kept is None
        trained.append(model.head.weight.detach())
    assert torch.equal(trained[1], trained[2])


def test_accumulation_changes_only_rounding(tmp_path: Path) -> None:
    """Three micro-batches of two sequences are one of six."""
    small, large = train(tmp_path / "a"), train(tmp_path / "b", config=replace(CONFIG, sequences=6))
    for x, y in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-6)
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize(("dropout", "narrow"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_a_signal_saves_and_the_rest_is_bit_exact(at: int, dropout: float, narrow: bool, tmp_path: Path) -> None:
    """SIGTERM during any step stops after it with exit code 143, and the continued run's weights and log are those of one that
    was not interrupted, with dropout, with moments and gradients in bf16, and whatever random state the second process starts
    from."""
    config = replace(CONFIG, optimizer_state="bf16", gradients="bf16") if narrow else CONFIG
    whole = train(tmp_path / "whole", Toy(dropout), config)

    def stop(tokens: int) -> dict[str, float]:
        if tokens == (at - 1) * 24:
            signal.raise_signal(signal.SIGTERM)
        return {}

    torch.manual_seed(99)
    with Signals().watch() as signals, pytest.raises(Interrupted, match="SIGTERM") as caught:
        train(tmp_path / "run", Toy(dropout), config, signals=signals, before_step=stop)
    assert caught.value.exit_code == 143
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{at}"]
    assert len(rows(tmp_path / "run")) == at
    torch.manual_seed(1234)
    resumed = train(tmp_path / "run", Toy(dropout), config)
    assert_same(whole, resumed)
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


def test_a_killed_run_repeats_what_was_not_saved(tmp_path: Path) -> None:
    """Killed five steps in, with a checkpoint at three and a row cut in half, a run continues from three, its log without
    doubles or gaps, to the same weights."""

    def die(tokens: int) -> dict[str, float]:
        if tokens == 5 * 24:
            raise RuntimeError("killed")
        return {}

    whole = train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "run", before_step=die)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "tok')
    heard: list[dict[str, Any]] = []
    assert_same(whole, train(tmp_path / "run", log=[heard.append]))
    assert [row["step"] for row in heard] == [4, 5, 6, 7, 8]
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


def test_a_log_that_cannot_be_rewritten_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when a resumed run shortens its log is an OutputError, and the log is as before (old code: a
    traceback)."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"log\.jsonl: No space left on device"):
        loop_module._forget_rows_after(log, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert len(log.read_text().splitlines()) == 2


def test_a_damaged_checkpoint_stops_the_run(tmp_path: Path) -> None:
    """A truncated checkpoint is refused; training does not silently begin again, and the log stays as it was."""
    train(tmp_path / "run")
    (path,) = list_checkpoints(tmp_path / "run")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged"):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_checkpoints_come_by_tokens(tmp_path: Path) -> None:
    """One checkpoint is written each time checkpoint_every tokens are crossed, and one at the end."""
    train(tmp_path / "run", config=replace(CONFIG, keep_checkpoints=9))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-3", "step-6", "step-8"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(what: str, value: float, tmp_path: Path) -> None:
    """A non-finite loss, or a gradient alone, in any micro-batch stops the run; step and batch are named, the weights are those
    after the last good update, and neither row nor checkpoint of the bad step exists."""
    good = train(tmp_path / "good", config=CONFIG)
    model = Toy()
    plain, calls = objective_of(model), []

    class Bend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * value

    def objective(batch: Tensor) -> Losses:
        calls.append(1)
        losses = plain(batch)
        if len(calls) == 4 * 3 + 2:  # the second micro-batch of step 5
            total = losses.total * value if what == "loss" else Bend.apply(losses.total)
            return Losses(total, losses.cross_entropy)  # pyright: ignore[reportArgumentType]
        return losses

    with pytest.raises(NonFiniteError, match=rf"step 5: the {what} is not finite.*samples 24 to 29 of the seed-3 order"):
        train(tmp_path / "run", model, objective=objective)
    assert rows(tmp_path / "run") == rows(tmp_path / "good")[:4]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-3"]

    def stop(tokens: int) -> dict[str, float]:
        if tokens == 4 * 24:
            raise RuntimeError
        return {}

    four = Toy()
    with pytest.raises(RuntimeError):
        train(tmp_path / "four", four, before_step=stop)
    assert_same(four, model)
    assert not torch.equal(good.head.weight, model.head.weight)  # pyright: ignore


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A checkpoint between evaluations is not made of weights that the step before it broke; the parameter is named."""
    model = Toy()

    def spoil(row: dict[str, Any]) -> None:
        if row["step"] == 3:  # the one that is saved
            with torch.no_grad():
                model.head.weight[0, 0] = float("inf")  # pyright: ignore

    with pytest.raises(NonFiniteError, match=r"after step 3 head\.weight is not finite\. The last update broke"):
        train(tmp_path / "run", model, log=[spoil])
    assert list_checkpoints(tmp_path / "run") == []


def test_updates_are_held_back_until_the_report(tmp_path: Path) -> None:
    """Where steps are not looked at one by one, a bad one and all after it leave weights and moments alone; it is reported."""
    model = Toy()
    optimizer = make_optimizer(model, 0.1, CONFIG)
    guard = loop_module._Guard(CPU)
    for step, loss in enumerate([1.0, 2.0, float("nan"), 3.0]):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if step == 2 else 1.0)
        if step == 2:
            before = [p.detach().clone() for p in model.parameters()]
            moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
        guard.admit(torch.tensor(loss), torch.tensor(1.0), step, optimizer)
        optimizer.step()
    for p, old, moment in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)
        assert optimizer.state[p]["step"] == 2
    assert guard.noticed()
    tokens = 2 * CONFIG.tokens_per_step
    settings = f"lr {learning_rate(CONFIG, 0.1, tokens):.4g}, lambda {tokens / 1000:.4g}"  # of that step, not of a later one
    said = str(guard.error(windows(), CONFIG, 0.1, lambda tokens: {"lambda": tokens / 1000}))
    assert said.startswith(f"step 3: the loss is not finite (loss nan, gradient norm 1.0; {settings})")


def test_latents_are_fp32(tmp_path: Path) -> None:
    """A parameter in bf16 is our own mistake and is asserted against; frozen ones are not trained."""
    model = Toy()
    model.head.weight.requires_grad_(False)
    groups = make_optimizer(model, 0.1, replace(CONFIG, weight_decay=0.5)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.5), (1, 0.0)]
    with pytest.raises(AssertionError, match="fp32"):
        make_optimizer(Toy().bfloat16(), 0.1, CONFIG)


def test_bf16_is_autocast(tmp_path: Path) -> None:
    """With --precision bf16 products are bf16, and weights, moments and the logged loss stay fp32 and nearly the same."""
    seen = set()
    model = Toy()

    def objective(batch: Tensor) -> Losses:
        logits = model(batch[:, :-1])
        seen.add(logits.dtype)
        return objective_of(model)(batch)

    train(tmp_path / "run", model, replace(CONFIG, precision="bf16"), objective=objective)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(tmp_path / "fp32")
    for a, b in zip(rows(tmp_path / "run"), rows(tmp_path / "fp32"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    with autocast("fp32", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_full_disk_ends_with_what_to_do(tmp_path: Path) -> None:
    """A log that cannot be written is an OutputError with its path, not a traceback."""
    (tmp_path / "run").mkdir()
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OutputError, match=r"cannot write /dev/full: No space left on device.*--resume"):
        loop_module._append(Path("/dev/full"), {"step": 1})


def test_signals_are_put_back_and_the_second_one_insists() -> None:
    """The first signal is remembered, the second is a KeyboardInterrupt; afterwards the old handlers are back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with Signals().watch() as signals:
        signals.raise_if_set()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            signals.raise_if_set()
        assert caught.value.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in before} == before


def test_other_threads_keep_their_hands_off_signals() -> None:
    """Outside the main thread handlers cannot be set, and training goes on without."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with Signals().watch() as signals:
                signals.raise_if_set()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []


def test_a_signal_is_answered_at_once() -> None:
    """Whoever listens hears of the first signal when it arrives, long before the step ends."""
    heard: list[str] = []
    with Signals(say=heard.append).watch() as signals:
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGTERM
    assert heard == ["SIGTERM: the run stops as soon as it can; a second signal ends it at once"]


def test_a_signal_in_a_step_hears_when_it_is_obeyed(tmp_path: Path) -> None:
    """In the middle of a step: after it (and the evaluation that is due), and that a second one ends at once."""
    heard: list[str] = []

    def stop(tokens: int) -> dict[str, float]:
        if tokens == 24:
            signal.raise_signal(signal.SIGINT)
        return {}

    with Signals(say=heard.append).watch() as signals, pytest.raises(Interrupted, match="SIGINT"):
        train(tmp_path / "run", signals=signals, before_step=stop)
    (text,) = heard
    assert text.startswith("SIGINT: the run stops after the step in progress")
    assert "a second signal ends it at once" in text


def test_a_signal_in_an_evaluation_is_obeyed_after_it(tmp_path: Path) -> None:
    """And not only after another step (old code: one more was trained)."""

    def evaluate() -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    with Signals().watch() as signals, pytest.raises(Interrupted, match="SIGTERM") as stopped:
        train(tmp_path / "run", signals=signals, evaluate=evaluate)
    assert stopped.value.saved == 2
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-2"]


def test_a_listener_that_is_gone_costs_no_checkpoint(tmp_path: Path) -> None:
    """Where saying that a signal arrived fails (a closed pipe), the run is saved and stopped as ever."""

    def gone(text: str) -> None:
        raise BrokenPipeError

    def stop(tokens: int) -> dict[str, float]:
        if tokens == 24:
            signal.raise_signal(signal.SIGTERM)
        return {}

    with Signals(say=gone).watch() as signals, pytest.raises(Interrupted, match="SIGTERM"):
        train(tmp_path / "run", signals=signals, before_step=stop)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-2"]
