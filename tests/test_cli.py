"""The command line: exit codes, messages, what goes to which stream, and how fast help comes."""

import io
import json
import re
import resource
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import trilobit
from infer.checkpoints import byte_tokenizer, save
from infer.natives import latent
from trilobit.cli import COMMANDS, Console, main, parse
from trilobit.config.bench import BenchConfig
from trilobit.config.chat import ChatConfig
from trilobit.config.demo import DemoConfig
from trilobit.config.doctor import DoctorConfig
from trilobit.config.eval import EvalConfig
from trilobit.config.export import ExportConfig
from trilobit.config.generate import GenerateConfig
from trilobit.config.outliers import OutliersConfig
from trilobit.config.pretrain import PretrainConfig
from trilobit.config.quantize import QuantizeConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError
from trilobit.kernels import native
from trilobit.train.signals import Interrupted

CONFIGS = {
    "tune": TuneConfig, "pretrain": PretrainConfig, "eval": EvalConfig, "outliers": OutliersConfig,
    "quantize": QuantizeConfig, "export": ExportConfig, "generate": GenerateConfig, "chat": ChatConfig, "bench": BenchConfig,
    "demo": DemoConfig, "doctor": DoctorConfig,
}  # fmt: skip
TEXT = "naïve text, and more of it.\n" * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `model`, and data of every kind of badness."""
    folder = tmp_path_factory.mktemp("place")
    save(folder / "model", tokenizer=byte_tokenizer(adds_bos=True))
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("ab")
    (folder / "other.txt").write_text("another text, for calibration")
    (folder / "binary.txt").write_bytes(b"ab\0cd")
    (folder / "latin1.txt").write_bytes("naïve".encode("latin1"))
    (folder / "rows.jsonl").write_text('{"body": "text", "id": 1}\n')
    (folder / "there").mkdir()
    (folder / "there" / "file").write_text("mine")
    (folder / "tune.json").write_text(json.dumps({"command": "tune", "config": {"model": "m", "data": "d", "colour": 1}}))
    (folder / "eval.json").write_text(json.dumps({"command": "eval", "config": {"model": "m", "data": "d"}}))
    (folder / "broken.json").write_text("{")
    return folder


class Outcome:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, _plain(out), _plain(err)


def _plain(text: str) -> str:
    """Without colours and tyro's boxes, on one line."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return " ".join(re.sub(r"[╭╮╰╯─│┌┐└┘]", " ", text).split())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in `place`, in this process; tyro's own errors leave by SystemExit."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        streams = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, streams.out, streams.err)

    return run


EVAL = ("eval", "model", "--sequence-length", "16", "--device", "cpu", "--data")
OUTLIERS = ("outliers", "model", "--device", "cpu", "--data")
QUANTIZE = ("quantize", "model", "--sequence-length", "16", "--calibration-length", "16", "--data", "text.txt")
TUNE = ("tune", "model", "--data", "text.txt", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tun",), "there is no command 'tun'; did you mean tune?"),
        (("xyzzy",), "there is no command 'xyzzy'. `trilobit --help` lists them."),
        (("tune",), "model"),
        (("eval", "model"), "nothing to measure: give --data (perplexity on a text), --tasks (benchmarks) or both"),
        (("eval", "model", "--tasks", "helaswag", "--task-data", "there"), "no files for helaswag; did you mean hellaswag?"),
        (("eval", "model", "--tasks", "five", "--task-data", "there"), "--task-data there has no piqa_validation.jsonl.gz"),
        ((*EVAL, "text.txt", "--limit", "3"), "--limit is for benchmarks: it needs --tasks"),
        (("generate", "model"), "PROMPT"),
        (("eval", "model", "--data", "text.txt", "--sequence-lenght", "3"), "did you mean --sequence-length? See"),
        (("tune", "model", "--placment=every"), "`trilobit tune` has no flag --placment; did you mean --placement?"),
        (("tune", "model", "--zzzzzz"), "`trilobit tune` has no flag --zzzzzz. See"),
        ((*TUNE, "--recipe", "papr"), "there is no recipe 'papr'; did you mean paper?"),
        ((*TUNE, "--recipe", "nothing-like"), "There are: paper, autobitlinear"),
        ((*TUNE, "--recipe"), "--recipe: expected one argument"),
        ((*EVAL, "text.txt", "--recipe", "paper"), "`trilobit eval` has no recipes"),
        ((*TUNE, "--json=yes"), "--json: ignored explicit argument 'yes'"),
        ((*TUNE, "--lr", "fast"), "fast"),
        ((*TUNE, "--lr", "nan"), "--lr is nan"),
        ((*TUNE, "--max-tokens", "12q"), "'12q' is not a count: write 4096, 12k, 3M or 1B"),
        ((*TUNE, "--max-tokens", "-5"), "-5"),
        ((*TUNE, "--max-tokens", "1.5"), "'1.5' is not a whole number"),
        ((*TUNE, "--max-tokens", "10"), "--max-tokens 10 is less than one step"),
        ((*TUNE, "--overlap", "2"), "--overlap is 2.0; it must be from 0 to 1"),
        ((*TUNE, "--placement", "somewhere"), "somewhere"),
        ((*TUNE, "--out", "there"), "there exists already. It holds no run, but file: choose another name with --out there-2."),
        ((*TUNE, "--out", "text.txt"), "text.txt exists already. It is a file: choose"),
        ((*TUNE, "--out", "text.txt/run"), "text.txt is not a writable folder"),
        ((*TUNE, "--out", "n" * 300), "File name too long"),
        ((*TUNE, "--out", "n" * 300, "--resume"), "there is no run to resume in nnn"),
        ((*TUNE, "--out", "new", "--resume"), "there is no run to resume in new"),
        ((*TUNE, "--sequence-length", "128"), "--sequence-length 128 is longer than the model's 64 positions"),
        ((*TUNE, "--from", "tune.json"), "--from tune.json has settings this version does not know: colour"),
        ((*TUNE, "--from", "eval.json"), "was made by `trilobit eval`, not by `trilobit tune`"),
        ((*TUNE, "--from", "broken.json"), "--from broken.json is not the run.json of a run"),
        ((*TUNE, "--from", "nowhere.json"), "--from nowhere.json is not the run.json of a run"),
        ((*EVAL, "nowhere.txt"), "no such file: --data nowhere.txt"),
        ((*EVAL, "n" * 300), "no such file: --data nnn"),
        ((*EVAL, "n" * 300 + ",text.txt"), "no such file: --data nnn"),
        ((*EVAL, "empty.txt"), "empty.txt is empty (0 bytes)"),
        ((*EVAL, "short.txt"), "the text has 2 tokens, fewer than one window of 15"),
        ((*EVAL, "binary.txt"), "binary.txt is binary: byte 2 is NUL"),
        ((*EVAL, "latin1.txt"), "latin1.txt is not UTF-8: byte 2 is 0xef"),
        ((*EVAL, "rows.jsonl"), "has no field 'text'. Its fields: 'body', 'id'"),
        ((*EVAL, "text.txt", "--sequence-length", "65"), "--sequence-length 65 is longer than the model's 64 positions"),
        ((*EVAL, "text.txt", "--bos", "maybe"), "maybe"),
        ((*EVAL, "text.txt", "--device", "warp"), "--device warp cannot be used here"),
        (("eval", "/no/model", "--data", "text.txt"), "there is no /no/model"),
        (("eval", "m" * 300, "--data", "text.txt"), "cannot be read: File name too long"),
        (("tune", "m" * 300, "--data", "text.txt", "--out", "new"), "cannot be read: File name too long"),
        (("eval", "there", "--data", "text.txt"), "there is not a checkpoint directory: it has no config.json"),
        (("outliers", "model"), "--data"),
        ((*OUTLIERS, "text.txt", "--protocol", "neither"), "neither"),
        ((*OUTLIERS, "text.txt", "--out", "there"), "there exists already. Choose another name"),
        ((*OUTLIERS, "text.txt", "--sequence-length", "65"), "--sequence-length 65 is longer than the model's 64 positions"),
        ((*OUTLIERS, "short.txt", "--protocol", "osp"), "the text has 5 tokens, fewer than one sequence of 2048"),
        (("quantize", "model"), "--data"),
        ((*QUANTIZE, "--bits", "4-4"), "--bits 4-4 is not W-A-KV or W-A-K-V: write 4-4-4"),
        ((*QUANTIZE, "--bits", "4-9-4"), "--bits 4-9-4: 9 is out of range. Each is from 2 to 8, or 16"),
        ((*QUANTIZE, "--bits", "1-4-4"), "--bits 1-4-4: 1 is out of range"),
        ((*QUANTIZE, "--protocol", "ops"), "there is no protocol 'ops'; did you mean osp? There are osp, quarot, spinquant"),
        ((*QUANTIZE, "--protocol", "tune.json"), "--protocol tune.json has knobs that do not exist: command, config"),
        ((*QUANTIZE, "--protocol", "none.json"), "--protocol none.json: there is no such file"),
        ((*QUANTIZE, "--method", "gptq"), "GPTQ and SpinQuant are fitted on text: give --calibration"),
        ((*QUANTIZE, "--method", "gptq", "--calibration", "text.txt"), "a model must not be fitted to what is measured"),
        ((*QUANTIZE, "--method", "gptq", "--calibration", "other.txt"), "the calibration text (other.txt) is too short"),
        ((*QUANTIZE, "--method", "gptq", "--calibration", "short.txt"), "Lower --calibration-length"),
        ((*QUANTIZE, "--grid", "osp"), "--grid osp takes long: give --out"),
        ((*QUANTIZE, "--grid", "osp", "--out", "new", "--method", "rtn"), "--grid osp has every --method of the table in it"),
        (("quantize", "model", "other-model", *QUANTIZE[2:]), "2 models are given: several are for --grid"),
        ((*QUANTIZE, "--out", "there"), "there exists already. It holds no run, but file: choose another name with --out"),
        ((*QUANTIZE, "--out", "new", "--resume"), "there is no run to resume in new"),
        ((*QUANTIZE, "--tasks", "piqqa", "--task-data", "there"), "no files for piqqa; did you mean piqa?"),
        ((*QUANTIZE, "--limit", "3"), "--limit is for benchmarks: it needs --tasks"),
        (("generate", "someone/model", "hello"), "someone/model is not a directory here, and the hub cannot be reached"),
        (("generate", "model", "hello", "--temperature", "-1"), "--temperature"),
        (("generate", "model", "hello", "--top-p", "1.5"), "--top-p is 1.5; it must be above 0 and at most 1"),
        (("generate", "model", "hello", "--top-k", "-1"), "--top-k is -1; it must be 0 or above"),
        (("generate", "model", "hello", "--engine", "fast"), "fast"),
        (("generate", "model", "hello", "--engine", "native"), "its projections are not ternary: the engine runs ternary"),
        (("generate", "model", "hello", "--engine", "native", "--device", "cuda"), "--engine native runs on the CPU, not on"),
        (("generate", "model", "hello", "--threads", "0"), "--threads is 0; it must be from 1 to 256"),
        (("generate", "model", "hello", "--cache", "fp8"), "fp8"),
        (("generate", "model", "hello", "--max-tokens", "100"), "more than the model's 64 positions: at most"),
        (("chat", "model", "--context", "100"), "--context 100 leaves no room for a turn beside --max-tokens 512"),
        (("chat", "model", "--max-tokens", "9"), "no chat template: it is no chat model. Use `trilobit generate`"),
        (("chat", "nowhere/at/all"), "there is no nowhere/at/all"),
        (("export", "model"), "--out"),
        (("export", "model", "--out", "there"), "there exists already. Choose another --out"),
        (("export", "model", "--out", "new"), "its projections are not ternary: the engine runs ternary models only"),
        (("export", "model", "--out", "new", "--to", "gguf9"), "gguf9"),
        (("export", "model", "--out", "new", "--layout", "int8"), "int8"),
        (("demo", "--out", "there"), "there exists and is not an earlier demo"),
    ],
)  # fmt: skip
def test_bad_input(cli: Any, place: Path, arguments: tuple[str, ...], says: str) -> None:
    """Exit 2, the message on stderr and nothing on stdout, no traceback, and not a file more or less than before."""
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    outcome = cli(*arguments)
    assert outcome.code == 2, outcome.err
    assert says in outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "config", [{"max_tokens": "many"}, {"sequence_length": None}, {"clip": "x"}, {"placement": 3}], ids=str
)
def test_a_record_with_wrong_values_is_refused(cli: Any, place: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """--from a run.json whose values are of the wrong kind is an error of the user's, not a traceback."""
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"command": "tune", "config": {"model": "model", "data": "text.txt", **config}}))
    outcome = cli("tune", "--from", str(record))
    assert outcome.code == 2
    assert f"--from {record} has a value of the wrong kind" in outcome.err or "invalid" in outcome.err.lower()


def test_flags_win_over_record_over_recipe(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipe < run.json < flags, and what none of them sets is the default."""
    from trilobit.train import tune

    seen = []

    def run(config: TuneConfig, listener: Any) -> EvalConfig:
        seen.append(config)
        return EvalConfig(model="m", data="d")

    monkeypatch.setattr(tune, "run", run)
    record = tmp_path / "run.json"
    record.write_text(
        json.dumps({"command": "tune", "config": {"model": "m", "data": "d", "lr": 0.5, "seed": 3, "resume": True}})
    )
    assert cli("tune", "--recipe", "hf-blog", "--from", str(record), "--seed", "4", "--max-tokens", "2M", "--json").code == 0
    (config,) = seen
    assert (config.model, config.lr, config.seed, config.max_tokens) == ("m", 0.5, 4, 2_000_000)
    assert (config.placement, config.schedule, config.ramp_fraction) == ("none", "global", 0.2)
    assert not config.resume
    assert config.sequences == TuneConfig(model="m", data="d").sequences


def test_a_run_that_is_resumed_need_not_be_told_again(tmp_path: Path) -> None:
    """--resume --out RUN has the settings of RUN/run.json; flags still win, and without a record all is as it was."""
    settings = {"model": "m", "data": "d", "lr": 0.5, "out": "elsewhere", "resume": False}
    (tmp_path / "run.json").write_text(json.dumps({"command": "tune", "config": settings}))
    for words in (["--resume", "--out", str(tmp_path)], ["--resume", f"--out={tmp_path}", "--seed", "4"]):
        config, _ = parse("tune", words)
        assert (config.model, config.data, config.lr, config.out, config.resume) == ("m", "d", 0.5, str(tmp_path), True)
        assert config.seed == (4 if "--seed" in words else 0)
    with pytest.raises(ConfigError, match="was made by `trilobit tune`, not by `trilobit pretrain`"):
        parse("pretrain", ["--resume", "--out", str(tmp_path)])
    config, _ = parse("tune", ["model", "--data", "text", "--resume", "--out", str(tmp_path / "none")])
    assert (config.model, config.lr, config.resume) == ("model", None, True)
    config, _ = parse("tune", ["model", "--data", "text", "--out", str(tmp_path)])
    assert (config.model, config.lr) == ("model", None)


@pytest.mark.parametrize("flag", ["--tokenizer", "--tokenizer="])
def test_a_flag_takes_the_place_of_a_recipes_other_answer(flag: str) -> None:
    """osp-3m makes a tokenizer of the text; with --tokenizer it does not. Both on the command line are still two answers."""
    words = ["--recipe", "osp-3m", "--data", "d", *([flag, "place"] if flag[-1] != "=" else [flag + "place"])]
    config, _ = parse("pretrain", words)
    assert (config.tokenizer, config.train_tokenizer, config.architecture) == ("place", None, "llama-3m")
    assert parse("pretrain", words[:4])[0].train_tokenizer == 4096
    with pytest.raises(ConfigError, match="two answers to one question"):
        parse("pretrain", [*words, "--train-tokenizer", "4096"])


def test_json_is_one_object_on_stdout(cli: Any) -> None:
    """--json prints the Result as one JSON object and nothing else there; all else, streamed text too, is on stderr."""
    outcome = cli(*EVAL, "text.txt", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert {"perplexity", "nats_per_token", "bits_per_byte", "tokens", "bos"} <= set(result)
    assert result["bos"] is True
    outcome = cli("generate", "model", "naïve", "--max-tokens", "12", "--device", "cpu", "--json")
    result = json.loads(outcome.out)
    assert {"text", "tokens", "tokens_per_second"} <= set(result)
    assert " ".join(result["text"].split()) in outcome.err


def test_text_for_people_is_on_stdout(cli: Any) -> None:
    """Without --json the numbers and the streamed text are on stdout."""
    outcome = cli(*EVAL, "text.txt")
    assert outcome.code == 0
    assert re.search(r"perplexity\s+[\d,]+\.\d{4}", outcome.out)
    outcome = cli("generate", "model", "naïve", "--max-tokens", "12", "--device", "cpu")
    assert outcome.code == 0
    assert outcome.out.strip()
    assert "tokens/s" in outcome.err


@pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")
def test_exported_models_run(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """export, generate and chat on what it wrote: results on stdout, and the engine and its reason on stderr."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    latent(tmp_path / "latent", tokenizer=tokenizer)
    out = str(tmp_path / "out")
    outcome = cli("export", str(tmp_path / "latent"), "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert {"path", "form", "bytes", "seconds"} <= set(result)
    assert {"layout", "bits_per_ternary_weight"} <= set(result["details"])
    assert {"kl", "perplexity_ratio"} <= set(result["check"]["rows"][0]["agreement"])
    outcome = cli("generate", out, "naïve", "--max-tokens", "12", "--verify", "--cache", "int8", "--json")
    assert json.loads(outcome.out)["engine"] == "native"
    assert "Runs on native engine, 1 thread, " in outcome.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/exit\n"))
    outcome = cli("chat", out, "--max-tokens", "8", "--context", "60", "--json")
    assert json.loads(outcome.out)["turns"] == 1
    outcome = cli("eval", out, "--data", "text.txt")
    assert outcome.code == 2
    assert "is written for the native engine" in outcome.err


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: nothing in the first ten seconds, then a line each ten, on stderr, with the time that is left."""
    now = 100.0
    monkeypatch.setattr("trilobit.cli.time.monotonic", lambda: now)
    console = Console(sys.stdout)
    for done in range(1, 61):
        now += 1
        console.progress("Asking", done, 60, float(done))
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.splitlines()[:2] == ["Asking  10 / 60  0:50 left", "Asking  20 / 60  0:40 left"]
    assert len(streams.err.splitlines()) == 6


def test_bars_of_libraries_are_not_shown(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that a library draws while a command runs is silent, even where it asks not to be; the hub's are drawn; afterwards
    all are as they were (old code: "Loading weights: 100%|…" between our lines)."""
    from huggingface_hub.utils import tqdm as hub_bar
    from tqdm import tqdm

    from trilobit.measure import evaluate

    def run(config: EvalConfig, listener: Any) -> EvalConfig:
        list(tqdm([1], desc="Loading weights", disable=False))
        list(hub_bar([1], desc="Fetching files"))
        return config

    monkeypatch.setattr(evaluate, "run", run)
    outcome = cli(*EVAL, "text.txt")
    assert outcome.code == 0
    assert "Loading weights" not in outcome.err
    assert "Fetching files" in outcome.err
    assert not tqdm([1], disable=False).disable


def test_interruptions_have_their_codes(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C exits 130; an exception with an exit code of its own exits with that, pointing to --resume where there is one."""
    from trilobit.measure import evaluate
    from trilobit.train import tune

    class Stopped(Exception):
        exit_code = 143

    def raising(error: BaseException):
        def run(config: Any, listener: Any) -> None:
            raise error

        return run

    monkeypatch.setattr(evaluate, "run", raising(KeyboardInterrupt()))
    assert cli(*EVAL, "text.txt").code == 130
    monkeypatch.setattr(evaluate, "run", raising(Stopped("SIGTERM")))
    outcome = cli(*EVAL, "text.txt")
    assert outcome.code == 143
    assert "stopped by SIGTERM" in outcome.err
    assert "--resume" not in outcome.err
    monkeypatch.setattr(tune, "run", raising(Stopped("SIGTERM")))
    outcome = cli("tune", "model", "--data", "text.txt")
    assert outcome.code == 143
    assert "stopped by SIGTERM; once training has begun, the same command and --resume continue it" in outcome.err
    monkeypatch.setattr(tune, "run", raising(Interrupted(15, saved=1200)))
    outcome = cli("tune", "model", "--data", "text.txt")
    assert outcome.code == 143
    assert "stopped by SIGTERM after step 1,200, which is saved; the same command and --resume continue it" in outcome.err
    monkeypatch.setattr(evaluate, "run", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        cli(*EVAL, "text.txt")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_mentions_every_field(cli: Any, command: str) -> None:
    """`trilobit COMMAND --help` exits 0, on stdout, with every field of its configuration and its docstring."""
    outcome = cli(command, "--help")
    assert outcome.code == 0
    positional = {"model": "MODEL", "prompt": "PROMPT", "architecture": "ARCHITECTURE", "models": "MODEL"}
    for field in fields(CONFIGS[command]):
        name = positional.get(field.name, f"--{field.name.replace('_', '-')}")
        name = "--max-tokens" if name == "--max_tokens" else name
        assert re.search(rf"{re.escape(name)}\b", outcome.out), name
    assert "--json" in outcome.out
    trains = command in ("tune", "pretrain")
    assert ("--from" in outcome.out) == trains, "a run.json is written by what trains"
    if trains:
        assert {"tune": "hf-blog", "pretrain": "osp-60m"}[command] in outcome.out


def test_help_and_version(cli: Any) -> None:
    """Nothing, -h, --help and help list every command with its summary; --version names the version."""
    for arguments in ((), ("-h",), ("--help",), ("help",)):
        outcome = cli(*arguments)
        assert outcome.code == 0
        assert all(f"trilobit {name} {command.summary}" in outcome.out for name, command in COMMANDS.items())
    assert cli("--version").out == f"trilobit {trilobit.__version__}"


@pytest.mark.parametrize("arguments", [["--help"], ["tun"]])
def test_help_is_fast_and_loads_nothing(arguments: list[str]) -> None:
    """Help and a misspelt command import neither torch nor transformers nor tyro, in < 0.5 s of CPU."""
    code = (
        f"import sys; from trilobit.cli import main; main({arguments!r});"
        "assert not {'torch', 'transformers', 'tyro'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_loads_no_torch(command: str) -> None:
    """Parsing a command line imports neither torch nor transformers: a misspelt flag is answered at once."""
    code = (
        "import sys\nfrom trilobit.cli import main\n"
        f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_sigterm_leaves_nothing_half_written(cli: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is not training ends as at an exception: what export has written so far is gone, the code is 128 + 15 (old
    code: the process died where it stood, and left a folder with a dot)."""
    before = sorted(path.name for path in place.iterdir())
    seen: list[list[str]] = []

    def stopped(*arguments: Any) -> None:
        seen.append(sorted({path.name for path in place.iterdir()} - set(before)))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("trilobit.export.convert.verify", stopped)
    handler = signal.getsignal(signal.SIGTERM)
    assert cli("export", "model", "--to", "bf16", "--out", "stopped").code == 143
    assert len(seen) == 1 and seen[0][0].startswith(".stopped.partial-")
    assert sorted(path.name for path in place.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is handler
