import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from families import build
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError, DataError, ModelError, NonFiniteError, OutputError, TrilobitError
from trilobit.infer.load import load
from trilobit.listener import Listener
from trilobit.locks import alone_in
from trilobit.measure.perplexity import nats
from trilobit.nn.ternary import ternary_modules
from trilobit.train import data as data_module
from trilobit.train import layers as layers_module
from trilobit.train import objective as objective_module
from trilobit.train import precision as precision_module
from trilobit.train import run as run_module
from trilobit.train import text as text_module
from trilobit.train import tune as tune_module
from trilobit.train.checkpoint import list_checkpoints
from trilobit.train.loop import Interrupted
from trilobit.train.objective import TuneObjective
from trilobit.train.track import PACKAGES
from trilobit.train.tune import TuneResult, run
from trilobit.train.windows import evaluation_windows

VOCABULARY, STEPS, STEP_TOKENS = 300, 8, 64
# transformers' bitnet classes compile a function, and importing the compiler of torch 2.13 warns of torch's own code
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
TIMES = {"seconds", "tokens_per_second"}
WORDS = ["a", "the", "cat", "dog", "bird", "sees", "finds", "small", "large", "old", "red", "house", "tree", "and", "not"]


def sentences(count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(5, 12))).capitalize() + "." for _ in range(count)]


@dataclass(frozen=True)
class Place:
    """A tiny random Llama with a tokenizer of its own, and text, on disk."""

    model: Path
    text: Path
    cache: Path

    def config(self, out: Path, **settings: Any) -> TuneConfig:
        defaults: dict[str, Any] = {
            "model": str(self.model), "data": str(self.text), "out": str(out), "cache_dir": str(self.cache),
            "sequence_length": 16, "sequences": 2, "batch_tokens": STEP_TOKENS, "max_tokens": STEPS * STEP_TOKENS,
            "eval_tokens": 64, "eval_every": 256, "checkpoint_every": 192, "precision": "fp32", "lr": 1e-2,
            "ramp_fraction": 0.8, "store": "fp32", "device": "cpu", "schedule": "layerwise", "distill": "none",
        }  # fmt: skip
        return TuneConfig(**{**defaults, **settings})


def write_model(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1, eos_token_id=0, bos_token_id=0,
        **{"tie_word_embeddings": False, **settings},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(sentences(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Place:
    folder = tmp_path_factory.mktemp("tune")
    write_model(folder / "model", tokenizer)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences(400)))
    return Place(folder / "model", folder / "text.jsonl", folder / "cache")


@pytest.fixture(scope="session")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuneResult]:
    """The run that nothing interrupts, with the default settings of `Place.config`."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(place.config(out))


@pytest.fixture
def no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what follows the latents (model/ and the plots), for tests that look at training alone."""
    written = SimpleNamespace(path="", form="", reason="", bytes=0, agreement={})
    for name in ("write_model", "write_full_precision"):
        monkeypatch.setattr(tune_module, name, lambda *_, **__: written)
    for name in ("plot_loss", "plot_strengths", "plot_flips"):
        monkeypatch.setattr(tune_module, name, lambda *_: None)


class At(Listener):
    """Does something when the row of a step is heard."""

    def __init__(self, step: int, action: Callable[[], Any]):
        self.step, self.action, self.rows = step, action, []

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        self.rows.append(row)
        if row["step"] == self.step:
            self.action()


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def latent(out: Path) -> bytes:
    return (out / "latent" / "model.safetensors").read_bytes()


def assert_same_run(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    assert latent(a) == latent(b)


@pytest.mark.parametrize("cover", ["projections", "+embeddings"])
def test_texts_ends_learn_where_they_are_the_padding_too(
    cover: Any, place: Place, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A checkpoint whose padding is its end-of-text token (SmolLM2's, and most) has that row of its embedding trained."""
    write_model(tmp_path / "model", tokenizer, pad_token_id=0)
    run(place.config(tmp_path / "run", model=str(tmp_path / "model"), max_tokens=2 * STEP_TOKENS, cover=cover))
    was = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    now = load_file(tmp_path / "run" / "latent" / "model.safetensors")["model.embed_tokens.weight"]
    moved = (now - was).norm(dim=1)
    assert moved[0] > 0.5 * moved[1:].max()


def test_a_run_leaves_everything_in_its_directory(place: Place, whole: tuple[Path, TuneResult]) -> None:
    """run.json, log.jsonl, the newest checkpoint, model/, latent/ and the pictures; nothing is a pickle or half-written."""
    out, result = whole
    names = {"run.json", "log.jsonl", "checkpoints", "model", "latent", "loss.png", "lambda.png", "flips.png"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in list_checkpoints(out)] == ["step-8"]
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".png", ".jinja"}
    for name in ("loss.png", "lambda.png", "flips.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 5000
    record = json.loads((out / "run.json").read_text())
    assert {"command", "config", "argv", "started", "versions", "git", "data", "schedules", "plan", "result"} <= record.keys()
    assert TuneConfig(**record["config"]) == place.config(out)
    assert record["result"] == json.loads(json.dumps(result.__dict__))
    assert (result.steps, result.tokens) == (STEPS, STEPS * STEP_TOKENS)
    assert result.agreement["top1"] >= 0.985
    assert result.model_bytes == (out / "model" / "model.safetensors").stat().st_size
    assert abs(result.nats_per_token - rows(out)[-1]["heldout_nats"]) < 1e-4


def test_both_models_load(whole: tuple[Path, TuneResult]) -> None:
    """transformers alone loads model/, trilobit loads latent/ as trainable fp32 modules at λ = 1, and they agree."""
    out, _ = whole
    ids = torch.arange(10, 26)[None]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)(input_ids=ids).logits
    loaded = load(out / "latent")
    assert loaded.form == "latent"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.model.parameters())
    assert len(ternary_modules(loaded.model)) == 14
    assert torch.equal(loaded.model(input_ids=ids).logits.argmax(-1), stock.argmax(-1))


def test_every_row_has_what_the_design_asks_for(whole: tuple[Path, TuneResult]) -> None:
    """A row a step, each with step, tokens, loss, lr, lambda and tokens_per_second; λ rises from 0 to 1; the loss falls."""
    out, _ = whole
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    for row in lines:
        assert {"step", "tokens", "loss", "lr", "lambda", "lambda_activations", "tokens_per_second"} <= row.keys()
    strengths = [row["lambda"] for row in lines]
    assert strengths == sorted(strengths)
    assert (strengths[0], strengths[-1]) == (0, 1)
    assert 0 < strengths[3] < 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [row["step"] for row in lines if "heldout_nats" in row] == [4, 8]


def test_equal_seeds_give_equal_runs(place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None) -> None:
    """The same settings give the same log and latents to the last bit, from any random state; another seed does not."""
    torch.manual_seed(777)
    run(place.config(tmp_path / "same"))
    assert_same_run(whole[0], tmp_path / "same")
    run(place.config(tmp_path / "other", seed=1))
    assert latent(tmp_path / "other") != latent(whole[0])


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (3, signal.SIGINT), (5, signal.SIGTERM)])
def test_an_interrupted_run_resumes_bit_exactly(
    step: int, number: int, place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None
) -> None:
    """Stopped by a signal early, half-way and late in the λ ramp, and continued in any random state, a run has the log and
    latents of the run that was not stopped."""
    config = place.config(tmp_path / "run")
    with pytest.raises(Interrupted) as caught:
        run(config, At(step, lambda: signal.raise_signal(number)))
    assert caught.value.exit_code == 128 + number
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{step + 1}"]
    assert not (tmp_path / "run" / "model").exists()
    torch.manual_seed(step)
    listener = At(0, lambda: None)
    run(replace(config, resume=True), listener)
    assert listener.rows[0]["step"] == step + 2
    assert_same_run(whole[0], tmp_path / "run")


HARD = [
    {"precision": "bf16", "distill": "logits", "distill_weight": 0.5, "temperature": 2.0},
    {"activation_checkpointing": True, "schedule": "layerwise-reverse", "activation_schedule": "global", "gain": "scalar"},
    {"decay": "wsd", "weight_decay": 0.1, "cover": "+lm_head", "scale": "group-64", "placement": "output"},
    {"schedule": "sensitivity", "activation_schedule": "layerwise", "attention": "eager"},
    {"optimizer": "muon", "weight_decay": 0.1, "scale": "row", "learned_ranges": True},
]


@pytest.mark.parametrize("settings", HARD, ids=["bf16-distill", "checkpointing", "wsd-head", "sensitivity", "muon"])
def test_resuming_is_bit_exact_whatever_is_trained(
    settings: dict[str, Any], place: Place, tmp_path: Path, no_writing: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also with bf16, distillation, activation checkpointing, dropout, tied embeddings, other schedules, decays and covers."""
    tied = "cover" not in settings
    write_model(tmp_path / "model", tokenizer, tie_word_embeddings=tied, attention_dropout=0.2)
    config = replace(place.config(tmp_path / "whole"), model=str(tmp_path / "model"), **settings)
    run(config)
    config = replace(config, out=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        run(config, At(4, lambda: signal.raise_signal(signal.SIGTERM)))
    torch.manual_seed(5)
    run(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_resumes_bit_exactly(
    step: int, place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None
) -> None:
    """A run that died without saving, before its first checkpoint or after it, is repeated from there to the same bits."""

    class Killed(Exception):
        pass

    def die() -> None:
        raise Killed

    config = place.config(tmp_path / "run")
    with pytest.raises(Killed):
        run(config, At(step, die))
    assert len(list_checkpoints(tmp_path / "run")) == (step > 3)
    run(replace(config, resume=True))
    assert_same_run(whole[0], tmp_path / "run")


def test_a_run_that_stopped_while_writing_its_model_finishes(
    place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the last step, --resume only writes what is missing."""
    original = tune_module.write_latent

    def write_and_stop(*arguments: Any) -> None:
        original(*arguments)
        signal.raise_signal(signal.SIGTERM)

    config = place.config(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(tune_module, "write_latent", write_and_stop)
        with pytest.raises(Interrupted):
            run(config)
    listener = At(0, lambda: None)
    result = run(replace(config, resume=True), listener)
    assert listener.rows == []
    assert_same_run(whole[0], tmp_path / "run")
    assert result.nats_per_token == whole[1].nats_per_token


def command(config: TuneConfig, *more: str) -> list[str]:
    default = TuneConfig(model="", data="")
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(config).items()
        if name != "model" and value != getattr(default, name)
    ]
    return [sys.executable, "-m", "trilobit.cli", "tune", config.model, *flags, *more]


@pytest.mark.parametrize(("number", "code", "after"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 4)])
def test_the_command_saves_and_resumes(
    number: int, code: int, after: int, place: Place, tmp_path: Path, no_writing: None
) -> None:
    """A real signal to the command ends it with 143 or 130 and a hint; --resume gives the bits of an undisturbed run."""
    config = place.config(tmp_path / "run", max_tokens=60 * STEP_TOKENS, eval_every=600, checkpoint_every=10**6)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(config), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < after):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert output == ""
    assert "Traceback" not in errors
    assert "--resume" in errors.splitlines()[-1]
    (saved,) = list_checkpoints(tmp_path / "run")
    assert after <= int(saved.name.removeprefix("step-")) < 60
    assert len(rows(tmp_path / "run")) == int(saved.name.removeprefix("step-"))
    run(replace(config, resume=True))
    run(replace(config, out=str(tmp_path / "undisturbed")))
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "module", "source"),
    [(None, data_module, "encode_documents"), ("self", text_module, "sample_windows")],
    ids=["file", "self"],
)
def test_a_signal_stops_the_tokenising(
    data: str | None, module: Any, source: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal amid the documents, read or sampled, ends the run at the next one: no directory, no cached tokens."""
    original, taken = getattr(module, source), []

    def documents(*arguments: Any, **settings: Any) -> Iterator[Any]:
        for document in original(*arguments, **settings):
            taken.append(document)
            if len(taken) == 3:
                signal.raise_signal(signal.SIGTERM)
            yield document

    monkeypatch.setattr(module, source, documents)
    cache = tmp_path / "cache"
    with pytest.raises(Interrupted):
        run(place.config(tmp_path / "run", data=data or str(place.text), cache_dir=str(cache)))
    assert len(taken) == 3
    assert not (tmp_path / "run").exists()
    assert list(cache.iterdir()) == []


def interrupted(place: Place, out: Path, **settings: Any) -> TuneConfig:
    config = place.config(out, **settings)
    with pytest.raises(Interrupted):
        run(config, At(1, lambda: signal.raise_signal(signal.SIGTERM)))
    return config


def test_resuming_with_other_settings_is_refused_by_name(place: Place, tmp_path: Path, no_writing: None) -> None:
    """Each changed setting is named with both values and nothing is touched; where a run is kept and logged may change; its
    text may not."""
    config = replace(interrupted(place, tmp_path / "run"), resume=True)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"--batch-tokens was 64, is 128; --lr was 0\.01, is 0\.5\.") as caught:
        run(replace(config, lr=0.5, batch_tokens=128))
    assert "--seed" not in str(caught.value)
    for name, value in {"seed": 1, "placement": "none", "precision": "bf16", "distill": "logits", "max_tokens": 1024}.items():
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} was .*, is {value}"):
            run(replace(config, **{name: value}))
    changed = tmp_path / "text.jsonl"
    shutil.copy(place.text, changed)
    moved = replace(place, text=changed)
    other = interrupted(moved, tmp_path / "other")
    changed.write_text(changed.read_text().replace("cat", "cow"))
    with pytest.raises(DataError, match="has changed since"):
        run(replace(other, resume=True))
    record = json.loads(before)
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"data_sha256": "0" * 64}))  # other tokens, same name
    with pytest.raises(DataError, match="has changed since"):
        run(config)
    (tmp_path / "run" / "run.json").write_bytes(before)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text('{"name": "something else"}')
    with pytest.raises(OutputError, match=r"was not written by this version: it lacks base, .*, config"):
        run(replace(config, out=str(foreign)))
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    run(replace(config, keep_checkpoints=3, checkpoint_every=64, cache_dir=str(tmp_path / "cache")))
    assert [path.name for path in list_checkpoints(tmp_path / "run")][-1] == "step-8"


class Said(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_keeps_what_was_decided(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continued where the other precision is faster, and by a version with another default rate (old code: at that one), a run
    is the one that nothing stopped, bit for bit; run.json and the notes say which; another precision that is asked for is
    refused."""
    monkeypatch.setattr(precision_module, "multiplication_rates", lambda: (1e11, 2e11))
    said = Said()
    run(place.config(tmp_path / "whole", precision="auto", lr=None), said)
    assert "bf16: this CPU multiplies 100 GFLOP/s in fp32, 200 in bf16" in said.notes
    config = place.config(tmp_path / "run", precision="auto", lr=None)
    with pytest.raises(Interrupted):
        run(config, At(3, lambda: signal.raise_signal(signal.SIGTERM)))
    monkeypatch.setattr(precision_module, "multiplication_rates", lambda: (2e11, 1e11))
    monkeypatch.setattr(tune_module, "LR_TIMES_ROOT_WIDTH", 2 * tune_module.LR_TIMES_ROOT_WIDTH)
    with pytest.raises(ConfigError, match="--precision was bf16, is fp32"):
        run(replace(config, precision="fp32", resume=True))
    run(replace(config, resume=True))
    whole, parts = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "run"))
    assert whole["config"]["precision"] == parts["config"]["precision"] == "bf16"
    assert whole["result"]["nats_per_token"] == parts["result"]["nats_per_token"]
    run(place.config(tmp_path / "other", precision="auto", lr=parts["lr"]))
    other = json.loads((tmp_path / "other" / "run.json").read_text())
    assert other["config"]["precision"] == "fp32" and whole["lr"] == parts["lr"] == other["lr"] > 0
    assert other["result"]["nats_per_token"] != whole["result"]["nats_per_token"]


def test_resuming_needs_the_same_base(place: Place, tmp_path: Path, no_writing: None) -> None:
    """A base checkpoint whose weights have changed since is refused: a teacher made of it would be another."""
    base = tmp_path / "model"
    shutil.copytree(place.model, base)
    config = interrupted(replace(place, model=base), tmp_path / "run", distill="logits")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 0.25
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights of .* have changed since .*run began"):
        run(replace(config, resume=True))


@pytest.mark.parametrize("work", [0, 1e30])
def test_compiling_is_decided_once_and_said(
    work: float, place: Place, tmp_path: Path, no_writing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto compiles if the run is long enough and a compiler is there; the decision is noted, kept in run.json and followed
    on resume; asking for it without a compiler is an error, and so is resuming a compiled run without one."""
    notes, decided = Notes(), []
    monkeypatch.setitem(layers_module.REPAID_FLOPS, "cpu", work)
    monkeypatch.setattr(tune_module, "prepare_layers", lambda model, config, compiled: decided.append(compiled))
    monkeypatch.setattr(layers_module, "_compiler_obstacle", lambda device: None)
    run(place.config(tmp_path / "run"), notes)
    assert decided == [work == 0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["compiled"] == (work == 0)
    assert any(("operations repay" if work == 0 else "too few to repay") in note for note in notes.heard)
    monkeypatch.setattr(layers_module, "_compiler_obstacle", lambda device: "no compiler was found")
    run(place.config(tmp_path / "other"), notes)
    assert decided == [work == 0, False]
    assert "not compiled: no compiler was found" in notes.heard


def test_compiling_without_a_compiler_is_refused(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile yes without a compiler says what is missing and leaves nothing."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    refuse(ConfigError, r"--compile.*no C\+\+ compiler", place.config(tmp_path / "run", compile="yes"))


def test_a_ramp_to_the_very_end_is_warned_of(place: Place, tmp_path: Path, no_writing: None) -> None:
    """With --ramp-fraction 1 no step trains the model that is written, and the run says so."""
    notes = Notes()
    run(place.config(tmp_path / "run", ramp_fraction=1.0), notes)
    assert any(note.startswith("--ramp-fraction 1:") for note in notes.heard)


class Notes(Listener):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)


def test_resuming_needs_an_unfinished_run(place: Place, whole: tuple[Path, TuneResult], tmp_path: Path) -> None:
    """A finished run says so, a missing one too, and neither is touched."""
    before = sorted((path, path.stat().st_mtime_ns) for path in whole[0].rglob("*"))
    with pytest.raises(OutputError, match="has finished already"):
        run(place.config(whole[0], resume=True))
    with pytest.raises(OutputError, match="no run to resume"):
        run(place.config(tmp_path / "none", resume=True))
    with pytest.raises(OutputError, match=r"exists already.*--resume.*--out .*run-2"):
        run(place.config(whole[0]))
    assert sorted((path, path.stat().st_mtime_ns) for path in whole[0].rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def refuse(error: type[TrilobitError], message: str, config: TuneConfig) -> None:
    """`config` is refused, and its directory does not appear."""
    assert config.out is not None
    with pytest.raises(error, match=message):
        run(config)
    assert not Path(config.out).exists()


def test_moments_cannot_leave_a_cpu(place: Place, tmp_path: Path) -> None:
    """--offload where parameters are in the host's memory already."""
    refuse(ConfigError, "--offload is for a GPU", place.config(tmp_path / "run", offload=True))


def test_bad_places_are_refused(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be made or written, and a disk too small for the run, are refused and nothing appears."""
    (tmp_path / "file").write_text("")
    refuse(OutputError, "is not a writable folder", place.config(tmp_path / "file" / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        refuse(OutputError, "is not a writable folder", place.config(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        refuse(OutputError, "needs .* GB under", place.config(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        refuse(OutputError, "Permission denied", place.config(tmp_path / "run"))


def test_bad_models_and_data_are_refused(place: Place, tmp_path: Path) -> None:
    """Missing, empty and truncated models, too few positions, missing and tiny text: an error that says so, and no run."""
    out = tmp_path / "run"
    refuse(ModelError, "there is no ", place.config(out, model=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    refuse(ModelError, "has no config.json", place.config(out, model=str(tmp_path / "empty")))
    shutil.copytree(place.model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(ModelError, "damaged or truncated", place.config(out, model=str(tmp_path / "cut")))
    long = place.config(out, sequence_length=33, max_tokens=999)
    refuse(ModelError, "--sequence-length 33 is longer than the model's 32 positions", long)
    refuse(DataError, "none.txt", place.config(out, data=str(tmp_path / "none.txt")))
    (tmp_path / "tiny.txt").write_text("a cat")
    refuse(DataError, "need a window of 17", place.config(out, data=str(tmp_path / "tiny.txt")))
    refuse(DataError, "text", place.config(out, text_field="body"))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_leaves_nothing(kind: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--track without its package is refused before anything is loaded or written."""
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    monkeypatch.setattr(tune_module, "load_pretrained", None)
    refuse(ConfigError, f"--track {kind}", place.config(tmp_path / "run", track=kind))


def test_trackers_hear_every_row(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None) -> None:
    """With --track, a session gets the run's configuration and each row's numbers."""
    heard: list[int] = []
    sessions: list[dict[str, Any]] = []
    ended: list[bool] = []

    def init(**settings: Any) -> SimpleNamespace:
        sessions.append(settings)
        return SimpleNamespace(log=lambda values, step: heard.append(step), finish=lambda: ended.append(True))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run(place.config(tmp_path / "run", track="wandb"))
    assert heard == list(range(1, STEPS + 1))
    assert sessions[0]["config"]["lr"] == 1e-2
    assert ended == [True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill_attention_layer": 99}, "--distill-attention-layer 99"),
        ({"attention": "eager"}, "--distill-attention needs .* sdpa"),
    ],
)
def test_what_the_losses_refuse_leaves_nothing(place: Place, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """A layer that is not there, or an attention that cannot be listened to, is refused before the run has a directory."""
    refuse(ConfigError, message, place.config(tmp_path / "run", distill="logits", distill_attention=1.0, **settings))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_space_for_what_is_not_there(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None
) -> None:
    """Checkpoints that are kept already are not asked room for again; one more is, always."""
    asked: list[int] = []
    monkeypatch.setattr(run_module, "require_free_space", lambda path, size, what: asked.append(size))
    config = place.config(tmp_path / "run", keep_checkpoints=2, checkpoint_every=STEP_TOKENS)
    with pytest.raises(Interrupted):
        run(config, At(4, lambda: signal.raise_signal(signal.SIGTERM)))
    run(replace(config, resume=True))
    assert asked[0] == 3 * asked[1] > 0


def test_a_model_is_compared_at_a_thousand_positions(place: Place, whole: tuple[Path, TuneResult]) -> None:
    """However few held-out tokens were asked for."""
    assert place.config(whole[0]).eval_tokens == 64
    assert whole[1].agreement["positions"] >= 1000


def test_a_run_is_not_continued_twice_at_once(place: Place, tmp_path: Path, no_writing: None) -> None:
    """While one process continues a run, another is refused and changes nothing."""
    config = place.config(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(config, At(2, lambda: signal.raise_signal(signal.SIGTERM)))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("log.jsonl", "run.json")}
    with alone_in(tmp_path / "run"), pytest.raises(OutputError, match="is in use"):
        run(replace(config, resume=True))
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_took_meanwhile_is_left_alone(
    resume: bool, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None
) -> None:
    """Where another process begins or finishes a run in the same directory while this one loads, this one is refused and the
    other's run.json stays."""
    config = place.config(tmp_path / "run")
    if resume:
        config = replace(interrupted(place, tmp_path / "run"), resume=True)
    make = tune_module._Tune.make_directory

    def taken(self: Any) -> None:
        make(self)
        (tmp_path / "run" / "run.json").write_text('{"command": "tune", "result": {}}')

    monkeypatch.setattr(tune_module._Tune, "make_directory", taken)
    with pytest.raises(OutputError, match="another process has been working in it"):
        run(config)
    assert (tmp_path / "run" / "run.json").read_text() == '{"command": "tune", "result": {}}'


def test_layers_that_cost_more_get_more_of_the_ramp(
    place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None
) -> None:
    """--schedule sensitivity measures each layer before the surgery and keeps the schedule by value; the original's loss is
    what it is without it."""
    result = run(place.config(tmp_path / "run", schedule="sensitivity", ramp_fraction=0.5))
    assert result.base_nats_per_token == whole[1].base_nats_per_token
    weights, activations = json.loads((tmp_path / "run" / "run.json").read_text())["schedules"]
    assert weights == activations
    lengths = [end - start for start, end in zip(weights["starts"], weights["ends"], strict=True)]
    assert weights["starts"][0] == 0 and max(weights["ends"]) == pytest.approx(0.5 * STEPS * STEP_TOKENS)
    assert len(set(lengths)) == len(lengths)


def test_attention_is_what_was_asked_for(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None
) -> None:
    """--attention reaches the student, and changes nothing but rounding; a teacher, which runs forward alone, keeps its own,
    unless both are listened to. One that is not there is refused."""
    seen: list[str] = []

    def note(self: TuneObjective, windows: torch.Tensor) -> Any:
        assert self.teacher is not None
        seen.extend(str(model.config._attn_implementation) for model in (self.model, self.teacher))
        return call(self, windows)

    call = TuneObjective.__call__
    monkeypatch.setattr(TuneObjective, "__call__", note)
    losses = []
    for attention in ("sdpa", "eager"):
        seen.clear()
        losses.append(run(place.config(tmp_path / attention, attention=attention, distill="logits")).nats_per_token)
        assert set(seen[::2]) == {attention} and set(seen[1::2]) == {"sdpa"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    if find_spec("flash_attn") is None:
        refuse(
            ConfigError,
            "--attention flash_attention_2 cannot be used here",
            place.config(tmp_path / "x", attention="flash_attention_2"),
        )


def test_a_model_that_is_not_finite_is_refused(place: Place, tmp_path: Path) -> None:
    """A checkpoint with an infinite weight is called damaged before anything is written."""
    shutil.copytree(place.model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][-1] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    config = place.config(tmp_path / "run", model=str(tmp_path / "model"), schedule="never")
    refuse(ModelError, r"model itself has a loss of (inf|nan) .*weights are damaged", config)


def test_a_rate_that_explodes_is_stopped(place: Place, tmp_path: Path) -> None:
    """With an absurd learning rate the run stops with step, batch and advice, saves nothing, and writes no latents."""
    with pytest.raises(NonFiniteError, match=r"step \d: the (loss|gradient) is not finite .*samples \d+ to \d+ .*lower --lr"):
        run(place.config(tmp_path / "run", lr=1e38, checkpoint_every=10**6))
    assert list_checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "latent").exists()
    assert all(abs(row["loss"]) < float("inf") for row in rows(tmp_path / "run"))


def test_a_run_that_explodes_keeps_its_last_good_checkpoint(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that becomes infinite in the middle of a run stops it there: the log ends with the step before."""
    original, calls = objective_module.head_loss, []

    def explode(*arguments: Any) -> Any:
        losses = original(*arguments)
        calls.append(1)
        return replace(losses, total=losses.total * float("inf")) if len(calls) == 2 * 4 + 2 else losses

    monkeypatch.setattr(objective_module, "head_loss", explode)
    with pytest.raises(NonFiniteError, match=r"step 5: the loss is not finite .*lambda 0\..*samples 16 to 19"):
        run(place.config(tmp_path / "run"))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-3"]


def test_bf16_follows_fp32(place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None) -> None:
    """bf16 compute gives nearly the losses of fp32, and keeps fp32 latents."""
    run(place.config(tmp_path / "run", precision="bf16"))
    tensors = load_file(tmp_path / "run" / "latent" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert latent(tmp_path / "run") != latent(whole[0])
    for a, b in zip(rows(tmp_path / "run"), rows(whole[0]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)


def test_a_bf16_teacher_keeps_its_angles(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None
) -> None:
    """The teacher of a bf16 run has bf16 parameters, and the original's fp32 buffers (RoPE's angles) bit for bit."""
    teachers: list[Any] = []

    def copied(model: Any) -> Any:
        teachers.append(copy.deepcopy(model))
        return teachers[-1]

    monkeypatch.setattr(objective_module, "copy", SimpleNamespace(deepcopy=copied))
    run(place.config(tmp_path / "run", precision="bf16", distill="logits", max_tokens=STEP_TOKENS))
    (teacher,) = teachers
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    expected = dict(load(place.model).model.named_buffers())
    assert "model.rotary_emb.inv_freq" in expected
    assert expected.keys() == dict(teacher.named_buffers()).keys()
    for name, buffer in teacher.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


def test_the_original_is_measured_in_fp32(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None
) -> None:
    """Also where a run computes in bf16, base_nats_per_token is the fp32 loss of the original on the held-out windows."""
    windows: list[torch.Tensor] = []

    def kept(*arguments: Any) -> torch.Tensor:
        windows.append(evaluation_windows(*arguments))
        return windows[-1]

    monkeypatch.setattr(run_module, "evaluation_windows", kept)
    result = run(place.config(tmp_path / "run", precision="bf16", max_tokens=STEP_TOKENS))
    heldout = windows[0]
    original = load(place.model).model
    fp32, bf16 = (nats(original, heldout, 2, precision) for precision in ("fp32", "bf16"))
    assert fp32[0] != bf16[0]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["base_nats_per_token"] == result.base_nats_per_token == fp32[0] / fp32[1]


def test_activation_checkpointing_changes_no_bit(
    place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None
) -> None:
    """Recomputed activations are the ones that were dropped."""
    run(place.config(tmp_path / "run", activation_checkpointing=True))
    assert_same_run(whole[0], tmp_path / "run")


def test_accumulation_changes_only_rounding(
    place: Place, whole: tuple[Path, TuneResult], tmp_path: Path, no_writing: None
) -> None:
    """One micro-batch of four sequences is two of two, until int8 rounding amplifies the last bits."""
    run(place.config(tmp_path / "run", sequences=4))
    for a, b in zip(rows(tmp_path / "run"), rows(whole[0]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01 if a["lambda"] else 1e-5)


def test_distillation_comes_closer_to_the_original(place: Place, tmp_path: Path, no_writing: None) -> None:
    """The logged divergence falls, the loss is the mixture of its parts, and a model that equals its teacher has none."""
    config = place.config(
        tmp_path / "run", distill="logits", schedule="immediate", lr=3e-3, max_tokens=30 * STEP_TOKENS,
        eval_every=10**6, checkpoint_every=10**6,
    )  # fmt: skip
    run(config)
    logged = [row["divergence"] for row in rows(tmp_path / "run")]
    assert sum(logged[-5:]) < 0.7 * sum(logged[:5])
    config = replace(config, max_tokens=2 * STEP_TOKENS, distill_weight=0.75, temperature=2.0)
    run(replace(config, out=str(tmp_path / "mixed")))
    for row in rows(tmp_path / "mixed"):
        assert row["loss"] == pytest.approx(0.25 * row["cross_entropy"] + 0.75 * row["divergence"], rel=1e-5)
    run(replace(config, out=str(tmp_path / "same"), schedule="never"))
    assert abs(rows(tmp_path / "same")[0]["divergence"]) < 1e-5


def test_a_warm_start_is_made_once(place: Place, tmp_path: Path, no_writing: None) -> None:
    """--reconstruct-tokens lowers the loss of the first step, is noted layer by layer, and a resumed run is bit-exact."""
    settings = {"schedule": "immediate", "reconstruct_tokens": 2048, "lr": 3e-3}
    notes = Notes()
    run(place.config(tmp_path / "warm", **settings), notes)
    assert sum("relative error of its output" in note for note in notes.heard) == 2
    run(place.config(tmp_path / "cold", **{**settings, "reconstruct_tokens": None}))
    original = json.loads((tmp_path / "cold" / "run.json").read_text())["base_nats_per_token"]
    cold, warm = (rows(tmp_path / name)[0]["loss"] for name in ("cold", "warm"))
    assert abs(warm - original) < abs(cold - original)
    config = interrupted(place, tmp_path / "resumed", **settings)
    again = Notes()
    run(replace(config, resume=True), again)
    assert not any("relative error" in note for note in again.heard)
    assert_same_run(tmp_path / "resumed", tmp_path / "warm")


def test_hidden_states_are_learned_too(place: Place, tmp_path: Path, no_writing: None) -> None:
    """--distill-hidden adds its share to the loss, is logged, and brings the layers' outputs nearer to the original's."""
    settings: dict[str, Any] = {"distill": "logits", "schedule": "immediate", "max_tokens": 40 * STEP_TOKENS, "lr": 3e-3}
    run(place.config(tmp_path / "run", **settings, distill_hidden=2.0))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(row["divergence"] + 2.0 * row["hidden"], rel=1e-4)
    assert sum(row["hidden"] for row in rows[-5:]) < 0.9 * sum(row["hidden"] for row in rows[:5])


def test_a_model_without_hidden_states_cannot_match_them() -> None:
    """--distill-hidden with a model that gives none is refused by its name, where indexing None would have failed."""
    model = build("llama")
    silent = lambda **inputs: replace(model(**inputs), hidden_states=None)  # noqa: E731
    objective = TuneObjective(TuneConfig(model="m", data="d", distill_hidden=1.0), model, model, silent)
    with pytest.raises(ModelError, match=r"--distill-hidden: LlamaForCausalLM gives no hidden states"):
        objective(torch.randint(3, 50, (2, 8)))


def test_relations_are_learned_too(place: Place, tmp_path: Path, no_writing: None) -> None:
    """With --distill-attention the relations of a layer are part of the loss, are logged, and come nearer the original's; a
    run resumes with them bit-exactly."""
    settings = {"distill": "logits", "distill_weight": 0.5, "distill_attention": 30.0, "schedule": "immediate"}
    run(place.config(tmp_path / "with", **settings))
    found = rows(tmp_path / "with")
    for row in found:
        mixed = 0.5 * row["cross_entropy"] + 0.5 * row["divergence"]
        assert row["loss"] == pytest.approx(mixed + 30.0 * row["relations"], rel=1e-5)
    run(place.config(tmp_path / "without", **{**settings, "distill_attention": 1e-6}))
    assert found[-1]["relations"] < 0.95 * rows(tmp_path / "without")[-1]["relations"]
    config = interrupted(place, tmp_path / "resumed", **settings)
    run(replace(config, resume=True))
    assert_same_run(tmp_path / "resumed", tmp_path / "with")


def test_never_leaves_a_full_precision_model(place: Place, tmp_path: Path) -> None:
    """--schedule never trains the model as it is: ordinary modules, λ 0 in every row, an fp32 checkpoint, a lower loss."""
    result = run(place.config(tmp_path / "run", schedule="never"))
    assert result.form == "full precision"
    assert result.ternary_parameters == 0
    assert result.nats_per_token < result.base_nats_per_token
    loaded = load(tmp_path / "run")
    assert ternary_modules(loaded.model) == []
    assert not (tmp_path / "run" / "model" / "config.json").read_text().count("quantization_config")
    assert {row["lambda"] for row in rows(tmp_path / "run")} == {0.0}
    assert latent(tmp_path / "run")[8:]  # latent/ is the same model
    assert torch.equal(
        load(tmp_path / "run" / "latent").model.lm_head.weight,
        loaded.model.lm_head.weight,  # pyright: ignore
    )


def test_stable_decay_holds_the_peak(place: Place, tmp_path: Path, no_writing: None) -> None:
    """wsd keeps the rate at its peak until the last fraction of the tokens."""
    run(place.config(tmp_path / "run", decay="wsd", decay_fraction=0.5, warmup_fraction=0.1))
    rates = [row["lr"] for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([1e-2] * 5 + [0.0075, 0.005, 0.0025])


def test_a_model_can_be_its_own_text(place: Place, tmp_path: Path, no_writing: None) -> None:
    """--data self samples once from the model, keeps the tokens, repeats itself, and does not depend on any file."""
    config = place.config(tmp_path / "a", data="self", cache_dir=str(tmp_path / "cache"), max_tokens=2 * STEP_TOKENS)
    notes: list[str] = []
    listener = Listener()
    listener.note = notes.append  # pyright: ignore[reportAttributeAccessIssue]
    run(config, listener)
    run(replace(config, out=str(tmp_path / "b")), listener)
    said = [note for note in notes if note.startswith("data:")]
    assert "kept in" in said[0]
    assert "reused from" in said[1]
    assert_same_run(tmp_path / "a", tmp_path / "b")
    run(replace(config, out=str(tmp_path / "c"), self_tokens=64, seed=1), listener)
    run(replace(config, out=str(tmp_path / "d"), self_tokens=64, seed=2, max_tokens=3 * STEP_TOKENS), listener)
    assert [note for note in notes if note.startswith("data:")][3].count("reused from") == 1, "no seed, no budget"


def test_a_run_without_model_keeps_its_latents(place: Place, tmp_path: Path) -> None:
    """--model-format none leaves latent/ alone, and load gives that, fully quantised, with the nats that were measured."""
    result = run(place.config(tmp_path / "run", model_format="none"))
    assert not (tmp_path / "run" / "model").exists()
    loaded = load(tmp_path / "run")
    assert (loaded.form, result.form, result.agreement, result.model_bytes) == ("latent", "latent", {}, 0)
    assert all(module.weight_strength == 1 for _, module in ternary_modules(loaded.model))
    assert result.model == str(tmp_path / "run" / "latent")
    assert math.isfinite(result.nats_per_token)


@pytest.mark.parametrize(("wanted", "held_out"), [(64, 262_144), (300_000, 300_000)])
def test_as_much_is_held_out_as_is_measured(
    wanted: int, held_out: int, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """262,144 tokens are held out, and more where --eval-tokens asks for more."""

    class Prepared(Exception):
        pass

    def prepare(*_: Any, heldout_tokens: int, **__: Any) -> None:
        assert heldout_tokens == held_out
        raise Prepared

    monkeypatch.setattr(text_module, "prepare", prepare)
    with pytest.raises(Prepared):
        run(place.config(tmp_path / "run", eval_tokens=wanted))


def test_calibrated_gains_keep_more_of_the_function(place: Place, tmp_path: Path, no_writing: None) -> None:
    """At λ = 0, a model whose inserted norms have calibrated gains is nearer to the original than one with gains of one."""
    distances = {}
    for start in ("calibrated", "ones"):
        run(place.config(tmp_path / start, gain_init=start, max_tokens=STEP_TOKENS, distill="logits"))
        distances[start] = rows(tmp_path / start)[0]["divergence"]
        gains = json.loads((tmp_path / start / "run.json").read_text())["gains"]
        assert len(gains) == (14 if start == "calibrated" else 0)
    assert 0 < distances["calibrated"] < 0.5 * distances["ones"]


def test_the_default_name_is_the_models(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None
) -> None:
    """Without --out a run goes to out/ and the model's name, also when the model is the current folder."""
    shutil.copytree(place.model, tmp_path / "name")
    monkeypatch.chdir(tmp_path / "name")
    config = replace(place.config(tmp_path), out=None, model=".", max_tokens=STEP_TOKENS)
    assert run(config).out == "out/name"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own and transformers' code
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_train_alike(place: Place, whole: tuple[Path, TuneResult], tmp_path: Path) -> None:
    """--compile yes gives the losses of the plain run up to rounding, through all states of λ."""
    run(place.config(tmp_path / "run", compile="yes"))
    for a, b in zip(rows(tmp_path / "run"), rows(whole[0]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
