"""What `trilobit quantize` found: cells, the protocols they were made by, and their tables."""

from dataclasses import dataclass

from trilobit.config.quantize import FULL
from trilobit.fourbit.evaluate import ORIGINAL, Cell


@dataclass(frozen=True)
class QuantizeResult:
    """All cells; protocols: every knob of each as text, by the sha256 that cells name. out: the directory of the report."""

    data: str
    precision: str
    cells: list[Cell]
    protocols: dict[str, str]
    out: str | None = None

    def summary(self) -> str:
        """For people: a table of perplexities for each model (of one cell: a line each), then what else was measured."""
        lines: list[str] = []
        models = list(dict.fromkeys(cell.model for cell in self.cells))
        for model in models:
            cells = [cell for cell in self.cells if cell.model == model]
            lines += [model, *(single(cells) if len(cells) <= 2 else table(cells)), ""]
        refused = {f"{c.column}: {c.refused}": None for c in self.cells if c.refused is not None}
        tokens = next((cell.tokens for cell in self.cells if cell.tokens is not None), 0)
        lines += [*footnotes(self.cells), *refused, f"data {self.data}, {tokens:,} tokens, {self.precision}"]
        made = {cell.protocol_sha256 for cell in self.cells if cell.column != ORIGINAL}
        if len(made) == 1:
            (digest,) = made
            text = self.protocols[digest]
            lines += ["", text, f"protocol sha256  {digest}"]
        else:
            lines.append(f"{len(self.protocols)} protocols, by sha256 in the JSON; bits are weights-activations-KV cache")
        return "\n".join([*lines, *([] if self.out is None else [f"report  {self.out}/report"])])


def single(cells: list[Cell]) -> list[str]:
    """A line for each cell."""
    rows = [["bits", "made by", "perplexity", "nats", "above", "average", "kurtosis", "MLP kurtosis", "seconds"]]
    for cell in cells:
        average = "" if cell.average is None else f"{cell.average:.4f} ± {cell.average_stderr or 0:.4f}"
        numbers = [_number(value) for value in (cell.perplexity, cell.nats_per_token, cell.loss)]
        kurtosis = [_number(cell.excess_kurtosis, 2), _number(cell.kurtosis_mlp_output, 2)]
        seconds = (cell.seconds or 0.0) + (cell.seconds_weights or 0.0)
        rows.append([cell.bits, cell.column, *numbers, average, *kurtosis, f"{seconds:,.0f}"])
    return aligned(rows)


def footnotes(cells: list[Cell]) -> list[str]:
    """What was done to the models of each column, and what they had no room for: a line each, once."""
    return list(dict.fromkeys(f"{cell.column}: {line}" for cell in cells for line in cell.applied))


def table(cells: list[Cell]) -> list[str]:
    """Perplexities (and benchmark averages, where there are any) by bits and column; below, benchmark by benchmark."""
    asked = task_rows(cells)
    return [*aligned(grid_rows(cells)), *(["", *aligned(asked)] if asked else [])]


def grid_rows(cells: list[Cell]) -> list[list[str]]:
    """Cells of the table: bits down, columns across; the original's row once; below, kurtosis and seconds of each column."""
    columns = list(dict.fromkeys(cell.column for cell in cells if cell.column != ORIGINAL))
    at = {(cell.bits, cell.column): cell for cell in cells}
    original = at[FULL, ORIGINAL]
    rows = [["bits", *columns], [FULL, _shown(original), *["="] * (len(columns) - 1)]]
    for bits in dict.fromkeys(cell.bits for cell in cells if cell.column != ORIGINAL):
        rows.append([bits, *(_shown(at.get((bits, column))) for column in columns)])
    measured = sorted(cells, key=lambda cell: cell.perplexity is None)  # stable: refused ones last
    firsts = [next(cell for cell in measured if cell.column == column) for column in columns]
    rows.append(["excess kurtosis", *(_number(cell.excess_kurtosis, 2) for cell in firsts)])
    rows.append(["kurtosis at MLP outputs", *(_number(cell.kurtosis_mlp_output, 2) for cell in firsts)])
    seconds = [
        sum(c.seconds or 0.0 for c in cells if c.column == column) + (first.seconds_weights or 0.0)
        for column, first in zip(columns, firsts, strict=True)
    ]
    return [*rows, ["seconds", *(f"{value:,.0f}" for value in seconds)]]


def task_rows(cells: list[Cell]) -> list[list[str]]:
    """Of each cell that was asked benchmarks, the scores that count and their average, in percent ± standard error, below
    their names and numbers of questions. [] where none was asked."""
    scores = {i: {s.task: s for s in cell.tasks if s.averaged} for i, cell in enumerate(cells) if cell.tasks}
    if not scores:
        return []
    names = dict.fromkeys(name for found in scores.values() for name in found)
    counts = {name: max(s[name].examples for s in scores.values() if name in s) for name in names}
    rows = [["bits", "made by", *(f"{name} ({count:,})" for name, count in counts.items()), "average"]]
    for i, found in scores.items():
        shown = [_percent(found[name].score, found[name].stderr) if name in found else "" for name in names]
        rows.append([cells[i].bits, cells[i].column, *shown, _percent(cells[i].average, cells[i].average_stderr)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Rows as a table, the first its heads."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of padded columns; empty columns are left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return ["  ".join(row[i].ljust(widths[i]) if i < 1 else row[i].rjust(widths[i]) for i in used).rstrip() for row in rows]


def _shown(cell: Cell | None) -> str:
    if cell is None or cell.perplexity is None:
        return "refused" if cell is not None else ""
    average = "" if cell.average is None else f" ({100 * cell.average:.1f} %)"
    return _number(cell.perplexity) + average


def _percent(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"
