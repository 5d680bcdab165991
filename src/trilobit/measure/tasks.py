"""Which benchmarks: suites, lm-eval's names, and the same tasks from local files.

A task is always lm-eval's definition (prompt, choices, metrics), except the four `*_cloze` ones that outlier-safe
pre-training uses and lm-eval lacks; these are lm-eval YAMLs of ours, in assets/tasks. assets/tasks/offline holds, for each
task that --task-data covers, a YAML that includes the definition and reads a file instead of the hub. Both kinds are
written with ${lm_eval}, ${data} and ${cache} for what is known only when they are used; the first line of an offline YAML
names its file and fields. Without a training file the examples of a prompt are other questions of the evaluated file.

What `datasets` makes of local files goes to a temporary folder that is deleted afterwards; hub data sets go to its cache.

osp10 is the list of the authors' repository (arXiv 2506.19697): ten benchmarks, of which ARC is the mean of two tasks.
"""

import difflib
import glob
import gzip
import importlib.util
import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from trilobit.errors import ConfigError, DataError
from trilobit.listener import SILENT, Listener

FIVE = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
OSP10 = (
    "arc_easy", "arc_challenge", "commonsense_qa_cloze", "gsm8k", "hellaswag", "mmlu_cloze", "openbookqa", "piqa",
    "social_iqa_cloze", "triviaqa", "winogrande_cloze",
)  # fmt: skip
SUITES = {"five": FIVE, "osp10": OSP10}
SUITE_SHOTS = {"gsm8k": 8, "triviaqa": 5}  # the others: none
ASSETS = Path(__file__).parent.parent / "assets" / "tasks"
OFFLINE = {path.stem: path for path in sorted((ASSETS / "offline").glob("[a-z]*.yaml"))}
OURS = {path.stem: path for path in sorted(ASSETS.glob("*.yaml"))}


@dataclass(frozen=True)
class Wanted:
    """A name of --tasks: its shots (None: the task's own) and the benchmark it counts towards in the average."""

    name: str
    shots: int | None
    benchmark: str


@dataclass
class Tasks:
    """lm-eval's objects. `leaves` and `groups` as TaskManager.load gives them; `counted`: row of results → benchmark."""

    leaves: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, str] = field(default_factory=dict)


def wanted(names: str, shots: int | None = None) -> list[Wanted]:
    """--tasks as a list. Raises ConfigError for an empty one, and for a task that is named twice."""
    found: dict[str, Wanted] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        for member in SUITES.get(name, (name,)):
            own = SUITE_SHOTS.get(member, 0) if name in SUITES else None
            if member in found:
                raise ConfigError(f"--tasks {names} asks for {member} twice. Run the two apart.")
            benchmark = "arc" if name == "osp10" and member.startswith("arc_") else member
            found[member] = Wanted(member, own if shots is None else shots, benchmark)
    if not found:
        raise ConfigError("--tasks is empty. Name `five`, `osp10` or lm-eval's tasks, separated by commas.")
    return list(found.values())


def require_lm_eval() -> None:
    """Raise ConfigError, with the command that helps, if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval: pip install 'trilobit[eval]'")


@contextmanager
def opened(choice: list[Wanted], task_data: str | None, listener: Listener = SILENT) -> Iterator[Tasks]:
    """The tasks with their questions; with `task_data`, from files and without network. Their cache is gone afterwards."""
    require_lm_eval()
    folder = None if task_data is None else Path(task_data)
    if folder is not None:
        require_files(choice, folder)
    with tempfile.TemporaryDirectory(prefix="trilobit-tasks-") as place, _quiet():
        with nullcontext() if folder is None else offline():
            tasks = _load(choice, folder, write_definitions(Path(place), folder))
        for name, task in tasks.leaves.items():
            if folder is not None and (shots := task.get_config("num_fewshot")):
                listener.note(f"{name}: the {shots} examples of a prompt are other questions of {file_of(name)[0]}.")
        yield tasks


def require_files(choice: list[Wanted], folder: Path) -> None:
    """Raise ConfigError for a task that files do not cover, DataError for a file that is not there."""
    if not folder.is_dir():
        raise DataError(f"--task-data {folder} is not a directory.")
    for want in choice:
        if want.name not in OFFLINE:
            raise ConfigError(
                f"--task-data has no files for {want.name}{nearest(want.name, [*SUITES, *OFFLINE])} "
                f"It covers {', '.join(OFFLINE)}."
            )
        file, holds = file_of(want.name)
        if not (folder / file).exists():
            raise DataError(f"--task-data {folder} has no {file}, which {want.name} reads. A JSON object a line: {holds}.")
        _check_rows(folder / file, holds)


def _check_rows(path: Path, holds: str) -> None:
    """Raise DataError, with the line, unless every line has each field that `holds` names, of the kind that the first has."""
    names, kinds, number = re.sub(r" \(.*?\)", "", holds).split(", "), None, 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if missing := [name for name in names if not isinstance(row, dict) or row.get(name) is None]:
                    raise DataError(f"{path}, line {number}: no {', '.join(missing)}. A line should hold {holds}.")
                if (kinds := kinds or [type(row[name]) for name in names]) != [type(row[name]) for name in names]:
                    raise DataError(f"{path}, line {number}: not the same kinds of values as before. {holds}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is damaged near line {number}: {error}. It should hold JSON objects of {holds}.") from error
    if number == 0:
        raise DataError(f"{path} is empty. It should hold a JSON object a line: {holds}.")


def file_of(name: str) -> tuple[str, str]:
    """The file that an offline task reads, and its fields, as the first line of its YAML says."""
    file, holds = OFFLINE[name].read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split(": ", 1)
    return file, holds


def write_definitions(place: Path, folder: Path | None) -> dict[str, Path]:
    """Write the YAMLs into `place` with their paths filled in. Returns task → file, for lm-eval to read."""
    import lm_eval.tasks

    data = "" if folder is None else glob.escape(str(folder.resolve()))
    paths = {"lm_eval": Path(lm_eval.tasks.__file__).parent, "data": data, "cache": place / "cache"}
    values = {name: json.dumps(str(path))[1:-1] for name, path in paths.items()}  # they stand within double quotes
    (place / "offline").mkdir()
    for path in ASSETS.rglob("*.yaml"):
        text = Template(path.read_text(encoding="utf-8")).substitute(values)
        (place / path.relative_to(ASSETS)).write_text(text, encoding="utf-8")
    if folder is not None:
        return {name: place / "offline" / path.name for name, path in OFFLINE.items()}
    return {name: place / path.name for name, path in OURS.items()}


def _load(choice: list[Wanted], folder: Path | None, definitions: dict[str, Path]) -> Tasks:
    from lm_eval.tasks import TaskManager

    own = all(want.name in definitions for want in choice)
    manager = TaskManager(include_defaults=not own)  # indexing lm-eval's fourteen thousand tasks takes seconds
    for want in choice:
        if want.name not in definitions and want.name not in manager.task_index:
            known = [*SUITES, *definitions, *manager.all_tasks]
            raise ConfigError(f"lm-eval has no task {want.name!r}{nearest(want.name, known)}")
    tasks = Tasks()
    for want in choice:
        try:
            loaded = manager.load([str(definitions.get(want.name, want.name))])
        except Exception as error:  # whatever `datasets`, the hub and the templates raise
            where = f"the hub's data set of {want.name}" if folder is None else str(folder / file_of(want.name)[0])
            said = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise DataError(f"{where} could not be read: {said}") from error
        _add(tasks, want, loaded)
    return tasks


def _add(tasks: Tasks, want: Wanted, loaded: Any) -> None:
    """Put what one name gave (a task, a group of tasks, or the tasks of a tag) among the others, with its shots."""
    leaves, groups = loaded["tasks"], loaded.get("groups", {})
    for name, task in leaves.items():
        if name in tasks.leaves:
            raise ConfigError(f"--tasks asks for {name} twice, the second time by {want.name}. Run the two apart.")
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{name} runs code that the model writes. Use lm-eval itself, in a place made for that.")
        own = task.get_config("num_fewshot")
        if want.shots is not None and want.shots != own and own == 0:
            raise ConfigError(f"--shots {want.shots}: {name} has no examples to put into its prompts.")
        shots = own or 0 if want.shots is None else want.shots
        if shots and (there := _examples(task)) < shots:
            raise DataError(f"{name} has {there} examples for its prompts, fewer than {shots}.")
        task.set_config("num_fewshot", shots)
    counted = [want.name] if want.name in groups and groups[want.name].has_aggregation else list(leaves)
    tasks.leaves |= leaves
    tasks.groups |= groups
    tasks.counted |= {name: want.benchmark if len(counted) == 1 else name for name in counted}


def _examples(task: Any) -> int:
    """How many solved examples a prompt can have: the question itself is left out where both are of one file."""
    return len(task.sampler.df) - (task.fewshot_cfg.split == task.config.test_split)


def nearest(word: str, known: list[str]) -> str:
    """How a sentence about `word` ends: `; did you mean …?`, or a full stop."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


@contextmanager
def offline() -> Iterator[None]:
    """`datasets` and the hub's client touch no network. They read their environment on import only, so both are set."""
    import datasets.config
    from huggingface_hub import constants

    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    with ExitStack() as stack:
        for module, name in [*((datasets.config, name) for name in names), (constants, "HF_HUB_OFFLINE")]:
            stack.enter_context(replaced(module, name, True))
        os.environ.update(dict.fromkeys(names, "1"))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({} if value is None else {name: value})


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, `owner` has `value` as its own attribute `name`; afterwards what it had, or none of its own."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of `datasets`; lm-eval's log speaks of errors only (it has no handler of its own, so it would be stderr)."""
    import datasets

    logger, shown = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
