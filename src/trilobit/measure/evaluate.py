"""`trilobit eval`: perplexity on a text, scores of benchmarks, or both."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

import torch

from trilobit.config.eval import EvalConfig
from trilobit.infer.load import load
from trilobit.infer.loaded import pick_device
from trilobit.listener import SILENT, Listener
from trilobit.measure.perplexity import measure
from trilobit.measure.scores import TaskScore, averages, compared, table, text
from trilobit.measure.tasks import Tasks, offline, opened, wanted


@dataclass(frozen=True)
class EvalResult:
    """What was measured, and how; None is what was not asked for.

    truncated_prompts: longer than the model's positions, so without their beginnings. examples_per_second: questions of
    benchmarks, from building the prompts to the last standard error.
    """

    model: str
    precision: str
    data: str | None = None
    perplexity: float | None = None
    nats_per_token: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    windows: int | None = None
    sequence_length: int | None = None
    bos: bool | None = None
    tasks: list[TaskScore] | None = None
    average: float | None = None
    average_stderr: float | None = None
    average_above_chance: float | None = None
    original: str | None = None
    original_average: float | None = None
    retention: float | None = None
    backend: str | None = None
    batch: int | None = None
    dtype: str | None = None
    limit: int | None = None
    task_data: str | None = None
    truncated_prompts: int | None = None
    examples_per_second: float | None = None

    def summary(self) -> str:
        """For people: the table of tasks, then a line for each other number."""
        values = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self) if f.name != "tasks"}
        shown = {name: text(value) for name, value in values.items() if value is not None}
        width = max(map(len, shown))
        top = [] if self.tasks is None else [*table(self.tasks), ""]
        return "\n".join([*top, *(f"{name:<{width}}  {value}" for name, value in shown.items())])


def run(config: EvalConfig, listener: Listener = SILENT) -> EvalResult:
    """`trilobit eval`."""
    device = pick_device(config.device)
    choice = [] if config.tasks is None else wanted(config.tasks, config.shots)
    with opened(choice, config.task_data, listener) if choice else nullcontext() as tasks:
        measured = {} if config.data is None else asdict(measure(load(config.model, device=device), config, listener))
        result = EvalResult(model=str(config.model), precision=config.precision, data=config.data, **measured)
        return result if tasks is None else _with_tasks(result, tasks, config, device, listener)


def _with_tasks(result: EvalResult, tasks: Tasks, config: EvalConfig, device: torch.device, listener: Listener) -> EvalResult:
    from trilobit.measure.harness import BACKEND, Scores, score

    def ask(source: str) -> Scores:
        loaded = load(source, device=device, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
        with nullcontext() if config.task_data is None else offline():
            scores = score(loaded, tasks, config.sequences, config.limit, listener)
        if scores.truncated:
            listener.note(f"{source}: {scores.truncated} prompts are longer than its positions and lost their beginnings.")
        return scores

    scores = ask(config.model)
    originals = None if config.original is None else ask(config.original).rows
    rows = compared(scores.rows, originals, tasks.counted)
    return replace(
        result,
        tasks=rows,
        **asdict(averages(rows, tasks.counted)),
        original=config.original,
        backend=BACKEND,
        batch=config.sequences,
        dtype=scores.dtype,
        limit=config.limit,
        task_data=config.task_data,
        truncated_prompts=scores.truncated,
        examples_per_second=scores.questions / scores.seconds,
    )
