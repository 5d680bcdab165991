"""`trilobit quantize`: measure every cell, and with --out keep each as it comes and write a report of all.

OUT/ has run.json, cells/ (a JSON of each finished cell), progress/ (GPTQ's finished layers) and, at the end, report/:
fourbit.json (all that is known), fourbit.csv (a line a cell), table.md, perplexity.png, and protocols/ with the knobs of
each protocol, which `--protocol` reads. A run that was stopped goes on with --resume: what is there is not computed again.
"""

import csv
import json
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

from trilobit.config.quantize import QuantizeConfig
from trilobit.errors import OutputError
from trilobit.fourbit.evaluate import ORIGINAL, Cell, Measure, plan
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.result import QuantizeResult, grid_rows, markdown
from trilobit.listener import SILENT, Listener
from trilobit.measure.scores import TaskScore
from trilobit.measure.tasks import opened, wanted
from trilobit.report.fourbit_plots import plot_perplexity
from trilobit.storage import alone_in, atomic_directory, read_json, require_new_directory, write_json
from trilobit.train.record import require_same_settings, run_facts

FREE_TO_CHANGE = frozenset({"resume", "out", "device", "sequences"})


def run(config: QuantizeConfig, listener: Listener = SILENT) -> QuantizeResult:
    """`trilobit quantize`. Raises TrilobitError of every kind; settings are refused before a model is loaded."""
    columns = plan(config)
    choice = [] if config.tasks is None else wanted(config.tasks, config.shots)
    out = None if config.out is None else _open(Path(config.out), config)
    with alone_in(out) if out else nullcontext():
        with opened(choice, config.task_data, listener) if choice else nullcontext() as tasks:
            measure = Measure(
                config=config,
                listener=listener,
                tasks=tasks,
                known=lambda model, column, bits: _known(out, config, model, column, bits),
                keep=lambda cell: _keep(out, config, cell, listener),
                progress=None if out is None else out / "progress",
            )
            cells = [cell for model in config.models for cell in measure.cells(model, columns)]
        protocols = {protocol.sha256: protocol for column in columns for protocol in column.protocols}
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
            writer.writerows([getattr(cell, name) for name in names] for cell in result.cells)
        models = list(dict.fromkeys(cell.model for cell in result.cells))
        tables = [(model, [cell for cell in result.cells if cell.model == model]) for model in models]
        text = "\n\n".join(f"## {model}\n\n{markdown(grid_rows(cells))}" for model, cells in tables)
        (place / "table.md").write_text(text + "\n", encoding="utf-8")
        plot_perplexity(result.cells, place / "perplexity.png")
        (place / "protocols").mkdir()
        for digest, protocol in protocols.items():
            write_json(place / "protocols" / f"{digest[:12]}.json", asdict(protocol))


def _open(out: Path, config: QuantizeConfig) -> Path:
    """The directory to work in, with its run.json. Raises OutputError for one that is taken, ConfigError for other settings."""
    if not config.resume:
        require_new_directory(out, "Continue it with --resume, or choose another name.")
        out.mkdir(parents=True, exist_ok=True)
        (out / "cells").mkdir()
        write_json(out / "run.json", {"command": "quantize", "config": asdict(config), **run_facts()})
        return out
    if not (out / "run.json").exists():
        raise OutputError(f"there is no run to resume in {out}: it has no run.json.")
    now, then = json.loads(json.dumps(asdict(config))), read_json(out / "run.json").get("config", {})
    require_same_settings(now, then, FREE_TO_CHANGE)
    return out


def _place(out: Path, config: QuantizeConfig, model: str, column: str, bits: str) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in column).strip("-")
    return out / "cells" / f"{config.models.index(model):02}_{name}_{bits}.json"


def _known(out: Path | None, config: QuantizeConfig, model: str, column: str, bits: str) -> Cell | None:
    """The cell that an earlier run kept."""
    if out is None or not (path := _place(out, config, model, column, bits)).exists():
        return None
    values = read_json(path)
    tasks = None if values["tasks"] is None else [TaskScore(**row) for row in values["tasks"]]
    return Cell(**values | {"tasks": tasks})


def _keep(out: Path | None, config: QuantizeConfig, cell: Cell, listener: Listener) -> None:
    above = "" if cell.column == ORIGINAL else f", {cell.loss:+.4f} nats per token"
    average = "" if cell.average is None else f", benchmarks {100 * cell.average:.2f} %"
    listener.note(f"{cell.model}  {cell.bits}  {cell.column}: perplexity {cell.perplexity:,.4f}{above}{average}")
    if out is not None:
        write_json(_place(out, config, cell.model, cell.column, cell.bits), asdict(cell))
