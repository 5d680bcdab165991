"""A step never waits for the device: no value of a tensor is asked for between batches, but for the row that is logged.

On a GPU each question (`item`, `bool`, `tolist`, a mask as index) empties the queue of kernels. They are the same questions
on a CPU, where an operator answers them, and where they can be counted.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import trilobit
from families import VOCABULARY, build
from trilobit.config.tune import TuneConfig
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize
from trilobit.train import loop
from trilobit.train.loop import Hooks, Signals, fit
from trilobit.train.objective import TuneObjective, frozen_copy
from trilobit.train.windows import Windows

ATEN = torch.ops.aten
QUESTIONS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}
PACKAGE = str(Path(trilobit.__file__).parent)
STEPS, STEP_TOKENS = 4, 32


class Questions(TorchDispatchMode):
    """Which function of trilobit asked, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in QUESTIONS:
            own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            self.asked.append(f"{Path(own[-1].filename).name}: {own[-1].name}")
        return func(*args, **(kwargs or {}))


def asked_in_steps(folder: Path, monkeypatch: pytest.MonkeyPatch, asks: bool = False, **settings: Any) -> list[str]:
    """Who asked in STEPS steps of two micro-batches of a ternary Llama at λ = 0.5, 1, 1, 1, taught by its original."""
    config = TuneConfig(
        model="m", data="d", sequence_length=8, sequences=2, batch_tokens=STEP_TOKENS, max_tokens=STEPS * STEP_TOKENS,
        checkpoint_every=10**9, eval_every=10**9, device="cpu", **{"precision": "bf16", **settings},
    )  # fmt: skip
    model = build("llama")
    teacher = frozen_copy(model, config.precision)
    ternarize(model, TernarySpec())
    objective = TuneObjective(config, model, teacher)

    def asking(batch: torch.Tensor) -> Any:
        losses = objective(batch)
        assert not asks or float(losses.total) > 0
        return losses

    def before_step(tokens: int) -> dict[str, float]:
        strength = 1.0 if tokens else 0.5
        set_strengths(model, [strength] * 3, [strength] * 3)
        return {"lambda": strength}

    rng = np.random.default_rng(0)
    windows = Windows(rng.integers(0, VOCABULARY, 801).astype(np.uint16), config.sequence_length, config.seed)
    monkeypatch.setattr(loop, "Checkpoints", NoCheckpoints)
    with Questions() as questions:
        fit(model.train(), windows, asking, config, 1e-3, folder, torch.device("cpu"), Signals(), Hooks(before_step))
    return questions.asked


class NoCheckpoints:
    def __init__(self, *_: Any) -> None: ...

    def load(self) -> loop.Progress:
        return loop.Progress(0, 0, 0.0)

    def save(self, *_: Any) -> None: ...

    def settle(self) -> None: ...


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_logged_row_asks(optimizer: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step asks what it would not ask on a CPU alone; each row asks once whether all was finite and once for each
    of its numbers, each checkpoint once whether the weights are. (Old code: transformers asked in every forward, of student
    and teacher.)"""
    asked = Counter(asked_in_steps(tmp_path, monkeypatch, optimizer=optimizer, precision=precision))
    assert asked.pop("head_loss.py: backward") == 2 * STEPS  # whether there is anything to multiply by; read on a CPU alone
    if optimizer == "muon":
        assert asked.pop("muon.py: _move") == 3 * 7 * STEPS  # whether a matrix is held back; read on a CPU alone
    assert asked.pop("loop.py: noticed") == STEPS
    assert asked.pop("loop.py: _not_finite") == 1  # whether weights are fit to be saved: of a checkpoint, not of a step
    assert sum(asked.values()) == 4 * STEPS  # loss, cross-entropy, divergence; norm of the gradient
    assert set(asked) <= {"loop.py: fit", "loop.py: <dictcomp>"}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_question_in_a_step_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter(asked_in_steps(tmp_path, monkeypatch, asks=True))
    assert sum(asked.values()) == STEPS * (1 + 4 + 2 + 2) + 1  # the last for the checkpoint at the end


def test_transformers_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told to transformers holds while a run trains, and no longer."""
    before = masking_utils.find_packed_sequence_indices
    seen = []
    monkeypatch.setattr(loop, "learning_rate", lambda *_: seen.append(masking_utils.find_packed_sequence_indices) or 1e-3)
    asked_in_steps(tmp_path, monkeypatch)
    assert len(seen) == STEPS and before not in seen
    assert masking_utils.find_packed_sequence_indices is before
