"""What every training command does with its run directory, whatever it trains.

A run is a class with stages between which a signal may stop it. It claims its directory before it writes there, and what
begins it is in run.json before the first step, so that --resume finds everything that was decided (record.py).

Several ranks (distributed.py) go through the same stages: rank 0 decides, writes and finishes; the others load the same
model, or their part of it, and the same text, measure and train.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from trilobit.config.training import TrainingConfig
from trilobit.errors import LAST_UPDATE, ConfigError, DataError, ModelError, NonFiniteError, OutputError
from trilobit.infer.loaded import pick_device
from trilobit.listener import SILENT, Listener
from trilobit.locks import alone_in
from trilobit.storage import read_json, require_free_space, require_new_run, write_json
from trilobit.surgery.roles import decoder_layers
from trilobit.train.checkpoint import BYTES_PER_PARAMETER, list_checkpoints
from trilobit.train.data import Tokens
from trilobit.train.distributed import Ranks, Team, require_even_parts
from trilobit.train.evaluate import shared_nats
from trilobit.train.loop import muon_matrices
from trilobit.train.meeting import open_team, restarts, several
from trilobit.train.mesh import (
    WHOLE_BYTES,
    Arrangement,
    Shards,
    Spread,
    arrange,
    arrangement_for,
    device_memory,
    spread_over,
)
from trilobit.train.muon import has_conv1d, routing
from trilobit.train.pace import Forecast
from trilobit.train.parts import stay_whole
from trilobit.train.precision import decide_precision
from trilobit.train.record import record_to_resume
from trilobit.train.signals import Signals
from trilobit.train.track import Track, tracker
from trilobit.train.windows import Windows, evaluation_windows

Config = TypeVar("Config", bound=TrainingConfig)
Result = TypeVar("Result")


class Run(ABC, Generic[Config, Result]):
    """One run, from its configuration to its result. Subclasses give the stages; `whole` is their order."""

    model: PreTrainedModel
    record: dict[str, Any]
    fingerprint: str
    arrangement: Arrangement | None = None
    spread: Spread
    mesh: DeviceMesh | None = None
    """Where the model has been in parts from the beginning; then it has a structure, too, the same on meta."""
    structure: Any = None
    result_type: ClassVar[type]

    def __init__(
        self, config: Config, listener: Listener, signals: Signals, track: Track, out: Path, device: torch.device, team: Team
    ) -> None:
        self.config, self.listener, self.signals, self.track = config, listener, signals, track
        self.out, self.device, self.team = out, device, team
        self.forecast = Forecast(listener.note, config.max_tokens, budget=not config.resume)

    def whole(self, record: dict[str, Any] | None) -> Result:
        """Everything. `record`: run.json of the run to continue."""
        team = self.team
        self.load(record)
        team.stop_if_asked(self.signals)
        self.set_tokens(team.by_node(self.read_tokens))
        team.stop_if_asked(self.signals)
        if record is None:
            team.together(self.measure)
        self.record = team.shared(self.begin) if record is None else self.go_on(record)
        team.together(self.require_same)
        team.stop_if_asked(self.signals)
        team.together(self.operate)
        with ExitStack() as stack:
            team.together(lambda: self.claim(record, stack))
            self.train()
            self.settle()
            kept: list[Result] = []
            value = team.shared(lambda: self.conclude(kept))
            return kept[0] if kept else self.result_type(**value)

    def claim(self, record: dict[str, Any] | None, stack: ExitStack) -> None:
        """The run directory, held until `stack` is left, with run.json in it. Rank 0's alone."""
        if self.team.first:
            self.make_directory()
            stack.enter_context(alone_in(self.out))
            self.require_unchanged(record)
            write_json(self.out / "run.json", self.record)

    def conclude(self, kept: list[Result]) -> dict[str, Any]:
        """The result, put into `kept`, and as JSON into run.json."""
        kept.append(self.finish())
        value = asdict(kept[0])  # pyright: ignore[reportArgumentType]
        write_json(self.out / "run.json", self.record | {"result": value})
        return value

    def require_same(self) -> None:
        """Raise ModelError or DataError if this rank has another model or other text than rank 0."""
        if self.team.size == 1:
            return
        if self.record["base"] != self.fingerprint:
            raise ModelError(
                f"rank {self.team.rank} has loaded other weights than rank 0: is it the same checkpoint everywhere?"
            )
        if (self.record["data_key"], self.record["data_sha256"]) != (self.tokens.key, self.tokens.sha256):
            raise DataError(f"rank {self.team.rank} has other text under --data {self.config.data} than rank 0.")

    @abstractmethod
    def load(self, record: dict[str, Any] | None) -> None:
        """The model before training, its fingerprint, and how the ranks share it (`arrange`)."""

    @abstractmethod
    def read_tokens(self) -> Tokens:
        """What is trained and measured on."""

    def measure(self) -> None:
        """What `begin` has to know of the model and every rank has to take part in. Of a new run only."""

    @abstractmethod
    def begin(self) -> dict[str, Any]:
        """run.json of a new run: everything that is decided before training. Rank 0's alone."""

    @abstractmethod
    def operate(self) -> None:
        """Make of the model what is trained. Nothing has been written yet."""

    @abstractmethod
    def train(self) -> None:
        """All steps that are left."""

    def settle(self) -> None:
        """After the last step, what every rank has to take part in, as a model in parts is nowhere whole."""

    @abstractmethod
    def finish(self) -> Result:
        """What remains beside run.json and log.jsonl; the result makes the run a finished one. Rank 0's alone."""

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

    def arrange(self, parameters: int) -> Arrangement:
        """How the ranks share a model of so many parameters; said."""
        team, memory = self.team, device_memory(self.device, self.team.local_size)
        config = self.config
        self.arrangement = found = arrangement_for(
            team, config.mesh, parameters, memory, config.gather, config.optimizer, self.whole_bytes
        )
        if team.size > 1:
            self.listener.note(f"mesh {found}")
        return found

    @property
    def whole_bytes(self) -> int:
        """Of a parameter, where every rank has the whole model, and the teacher, for a step."""
        return WHOLE_BYTES

    @property
    def arranged(self) -> Arrangement:
        """As `arrange` has found, once it has."""
        assert self.arrangement is not None, "load() has not arranged the ranks"
        return self.arrangement

    @property
    def in_parts(self) -> bool:
        """Whether no rank has the whole model while it trains."""
        return self.arranged.in_parts

    def over_ranks(self, teacher: PreTrainedModel | None = None) -> Spread:
        """The model, spread over the ranks as was arranged, in place, unless it has begun so."""
        team, arrangement = self.team, self.arranged
        if self.mesh is None or not isinstance(team, Ranks):
            self.spread = spread_over(team, arrangement, self.model, teacher)
        else:
            self.spread = Shards(self.model, self.structure, self.mesh, team, arrangement)
        if teacher is not None and arrangement.gathered_once:
            stay_whole(teacher)
        return self.spread

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
        """Held-out loss at the run's precision, between steps. Raises NonFiniteError where there is none."""
        config = self.config
        total, count = shared_nats(
            self.team, self.model, self.heldout, config.sequences, config.precision, self.listener
        )  # fmt: skip
        if not math.isfinite(total):
            raise NonFiniteError(f"the loss on held-out text is not finite. {LAST_UPDATE}")
        return {"heldout_nats": total / count}

    def heard(self, row: dict[str, Any]) -> None:
        """A row of log.jsonl, told to whoever wants it."""
        self.track(row)
        self.forecast.hear(row, self.record["compiled"])
        self.listener.row(row, self.config.max_tokens)

    def layers(self) -> int:
        return len(decoder_layers(self.model))

    def note_optimizer(self) -> None:
        """Say what Muon trains, if it trains anything. Raises ConfigError where it cannot."""
        if self.config.optimizer == "muon":
            matrices = muon_matrices(self.model, self.config)
            if not matrices:
                raise ConfigError("there is no matrix for Muon in the decoder's layers: --optimizer adamw.")
            experts = any(p.ndim > 2 for p in matrices)
            if self.in_parts and experts:
                raise ConfigError("Muon does not share out the matrices of experts: --mesh ddp, or --optimizer adamw.")
            sided = "--normuon" if self.config.normuon else "--muon-scale spectral"
            if (self.config.normuon or self.config.muon_scale == "spectral") and (experts or has_conv1d(self.model)):
                raise ConfigError(f"{sided} needs to know a matrix' rows from its columns: of experts and Conv1D it does not.")
            self.listener.note(routing(self.model, matrices))


def start(
    kind: Callable[..., Run[Config, Result]], config: Config, name: str, listener: Listener, decided: frozenset[str]
) -> Result:
    """Begin or continue a run in --out, or in out/`name`, on this process or on every rank that torchrun started.

    decided: what run.json must have for one that is continued. torchrun's restarts continue what the first start began.
    """
    device = pick_device(config.device)
    say = listener.note
    if several():
        require_several(config)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
    else:
        arrange(config.mesh, 0, 1, 1, 0)
    if config.offload and device.type == "cpu":
        raise ConfigError("--offload is for a GPU: of a CPU, the host's memory is all there is.")
    with Signals(say=say).watch() as signals, open_team(device, signals, say) as team:
        listener = listener if team.first else SILENT
        out = Path(config.out or f"out/{name}")
        require_even_parts(config, team.size)
        (attempts,) = team.agree(restarts())
        record = team.shared(lambda: _record(out, config, decided, team.launch if attempts else None))
        if config.precision == "auto":
            config = replace(config, precision=team.shared(lambda: _precision(record, device, listener)))
        with tracker(config.track if team.first else None, out, asdict(config)) as track:
            return kind(config, listener, signals, track, out, device, team).whole(record)


def _precision(record: dict[str, Any] | None, device: torch.device, listener: Listener) -> str:
    """What `--precision auto` stands for in a run that begins, or stood for in the one that `record` is of."""
    if record is not None:
        return record["config"]["precision"]
    precision, why = decide_precision(device)
    listener.note(f"{precision}: {why}")
    return precision


def _record(out: Path, config: TrainingConfig, decided: frozenset[str], launch: str | None) -> dict[str, Any] | None:
    """run.json of the run to continue; None for one that begins. launch: of a restart, which continues what it began itself."""
    path = out / "run.json"
    again = launch is not None and path.exists() and read_json(path).get("launch") == launch
    record = record_to_resume(out, config, decided) if config.resume or again else None
    if record is None:
        require_new_run(out)
    elif "result" in record:
        raise OutputError(f"{out} has finished already; its model is in {out / 'model'}.")
    return record


def require_several(config: TrainingConfig) -> None:
    """Raise ConfigError for what one process can do and several cannot."""
    schedules = (getattr(config, "schedule", ""), getattr(config, "activation_schedule", ""))
    refused = {
        "--data self": config.data == "self",
        "--gradients bf16": config.gradients == "bf16",
        "--reconstruct-tokens": getattr(config, "reconstruct_tokens", None) is not None,
        "the schedule sensitivity": "sensitivity" in schedules,
        "--distill-attention": getattr(config, "distill_attention", None) is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise ConfigError(f"{what} is for one process: start it without torchrun, or drop it.")
