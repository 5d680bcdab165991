"""Cells of a table: one model, made by one protocol, measured. A column is what shares weights but for their bits.

The original is measured first, untouched; every other cell's loss is stated in nats above it. A column's model is loaded
anew, rotated, its kurtosis taken, its weights quantised once, and then read at each setting of activations and cache.

A cell says what it hinges on: the protocol, the model (weights and config), the measurement (the token ids that are measured,
with what they begin, the model's dtype), the package's version. All texts are read before the first cell.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilobit import __version__
from trilobit.config.eval import EvalConfig
from trilobit.config.quantize import FULL, ROWS, SEQUENCE_LENGTH, Method, QuantizeConfig, Rotation
from trilobit.errors import DataError, ModelError, NonFiniteError, TrilobitError, UnsupportedError
from trilobit.fourbit.calibration import calibration_source, calibration_windows, require_apart
from trilobit.fourbit.fake import Prepared, prepare, require_capability, round_weights
from trilobit.fourbit.gptq_layers import gptq
from trilobit.fourbit.progress import model_fingerprint, windows_fingerprint
from trilobit.fourbit.protocol import PRESETS, Protocol, find_protocol
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded, pick_device
from trilobit.listener import Listener
from trilobit.locks import remove_directory
from trilobit.measure.contextual import measure_contextual
from trilobit.measure.perplexity import Perplexity, Text, fitting, measure, read
from trilobit.measure.scores import TaskScore, averages, compared
from trilobit.measure.tasks import Tasks, offline

ORIGINAL = "original"
COLUMNS: dict[str, tuple[Method, Rotation]] = {
    "RTN": ("rtn", "none"), "+ FFN Hadamard": ("rtn", "ffn"), "+ GPTQ": ("gptq", "ffn"), "QuaRot": ("gptq", "quarot"),
    "SpinQuant": ("gptq", "spinquant"),
}  # fmt: skip
KURTOSIS_WINDOWS, KURTOSIS_LENGTH = 16, 512
REFUSALS = (ModelError, UnsupportedError, NonFiniteError)
"""What a model cannot have: of a grid a cell without numbers. Everything else (settings, texts, disks) ends the run."""


@dataclass(frozen=True)
class Facts:
    """What the cells of one model hinge on beside their protocols. model_sha256: of weights and config. windows_sha256: of
    the token ids that are measured."""

    model_sha256: str
    windows_sha256: str
    sequence_length: int
    bos: bool
    precision: str
    version: str

    @property
    def measurement_sha256(self) -> str:
        """Of what two models have in common whose numbers compare: windows and dtype."""
        parts = self.windows_sha256, self.sequence_length, self.bos, self.precision
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Cell:
    """One measurement. column: how it was made. loss: nats per token above the original's. refused: why there are no numbers.

    excess_kurtosis, kurtosis_mlp_output: of the residual stream and of what the MLPs' last linears read, after the column's
    rotations and before quantisation. seconds_weights: of rotating and quantising, shared by a column, processes that were
    killed included; seconds: of measuring. applied: what the protocol came to on this model, and what it has no room for.
    """

    model: str
    column: str
    bits: str
    method: str
    protocol_sha256: str
    model_sha256: str
    measurement_sha256: str
    version: str
    applied: list[str] = field(default_factory=list)
    perplexity: float | None = None
    nats_per_token: float | None = None
    bits_per_byte: float | None = None
    loss: float | None = None
    tokens: int | None = None
    excess_kurtosis: float | None = None
    kurtosis_mlp_output: float | None = None
    average: float | None = None
    average_stderr: float | None = None
    tasks: list[TaskScore] | None = None
    seconds_weights: float | None = None
    seconds: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Column:
    """A way to make weights and the protocols, of equal weights, to read them by."""

    name: str
    protocols: tuple[Protocol, ...]


def plan(config: QuantizeConfig) -> list[Column]:
    """The columns that `config` asks for, the original apart. Raises ConfigError, before any model is loaded."""
    changes: dict[str, Any] = {
        "calibration_samples": config.calibration_samples, "calibration_length": config.calibration_length,
        "learning_steps": config.learning_steps, "rotation_seed": config.seed, "calibration_seed": config.seed,
    }  # fmt: skip
    base = replace(find_protocol(config.protocol), **{name: value for name, value in changes.items() if value is not None})
    drawn = config.calibration, config.calibration_samples, config.calibration_length, config.seed
    if any(value is not None for value in drawn):
        base = replace(base, calibration_sha256=None)  # another text, or other pieces of it, than the file pins
    if config.grid is None:
        protocol = base if config.bits is None else base.with_bits(config.bits)
        protocol = protocol if config.method is None else replace(protocol, method=config.method)
        protocol = protocol if config.rotate is None else protocol.rotated(config.rotate)
        columns = [Column(label(protocol), (protocol,))]
    else:
        columns = [
            Column(name, tuple(replace(base.rotated(rotate), method=method).with_bits(row) for row in ROWS if row != FULL))
            for name, (method, rotate) in COLUMNS.items()
        ]  # fmt: skip

    def complete(protocol: Protocol) -> Protocol:
        if not protocol.calibrates:
            return replace(protocol, calibration_data=None, calibration_sha256=None)
        return replace(protocol, calibration_data=calibration_source(config, protocol))

    return [Column(column.name, tuple(map(complete, column.protocols))) for column in columns]


def label(protocol: Protocol) -> str:
    """What a single column is called."""
    parts = [{"rtn": "RTN", "gptq": "GPTQ"}[protocol.method]]
    if protocol.residual_rotation != "none":
        parts.append("learned rotation" if protocol.residual_rotation == "learned" else "Hadamard rotation")
    elif protocol.ffn_hadamard:
        parts.append("FFN Hadamard")
    return " + ".join(parts)


@dataclass
class Measure:
    """What all cells of a model share. begin: hears what they hinge on. known: an unmeasured cell and its protocol → what an
    earlier run found. keep: hears of each new cell. protocols: of all cells so far, by sha256."""

    config: QuantizeConfig
    listener: Listener
    tasks: Tasks | None
    begin: Callable[[str, Facts], None]
    known: Callable[[Cell, Protocol], Cell | None]
    keep: Callable[[Cell, Protocol], None]
    progress: Path | None = None
    text: Text | None = None
    protocols: dict[str, Protocol] = field(default_factory=dict)
    windows: dict[str, Tensor] = field(default_factory=dict)

    def cells(self, model: str, columns: list[Column]) -> Iterator[Cell]:
        """Every cell of one model: the original, then column by column. In a grid what this model cannot have is a cell that
        says why; alone, it raises."""
        self.text, self.windows = None, {}  # another model, another tokenizer
        loaded = self._load(model)
        text, _ = self._text(loaded)
        facts = Facts(
            model_fingerprint(loaded.model), windows_fingerprint(text.windows), self._length(loaded), text.bos,
            self.config.precision, __version__,
        )  # fmt: skip
        self.begin(model, facts)
        if self.config.sequence_length is None and facts.sequence_length < SEQUENCE_LENGTH:
            self.listener.note(f"windows of {facts.sequence_length:,} tokens: {model} has no more positions")
        columns = [Column(column.name, self._calibrated(loaded, column.protocols)) for column in columns]
        untouched = find_protocol(self.config.protocol).with_bits(FULL).rotated("none")
        untouched = replace(untouched, calibration_data=None, calibration_sha256=None)
        blank = self._blank(model, ORIGINAL, untouched, facts)
        original = self.known(blank, untouched) or self._original(loaded, blank, untouched)
        del loaded  # each column loads it anew
        yield original
        for column in columns:
            blanks = {p.bits: self._blank(model, column.name, p, facts) for p in column.protocols}
            found = {p.bits: self.known(blanks[p.bits], p) for p in column.protocols}
            missing = [p for p in column.protocols if found[p.bits] is None]
            yield from (cell for cell in found.values() if cell is not None)
            if missing:
                yield from self._column(missing, blanks, original)

    def _blank(self, model: str, column: str, protocol: Protocol, facts: Facts) -> Cell:
        """A cell that says what it hinges on, and has no numbers yet."""
        self.protocols[protocol.sha256] = protocol
        method = "none" if column == ORIGINAL else protocol.method
        shared = facts.model_sha256, facts.measurement_sha256, facts.version
        return Cell(model, column, protocol.bits, method, protocol.sha256, *shared)

    def _calibrated(self, loaded: Loaded, protocols: tuple[Protocol, ...]) -> tuple[Protocol, ...]:
        """The protocols with the sha256 of the sequences that are drawn for them. Raises DataError for others than they pin,
        and for some that are measured."""
        if not protocols[0].calibrates:
            return protocols
        if self.config.calibration_length is None and self.config.protocol in PRESETS:  # a file pins what it says
            length = fitting(loaded.model, protocols[0].calibration_length)
            protocols = tuple(replace(protocol, calibration_length=length) for protocol in protocols)
        first = protocols[0]
        windows = calibration_windows(loaded, self.config, first)
        digest, pinned = windows_fingerprint(windows), first.calibration_sha256
        if pinned not in (None, digest):
            raise DataError(
                f"the protocol was calibrated on other sequences (sha256 {pinned[:16]}) than this tokenizer and "
                f"{first.calibration_data} give ({digest[:16]}). To take these, give --calibration {first.calibration_data}."
            )
        require_apart(windows, self._text(loaded)[0].windows)
        self.windows[digest] = windows
        return tuple(replace(protocol, calibration_sha256=digest) for protocol in protocols)

    def _original(self, loaded: Loaded, blank: Cell, protocol: Protocol) -> Cell:
        cell = self._measured(loaded, replace(blank, **self._kurtosis(loaded)), FULL)
        cell = replace(cell, loss=0.0)
        self.keep(cell, protocol)
        return cell

    def _column(self, protocols: list[Protocol], blanks: dict[str, Cell], original: Cell) -> Iterator[Cell]:
        first, start = protocols[0], time.perf_counter()
        model, column = blanks[first.bits].model, blanks[first.bits].column
        loaded = self._load(model)
        self.listener.note(f"{model}: {column}")
        able = []
        for protocol in protocols:
            try:
                require_capability(loaded.model, protocol)
                able.append(protocol)
            except REFUSALS as error:
                yield self._refused(blanks[protocol.bits], error)
        if not able:
            return
        windows = None if first.calibration_sha256 is None else self.windows[first.calibration_sha256]
        try:
            prepared = prepare(loaded.model, able[0], windows, self.progress, self.listener)
            kurtosis = self._kurtosis(loaded)
            self._weights(prepared, able[0], windows)
        except REFUSALS as error:
            for protocol in able:
                yield self._refused(blanks[protocol.bits], error)
            return
        seconds = time.perf_counter() - start + prepared.earlier
        kept = 0
        for protocol in able:
            cell = replace(blanks[protocol.bits], seconds_weights=seconds, applied=prepared.applied_by(protocol), **kurtosis)
            try:
                with prepared.computing(protocol):
                    cell = self._measured(loaded, cell, protocol.bits)
            except REFUSALS as error:
                yield self._refused(cell, error)
                continue
            assert cell.nats_per_token is not None and original.nats_per_token is not None
            cell = replace(cell, loss=cell.nats_per_token - original.nats_per_token)
            self.keep(cell, protocol)
            kept += 1
            yield cell
        if kept == len(able) and prepared.progress is not None:
            remove_directory(prepared.progress)  # its cells are on disk: nobody reads these weights again

    def _refused(self, cell: Cell, error: TrilobitError) -> Cell:
        """A cell of a grid that says why it has no numbers; alone, the error. It is not kept: what is refused now may be
        possible when the grid is continued."""
        if self.config.grid is None:
            raise error
        self.listener.note(f"{cell.column} at {cell.bits} is refused: {error}")
        return replace(cell, refused=str(error))

    def _weights(self, prepared: Prepared, protocol: Protocol, windows: Tensor | None) -> None:
        if protocol.method == "rtn" or protocol.weight_bits == 16:
            round_weights(prepared, protocol, self.listener)
        else:
            assert windows is not None, "GPTQ is fitted on text"
            gptq(prepared, windows, protocol, self.progress, self.listener)

    def _load(self, model: str) -> Loaded:
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        return load(model, device=pick_device(self.config.device), dtype=dtype)

    def _text(self, loaded: Loaded) -> tuple[Text, EvalConfig]:
        names = ("data", "text_field", "sequences", "max_tokens", "bos")
        values = {name: getattr(self.config, name) for name in names}
        settings = EvalConfig(model="", sequence_length=self._length(loaded), **values)
        if self.text is None:
            self.text = read(loaded, settings)
        return self.text, settings

    def _length(self, loaded: Loaded) -> int:
        """Tokens per window: as asked, else what papers measure on, or the model's positions where it has fewer."""
        return self.config.sequence_length or fitting(loaded.model, SEQUENCE_LENGTH)

    def _kurtosis(self, loaded: Loaded) -> dict[str, float | None]:
        windows = self._text(loaded)[0].windows[:KURTOSIS_WINDOWS, :KURTOSIS_LENGTH]
        found = measure_contextual(loaded.model, windows, str)
        reads = [row.later.excess_kurtosis for row in found.sites if row.site == "mlp-output"]
        return {"excess_kurtosis": found.excess_kurtosis, "kurtosis_mlp_output": sum(reads) / len(reads) if reads else None}

    def _measured(self, loaded: Loaded, cell: Cell, bits: str) -> Cell:
        """Perplexity of the model as it computes now, and benchmarks where this row is asked them."""
        start = time.perf_counter()
        text, settings = self._text(loaded)
        found: Perplexity = measure(loaded, replace(settings, model=f"{cell.model} at {bits}"), self.listener, text)
        cell = replace(
            cell, perplexity=found.perplexity, nats_per_token=found.nats_per_token, bits_per_byte=found.bits_per_byte,
            tokens=found.tokens,
        )  # fmt: skip
        if self.tasks is not None and (self.config.grid is None or bits in self.config.task_rows()):
            cell = self._asked(loaded, cell, self.tasks)
        return replace(cell, seconds=time.perf_counter() - start)

    def _asked(self, loaded: Loaded, cell: Cell, tasks: Tasks) -> Cell:
        from trilobit.measure.harness import score

        rows: list[TaskScore] = []
        with nullcontext() if self.config.task_data is None else offline():
            for part, limit in limits(tasks, self.config.limit, self.config.generate_limit):
                rows += score(loaded, part, self.config.sequences, limit, self.listener).rows
        rows = compared(rows, None, tasks.counted)
        mean = averages(rows, tasks.counted)
        return replace(cell, tasks=rows, average=mean.average, average_stderr=mean.average_stderr)


def limits(tasks: Tasks, limit: int | None, generate: int | None) -> list[tuple[Tasks, int | None]]:
    """The tasks with the limit of each: those whose answer is written freely apart, if their limit is another."""
    if generate is None or generate == limit:
        return [(tasks, limit)]
    written = {name for name, leaf in tasks.leaves.items() if leaf.OUTPUT_TYPE == "generate_until"}
    grouped = {leaf.task_name for group in tasks.groups.values() for leaf in group.get_all_tasks()}
    written -= grouped  # a group is one number: its tasks stay together
    parts = [
        (Tasks({n: leaf for n, leaf in tasks.leaves.items() if (n in written) == free}, {} if free else tasks.groups), most)
        for free, most in ((False, limit), (True, generate))
    ]
    return [(part, most) for part, most in parts if part.leaves]
