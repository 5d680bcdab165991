"""What every training command does with its run directory, whatever it trains.

A run is a class with stages between which a signal may stop it. It claims its directory before it writes there, and what
begins it is in run.json before the first step, so that --resume finds everything that was decided (record.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from trilobit.config.training import TrainingConfig
from trilobit.errors import DataError, OutputError
from trilobit.infer.load import pick_device
from trilobit.listener import Listener
from trilobit.measure.perplexity import nats
from trilobit.storage import alone_in, read_json, require_free_space, require_new_directory, write_json
from trilobit.surgery.roles import decoder_layers
from trilobit.train.checkpoint import BYTES_PER_PARAMETER, list_checkpoints
from trilobit.train.data import Tokens
from trilobit.train.loop import Signals, muon_matrices
from trilobit.train.record import record_to_resume
from trilobit.train.track import Track, tracker
from trilobit.train.windows import Windows, evaluation_windows

Config = TypeVar("Config", bound=TrainingConfig)
Result = TypeVar("Result")


class Run(ABC, Generic[Config, Result]):
    """One run, from its configuration to its result. Subclasses give the stages; `whole` is their order."""

    model: PreTrainedModel
    record: dict[str, Any]

    def __init__(
        self, config: Config, listener: Listener, signals: Signals, track: Track, out: Path, device: torch.device
    ) -> None:
        self.config, self.listener, self.signals, self.track = config, listener, signals, track
        self.out, self.device = out, device

    def whole(self, record: dict[str, Any] | None) -> Result:
        """Everything. `record`: run.json of the run to continue."""
        self.load(record)
        self.signals.raise_if_set()
        self.set_tokens(self.read_tokens())
        self.signals.raise_if_set()
        self.record = self.begin() if record is None else self.go_on(record)
        self.signals.raise_if_set()
        self.operate()
        self.make_directory()
        with alone_in(self.out):
            self.require_unchanged(record)
            write_json(self.out / "run.json", self.record)
            self.train()
            result = self.finish()
            write_json(self.out / "run.json", self.record | {"result": asdict(result)})  # pyright: ignore[reportArgumentType]
            return result

    @abstractmethod
    def load(self, record: dict[str, Any] | None) -> None:
        """The model before training."""

    @abstractmethod
    def read_tokens(self) -> Tokens:
        """What is trained and measured on."""

    @abstractmethod
    def begin(self) -> dict[str, Any]:
        """run.json of a new run: everything that is decided before training."""

    @abstractmethod
    def operate(self) -> None:
        """Make of the model what is trained. Nothing has been written yet."""

    @abstractmethod
    def train(self) -> None:
        """All steps that are left."""

    @abstractmethod
    def finish(self) -> Result:
        """What remains beside run.json and log.jsonl; the result makes the run a finished one."""

    def set_tokens(self, tokens: Tokens) -> None:
        """The windows that are trained and measured on."""
        config, self.tokens = self.config, tokens
        self.listener.note(f"data: {tokens.description}")
        self.windows = Windows(tokens.train, config.sequence_length, config.seed)
        self.heldout = evaluation_windows(tokens.heldout, config.sequence_length, config.evaluation_tokens)
        seen, there = config.steps * config.tokens_per_step, self.windows.count * config.sequence_length
        if seen > there:
            self.listener.note(f"the data is seen {seen / there:.1f} times")

    def go_on(self, record: dict[str, Any]) -> dict[str, Any]:
        """`record`, the run.json of the run to continue, if the text is still the same."""
        if (record["data_key"], record["data_sha256"]) != (self.tokens.key, self.tokens.sha256):
            raise DataError(
                f"the text of --data {self.config.data} has changed since {self.out} began; --resume needs the same text."
            )
        return record

    def make_directory(self) -> None:
        there = len(list_checkpoints(self.out)) if self.out.exists() else 0
        more = max(1, self.config.keep_checkpoints + 1 - there)
        parameters = sum(p.numel() for p in self.model.parameters())
        require_free_space(self.out, more * BYTES_PER_PARAMETER * parameters, "The run")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.out}: {error.strerror or error}.") from error

    def require_unchanged(self, record: dict[str, Any] | None) -> None:
        """Raise OutputError if another process began or finished a run here since this one looked."""
        path = self.out / "run.json"
        if (read_json(path) if path.exists() else None) != record:
            raise OutputError(f"{self.out} is not as it was: another process has been working in it.")

    def evaluate(self) -> dict[str, float]:
        """Held-out loss at the run's precision, between steps."""
        total, count = nats(self.model, self.heldout, self.config.sequences, self.config.precision, self.listener)
        return {"heldout_nats": total / count}

    def layers(self) -> int:
        return len(decoder_layers(self.model))

    def note_optimizer(self) -> None:
        """Say what Muon trains, if it trains anything."""
        if self.config.optimizer == "muon":
            matrices, total = muon_matrices(self.model, self.config), sum(p.numel() for p in self.model.parameters())
            share = sum(p.numel() for p in matrices) / total
            self.listener.note(f"Muon trains {len(matrices)} matrices, {share:.0%} of the parameters; AdamW the rest")


def start(
    kind: Callable[..., Run[Config, Result]], config: Config, name: str, listener: Listener, decided: frozenset[str]
) -> Result:
    """Begin or continue a run in --out, or in out/`name`. decided: what run.json must have for one that is continued."""
    with Signals(say=listener.note).watch() as signals:
        out = Path(config.out or f"out/{name}")
        record = record_to_resume(out, config, decided) if config.resume else None
        if record is None:
            require_new_directory(out, f"Continue it with --resume, or choose another name with --out {out}-2.")
        elif "result" in record:
            raise OutputError(f"{out} has finished already; its model is in {out / 'model'}.")
        with tracker(config.track, out, asdict(config)) as track:
            return kind(config, listener, signals, track, out, pick_device(config.device)).whole(record)
