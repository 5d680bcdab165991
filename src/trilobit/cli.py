"""The command line: a table of commands, each one lazily imported module with run(config) → Result.

Only this file prints. The result goes to stdout, as text or (`--json`) as one JSON object; everything else to stderr.
Exit codes: 0 done, 2 the user's to mend (one line, no traceback), 128 + n stopped by signal n after saving.
"""

import argparse
import difflib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from trilobit import __version__
from trilobit.errors import ConfigError, TrilobitError
from trilobit.listener import Listener


class Command(NamedTuple):
    """Where a command's configuration, its run(config, listener) and the text of its result come from."""

    config: str
    module: str
    summary: str


COMMANDS = {
    "tune": Command("trilobit.config.tune:TuneConfig", "trilobit.train.tune", "make a checkpoint ternary"),
    "pretrain": Command("trilobit.config.pretrain:PretrainConfig", "trilobit.train.pretrain", "train without outliers"),
    "eval": Command("trilobit.config.eval:EvalConfig", "trilobit.measure.evaluate", "perplexity, benchmarks"),
    "outliers": Command(
        "trilobit.config.outliers:OutliersConfig", "trilobit.report.outliers", "activation outliers: where, carried by what"
    ),
    "quantize": Command("trilobit.config.quantize:QuantizeConfig", "trilobit.report.fourbit", "what is lost at 4 bits"),
    "export": Command("trilobit.config.export:ExportConfig", "trilobit.export.convert", "write a model for other engines"),
    "generate": Command("trilobit.config.generate:GenerateConfig", "trilobit.infer.generate", "continue a prompt"),
    "chat": Command("trilobit.config.chat:ChatConfig", "trilobit.infer.chat", "talk to a model"),
    "bench": Command("trilobit.config.bench:BenchConfig", "trilobit.measure.speed", "tokens/s, against what memory allows"),
    "doctor": Command("trilobit.config.doctor:DoctorConfig", "trilobit.doctor", "what computes here, and what would be faster"),
    "demo": Command("trilobit.config.demo:DemoConfig", "trilobit.demo", "tune the embedded model in minutes"),
}
USAGE_ERROR = 2
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error"}
"""Of a command, if it is not set: what libraries read when they are imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `trilobit` command. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"trilobit {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}{_nearest(name, COMMANDS)} `trilobit --help` lists them.")
    try:
        return _run(name, rest)
    except TrilobitError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(name: str, rest: list[str]) -> int:
    command = COMMANDS[name]
    config, as_json = parse(name, rest)
    rank = int(os.environ.get("RANK", "0"))  # as torchrun sets it
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not hasattr(config, "resume"):
        raise ConfigError(f"`trilobit {name}` is one process: start it without torchrun.")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    module = import_module(command.module)
    from trilobit.infer.quiet import no_bars

    listener = Console(sys.stderr if as_json else sys.stdout)
    try:
        with _ending_on_sigterm(), no_bars():
            result = module.run(config, listener)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        again = "; once training has begun, the same command and --resume continue it" if hasattr(config, "resume") else ""
        if (step := getattr(error, "saved", None)) is not None:
            again = f" after step {step:,}, which is saved; the same command and --resume continue it"
        if rank == 0:
            listener.note(f"stopped by {error}{again}")
        return code
    listener.finish()
    if rank > 0:
        return 0
    if as_json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    else:
        print(_text(result), end="\n" if _text(result) else "")
    return 0


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as an exception does, so that what is half-written is removed. Training has its own way."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(name: str, arguments: list[str]) -> tuple[Any, bool]:
    """Configuration from recipe < run.json < flags. --resume --out RUN has that run's run.json, as --from would."""
    from trilobit.config.flags import parse_flags

    config_type = _attribute(COMMANDS[name].config)

    general = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    general.add_argument("--json", action="store_true")
    general.add_argument("--recipe")
    general.add_argument("--from", dest="source")
    try:
        chosen, rest = general.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}.") from error
    defaults: dict[str, Any] = {}
    if chosen.recipe is not None:
        defaults |= _recipe(name, chosen.recipe)
    source = chosen.source or (_resumed(rest) if _recipes(name) else None)
    if source is not None:
        defaults |= _from_run(name, source, config_type)
    _refuse_unknown_flags(name, config_type, rest)
    given = {word.split("=", 1)[0].removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")}
    for flag, other in getattr(config_type, "INSTEAD", {}).items():
        if flag in given and other not in given:
            defaults.pop(other, None)
    epilog = "Every command also takes --json: the result as one JSON object."
    if recipes := _recipes(name):
        epilog += " --from RUN/run.json repeats a run, --resume --out RUN goes on with one."
        epilog += f" --recipe is one of: {', '.join(recipes)}."
    description = f"{config_type.__doc__}\n\n{epilog}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # how tyro takes a default of the wrong type
            config = parse_flags(config_type, rest, defaults, prog=f"trilobit {name}", description=description)
    except (UserWarning, TypeError) as error:
        if source is None:
            raise
        raise ConfigError(f"--from {source} has a value of the wrong kind: {error}") from error
    return config, chosen.json


def _recipes(command: str) -> dict[str, Any]:
    from trilobit.recipes import RECIPES

    return RECIPES.get(command, {})


def _recipe(command: str, name: str) -> dict[str, Any]:
    recipes = _recipes(command)
    if not recipes:
        raise ConfigError(f"`trilobit {command}` has no recipes.")
    if name not in recipes:
        raise ConfigError(f"there is no recipe {name!r}{_nearest(name, recipes)} There are: {', '.join(recipes)}.")
    return recipes[name]()


def _resumed(arguments: list[str]) -> str | None:
    """The record of the run that --resume continues, where --out says which: its settings need not be said again."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--out", nargs="?")
    out = words.parse_known_args(arguments)[0].out
    record = os.path.join(out or "", "run.json")
    return record if "--resume" in arguments and out and os.path.isfile(record) else None  # false too for too long a name


def _from_run(command: str, source: str, config_type: Any) -> dict[str, Any]:
    path = Path(source)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config, made_by = dict(record["config"]), record["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--from {source} is not the run.json of a run: {error}") from error
    if made_by != command:
        raise ConfigError(f"--from {source} was made by `trilobit {made_by}`, not by `trilobit {command}`.")
    types = get_type_hints(config_type)
    if unknown := sorted(set(config) - set(types)):
        raise ConfigError(f"--from {source} has settings this version does not know: {', '.join(unknown)}.")
    for key, value in config.items():
        kinds = [types[key]] if get_origin(types[key]) is Literal else get_args(types[key])  # Literal, or Literal | None
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices and value not in choices and not (value is None and type(None) in kinds):
            raise ConfigError(f"--from {source} has a value of the wrong kind: {key} is {value!r}, not one of {choices}.")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}  # not in JSON
    return config | {"resume": False}


def _refuse_unknown_flags(command: str, config_type: Any, arguments: list[str]) -> None:
    names = [f.name.replace("_", "-") for f in fields(config_type)]
    known = {"--help", *(f"--{n}" for n in names), *(f"--no-{n}" for n in names), "--json", "--recipe", "--from"}
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag == "--":
            return
        if flag.startswith("--") and flag not in known:
            raise ConfigError(
                f"`trilobit {command}` has no flag {flag}{_nearest(flag, known)} See `trilobit {command} --help`."
            )


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def _attribute(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _fail(message: str) -> int:
    print(f"trilobit: {message}", file=sys.stderr)
    return USAGE_ERROR


def _help() -> str:
    lines = [f"  trilobit {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Low-bit language models: made ternary, or trained without outliers, measured and run.",
            "",
            *lines,
            "",
            "`trilobit COMMAND --help` has the rest.",
        ]
    )


class Console(Listener):
    """Notes as lines; rows as one live line on a terminal, or a line every few seconds elsewhere. All on stderr."""

    EVERY_SECONDS = 10.0

    def __init__(self, text_to: Any):
        self.live = sys.stderr.isatty()
        self.text_to = text_to
        self.shown = 0.0
        self.open_line = False

    def note(self, text: str) -> None:
        self.finish()
        print(text, file=sys.stderr, flush=True)

    def stream(self, text: str) -> None:
        print(text, end="", file=self.text_to, flush=True)

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        important = "heldout_nats" in row
        if not self._due(important):
            return
        parts = [f"{row['tokens']:>12,} / {max_tokens:,} tokens", f"loss {row['loss']:.3f}"]
        if "lambda" in row:
            parts.append(f"λ {row['lambda']:.2f}")
        speed = row["tokens_per_second"]
        parts += [f"{speed:,.0f} tokens/s", f"{_duration((max_tokens - row['tokens']) / max(speed, 1e-9))} left"]
        if important:
            parts.append(f"held out {row['heldout_nats']:.4f}")
        if "excess_kurtosis" in row:
            parts.append(f"kurtosis {row['excess_kurtosis']:.2f}")
        self._show("  ".join(parts), important)

    def progress(self, what: str, done: int, total: int, seconds: float) -> None:
        if seconds >= (0.1 if self.live else self.EVERY_SECONDS) and self._due(False):
            left = f"  {_duration((total - done) * seconds / done)} left" if total and done else ""
            self._show(f"{what}  {done:,} / {total:,}{left}" if total else f"{what}  {done:,}", False)

    def _due(self, important: bool) -> bool:
        now = time.monotonic()
        if not important and now - self.shown < (0.1 if self.live else self.EVERY_SECONDS):
            return False
        self.shown = now
        return True

    def _show(self, line: str, stays: bool) -> None:
        if self.live:
            print(f"\r\x1b[2K{line}", end="\n" if stays else "", file=sys.stderr, flush=True)
            self.open_line = not stays
        else:
            print(line, file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self.open_line:
            print(file=sys.stderr)
            self.open_line = False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _text(result: Any) -> str:
    """A result for people: its own summary if it has one, else one line a field, in words where it has them."""
    if hasattr(result, "summary"):
        return result.summary()
    width = max(len(f.name) for f in fields(result))
    words = result.words() if hasattr(result, "words") else {}
    lines = []
    for field in fields(result):
        value = words.get(field.name, getattr(result, field.name))
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number:.6g}" for name, number in value.items() if number is not None)
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
        lines.append(f"{field.name.replace('_', ' '):<{width}}  {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
