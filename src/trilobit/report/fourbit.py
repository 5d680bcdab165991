"""`trilobit quantize`: measure every cell, and with --out keep each as it comes and write a report of all.

OUT/ has run.json (settings, and hashes of each model and text), cells/ (a JSON of each finished cell with its protocol),
progress/ (GPTQ's finished layers, until their cells are there) and, at the end, report/: fourbit.json (all that is known),
fourbit.csv (a line a cell), table.md, perplexity.png, and protocols/ with the knobs of each protocol, which `--protocol`
reads. A run that was stopped goes on with --resume: what is there is not computed again, if it is of the same protocol,
model, text and version, and refused by name if it is not.
"""

import csv
import json
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

from trilobit import __version__
from trilobit.config.quantize import QuantizeConfig
from trilobit.errors import ConfigError, OutputError
from trilobit.fourbit.evaluate import ORIGINAL, Cell, Facts, Measure, plan
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.result import QuantizeResult, footnotes, grid_rows, markdown, task_rows
from trilobit.listener import SILENT, Listener
from trilobit.locks import alone_in, remove_directory
from trilobit.measure.scores import TaskScore
from trilobit.measure.tasks import opened, wanted
from trilobit.report.fourbit_plots import plot_perplexity
from trilobit.storage import atomic_directory, read_json, require_new_run, write_json
from trilobit.train.record import require_same_settings, run_facts

FREE_TO_CHANGE = frozenset({"resume", "out", "device", "sequences"})
HINGES = ("protocol_sha256", "model_sha256", "measurement_sha256", "version", "method")
"""What a cell of an earlier run must have in common with the one that is asked for."""


def run(config: QuantizeConfig, listener: Listener = SILENT) -> QuantizeResult:
    """`trilobit quantize`. Raises TrilobitError of every kind; settings are refused before a model is loaded."""
    columns = plan(config)
    choice = [] if config.tasks is None else wanted(config.tasks, config.shots)
    out = None if config.out is None else _open(Path(config.out), config)
    with alone_in(out) if out else nullcontext():
        if out is not None:
            _clear(out)
        with opened(choice, config.task_data, listener) if choice else nullcontext() as tasks:
            measure = Measure(
                config=config,
                listener=listener,
                tasks=tasks,
                begin=lambda model, facts: _begin(out, model, facts),
                known=lambda blank, protocol: _known(out, config, blank, protocol),
                keep=lambda cell, protocol: _keep(out, config, cell, protocol, listener),
                progress=None if out is None else out / "progress",
            )
            cells = [cell for model in config.models for cell in measure.cells(model, columns)]
        protocols = measure.protocols
        texts = {digest: protocol.text for digest, protocol in protocols.items()}
        result = QuantizeResult(config.data, config.precision, cells, texts, config.out)
        if out is not None:
            write(out / "report", result, protocols)
    return result


def write(directory: Path, result: QuantizeResult, protocols: dict[str, Protocol]) -> None:
    """The report as a new directory, which replaces an older one. Raises OutputError where the disk refuses."""
    with atomic_directory(directory) as place:
        write_json(place / "fourbit.json", asdict(result))
        names = [field.name for field in fields(Cell) if field.name != "tasks"]
        with (place / "fourbit.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            rows = [{name: getattr(cell, name) for name in names} for cell in result.cells]
            writer.writerows((row | {"applied": "; ".join(row["applied"])}).values() for row in rows)
        models = list(dict.fromkeys(cell.model for cell in result.cells))
        tables = [(model, [cell for cell in result.cells if cell.model == model]) for model in models]
        text = "\n\n".join(_section(model, cells) for model, cells in tables)
        (place / "table.md").write_text(text + "\n", encoding="utf-8")
        plot_perplexity(result.cells, place / "perplexity.png")
        (place / "protocols").mkdir()
        for digest, protocol in protocols.items():
            write_json(place / "protocols" / f"{digest[:12]}.json", asdict(protocol))


def _section(model: str, cells: list[Cell]) -> str:
    notes = "\n".join(f"* {note}" for note in footnotes(cells))
    asked = task_rows(cells)
    parts = [f"## {model}", markdown(grid_rows(cells)), markdown(asked) if asked else "", notes]
    return "\n\n".join(filter(None, parts))


def _open(out: Path, config: QuantizeConfig) -> Path:
    """The directory to work in, with its run.json. Raises OutputError for one that is taken, ConfigError for other settings."""
    if not config.resume:
        require_new_run(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "cells").mkdir()
        write_json(out / "run.json", {"command": "quantize", "config": asdict(config), **run_facts()})
        return out
    if not (out / "run.json").exists():
        raise OutputError(f"there is no run to resume in {out}: it has no run.json.")
    record = read_json(out / "run.json")
    require_same_settings(json.loads(json.dumps(asdict(config))), record.get("config", {}), FREE_TO_CHANGE)
    if (then := record.get("versions", {}).get("trilobit")) != __version__:
        raise ConfigError(f"--resume: {out} was begun by trilobit {then}, this is {__version__}. Begin anew in another --out.")
    return out


def _clear(out: Path) -> None:
    """Remove what killed processes left half-written; nobody else works in `out` now."""
    for left in [*out.rglob(".*.partial-*"), *out.glob(".run.json.*"), *(out / "cells").glob(".*.json.*")]:
        remove_directory(left)


def _begin(out: Path | None, model: str, facts: Facts) -> None:
    """Write what the cells of `model` hinge on into run.json. Raises ConfigError if it is there and is another."""
    if out is None:
        return
    record = read_json(out / "run.json")
    measured, now = record.setdefault("measured", {}), asdict(facts)
    then = measured.setdefault(model, now)
    if then != now:
        changed = ", ".join(f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name])
        raise ConfigError(f"--resume: {model} or the text it is measured on is another than before: {changed}.")
    write_json(out / "run.json", record)


def _place(out: Path, config: QuantizeConfig, model: str, column: str, bits: str) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in column).strip("-")
    return out / "cells" / f"{config.models.index(model):02}_{name}_{bits}.json"


def _known(out: Path | None, config: QuantizeConfig, blank: Cell, protocol: Protocol) -> Cell | None:
    """The cell that an earlier run kept. Raises ConfigError for one of another protocol, model, text or version."""
    if out is None or not (path := _place(out, config, blank.model, blank.column, blank.bits)).exists():
        return None
    record = read_json(path)
    if set(record) != {"cell", "protocol"} or set(record["cell"]) != {field.name for field in fields(Cell)}:
        raise ConfigError(f"--resume: {path} was not written by this version. Begin anew in another --out.")
    values = record["cell"]
    changed = [name for name in HINGES if values[name] != getattr(blank, name)]
    if "protocol_sha256" in changed:
        then, now = record["protocol"], json.loads(json.dumps(asdict(protocol)))
        knobs = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        changed = [f"protocol_sha256 ({', '.join(knobs)})", *(name for name in changed if name != "protocol_sha256")]
    if changed:
        raise ConfigError(f"--resume: {path} is of another {', '.join(changed)}. Begin anew in another --out.")
    tasks = None if values["tasks"] is None else [TaskScore(**row) for row in values["tasks"]]
    return Cell(**values | {"tasks": tasks})


def _keep(out: Path | None, config: QuantizeConfig, cell: Cell, protocol: Protocol, listener: Listener) -> None:
    above = "" if cell.column == ORIGINAL else f", {cell.loss:+.4f} nats per token"
    average = "" if cell.average is None else f", benchmarks {100 * cell.average:.2f} %"
    listener.note(f"{cell.model}  {cell.bits}  {cell.column}: perplexity {cell.perplexity:,.4f}{above}{average}")
    if out is not None:
        path = _place(out, config, cell.model, cell.column, cell.bits)
        write_json(path, {"cell": asdict(cell), "protocol": asdict(protocol)})
