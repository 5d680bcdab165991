import json
import random
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from families import build
from surgery.fresh import fresh
from trilobit.config.pretrain import PretrainConfig
from trilobit.config.training import TrainingConfig
from trilobit.corpus import documents
from trilobit.errors import ConfigError, DataError, ModelError, NonFiniteError, OutputError, TrilobitError
from trilobit.infer.load import load
from trilobit.infer.loaded import load_tokenizer
from trilobit.listener import Listener
from trilobit.measure.perplexity import nats
from trilobit.nn.outlier_safe import EmbeddingProjection
from trilobit.recipes import RECIPES
from trilobit.surgery.outlier_safe import outlier_safe
from trilobit.train import pretrain as pretrain_module
from trilobit.train.architecture import PADDED, unused_rows
from trilobit.train.drawn import NotDrawn
from trilobit.train.kurtosis import outlier_probes, site_kurtosis
from trilobit.train.loop import Interrupted, make_optimizer, muon_matrices
from trilobit.train.mesh import Arrangement
from trilobit.train.muon import Muon
from trilobit.train.pretrain import PretrainResult, run
from trilobit.train.tokenizer import train_tokenizer
from trilobit.train.windows import evaluation_windows

VOCABULARY, STEPS, STEP_TOKENS = 300, 8, 64
WORDS = ["a", "the", "cat", "dog", "bird", "sees", "finds", "small", "large", "old", "red", "house", "tree", "and", "not"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and the config of a small Llama."""
    folder = tmp_path_factory.mktemp("pretrain")
    chosen = random.Random(0)
    lines = [json.dumps({"text": " ".join(chosen.choices(WORDS, k=12))}) for _ in range(400)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder / "llama")
    return folder


def configure(place: Path, out: Path, **settings: Any) -> PretrainConfig:
    defaults: dict[str, Any] = {
        "architecture": str(place / "llama"), "train_tokenizer": VOCABULARY, "data": str(place / "text.jsonl"), "out": str(out),
        "cache_dir": str(place / "cache"), "sequence_length": 16, "sequences": 2, "batch_tokens": STEP_TOKENS,
        "max_tokens": STEPS * STEP_TOKENS, "eval_tokens": 64, "eval_every": 256, "checkpoint_every": 192, "precision": "fp32",
        "lr": 1e-2, "device": "cpu",
    }  # fmt: skip
    return PretrainConfig(**{**defaults, **settings})


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PretrainResult]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(configure(place, out))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_stock_model(place: Path, whole: tuple[Path, PretrainResult]) -> None:
    """model/ is an ordinary Llama of transformers with its tokenizer, and has the loss the run reports."""
    out, result = whole
    assert {p.name for p in out.iterdir()} >= {"run.json", "log.jsonl", "tokenizer", "model", "loss.png", "kurtosis.png"}
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.tie_word_embeddings is False
    assert not any("projection" in name for name, _ in model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) == result.parameters
    loaded = load(out)
    assert len(loaded.tokenizer) == VOCABULARY == loaded.model.get_input_embeddings().num_embeddings  # pyright: ignore
    config = configure(place, out)
    tokenizer_text = json.loads((out / "run.json").read_text())
    assert tokenizer_text["command"] == "pretrain" and tokenizer_text["result"]["perplexity"] == result.perplexity
    assert result.steps == STEPS and result.agreement["top1"] == 1.0
    assert result.nats_per_token < rows(out)[0]["loss"] and config.evaluation_tokens == 64


def test_norms_of_the_model_repeat_one_value(whole: tuple[Path, PretrainResult]) -> None:
    """Every gain of model/ is one number, and not the one it began with."""
    tensors = load_file(whole[0] / "model" / "model.safetensors")
    gains = {name: t for name, t in tensors.items() if t.ndim == 1}
    assert len(gains) == 5
    for gain in gains.values():
        assert (gain == gain[0]).all() and gain[0] != 1


def test_outliers_are_seen_while_training(whole: tuple[Path, PretrainResult]) -> None:
    """Rows with an evaluation carry kurtosis by layer and site, and the last is what the finished model has, to rounding."""
    measured = [row for row in rows(whole[0]) if "kurtosis" in row]
    assert len(measured) == 2
    for row in measured:
        assert {site: len(layers) for site, layers in row["kurtosis"].items()} == {"residual": 2, "mlp-output": 2}
    assert whole[1].excess_kurtosis == pytest.approx(measured[-1]["excess_kurtosis"], rel=1e-2)


def test_an_interrupted_run_resumes_bit_exactly(place: Path, whole: tuple[Path, PretrainResult], tmp_path: Path) -> None:
    """Stopped at a step by a signal and continued, a run ends in the same weights; its tokenizer is the one it made."""

    class Stop(Listener):
        def row(self, row: dict[str, Any], max_tokens: int) -> None:
            if row["step"] == 3:
                signal.raise_signal(signal.SIGTERM)

    config = configure(place, tmp_path / "run")
    with pytest.raises(Interrupted):
        run(config, Stop())
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()
    run(configure(place, tmp_path / "run", resume=True))
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", whole[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(OutputError, match="finished already"):
        run(configure(place, tmp_path / "run", resume=True))


@pytest.mark.parametrize("tie", ["auto", "yes", "no"])
def test_one_matrix_or_two(tie: Any, place: Path, tmp_path: Path) -> None:
    """--tie decides whether the head has a matrix of its own; auto leaves that to the architecture, which has none here."""
    result = run(configure(place, tmp_path / "run", max_tokens=STEP_TOKENS, tie=tie, **RECIPES["pretrain"]["ssnorm"]()))
    assert ("lm_head.weight" in load_file(Path(result.model) / "model.safetensors")) == (tie == "no")


@pytest.mark.parametrize("row", ["adam", "muon-only", "muon", "ssnorm", "embproj", "osp"])
def test_every_row_of_the_ablation_trains(row: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe has the parts it names, and what Muon trains is what its row says."""
    seen: list[tuple[int, int]] = []

    def spy(model: Any, config: TrainingConfig) -> list[Any]:
        found = muon_matrices(model, config)
        projections = {id(m.weight) for m in model.modules() if isinstance(m, EmbeddingProjection)}
        seen.append((len(found), sum(id(p) in projections for p in found)))
        return found

    monkeypatch.setattr("trilobit.train.loop.muon_matrices", spy)
    result = run(configure(place, tmp_path / "run", **RECIPES["pretrain"][row]()))
    gains = {n: t for n, t in load_file(Path(result.model) / "model.safetensors").items() if t.ndim == 1}
    assert all((gain == gain[0]).all().item() == (row in ("ssnorm", "osp")) for gain in gains.values())
    hidden = 2 * 7  # and embedding and head, which are one here unless there are projections
    expected = {"adam": [], "muon-only": [(hidden + 1, 0)], "embproj": [(hidden + 2, 2)], "osp": [(hidden + 2, 2)]}
    assert seen == expected.get(row, [(hidden, 0)])


def test_muon_takes_every_matrix_it_should() -> None:
    """Of an outlier-safe model Muon trains decoder matrices and projections; with `muon_embeddings` all matrices, tied once."""
    model = build("qwen3", tied=False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
    outlier_safe(model)
    base: dict[str, Any] = {"data": "d", "optimizer": "muon"}
    optimizer = make_optimizer(model, 1e-3, TrainingConfig(**base))
    assert isinstance(optimizer, Muon)
    trained = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in trained}
    assert {name.rsplit(".", 1)[0].split(".")[-1] for name in names if "norm" not in name} == {"embed_tokens", "lm_head"}
    every = muon_matrices(model, TrainingConfig(**base, muon_embeddings=True))
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.ndim == 2}
    tied = build("llama", tied=True)
    every = muon_matrices(tied, TrainingConfig(**base, muon_embeddings=True))
    assert len(every) == len({id(p) for p in every}) == sum(p.ndim == 2 for p in tied.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_for_matrices(optimizer: Any) -> None:
    """Not for vectors, nor for what has two dimensions and is none: biases of experts [E, R], decay rates of state spaces."""
    model = fresh("gpt_oss")
    model.add_module("mixer", torch.nn.ParameterDict({"A_log": torch.nn.Parameter(torch.ones(3, 4))}))
    made = make_optimizer(model, 1e-3, TrainingConfig(data="d", optimizer=optimizer, weight_decay=0.1))
    decayed = {id(p) for group in made.param_groups if group["weight_decay"] for p in group["params"]}
    left = {name for name, p in model.named_parameters() if id(p) not in decayed and p.ndim > 1}
    assert {name.split(".")[-1] for name in left} >= {"gate_up_proj_bias", "down_proj_bias", "A_log"}
    assert all(name.endswith(("bias", "A_log")) for name in left)
    assert not any(p.ndim < 2 and id(p) in decayed for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"architecture": "llama-3m", "train_tokenizer": None}, ModelError, "has no tokenizer of its own"),
        ({"architecture": "nothing/here/at-all"}, ModelError, "nothing/here/at-all"),
        ({"train_tokenizer": 100_000}, DataError, "lower --train-tokenizer"),
        ({"sequence_length": 128, "max_tokens": 1024}, ModelError, "longer than the 64 positions"),
        ({"data": "self"}, ConfigError, "no model yet"),
        ({"tokenizer": "x"}, ConfigError, "two answers to one question"),
        ({"tie": "yes"}, ConfigError, "--no-embproj"),
        ({"train_tokenizer": 100}, ConfigError, "at least 257"),
        ({"optimizer": "adamw", "normuon": True}, ConfigError, "--normuon needs --optimizer muon"),
        ({"resume": True}, OutputError, "no run to resume"),
        ({"sequence_length": 1}, ConfigError, "--sequence-length is 1; it must be at least 2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    settings: dict[str, Any], kind: type[TrilobitError], message: str, place: Path, tmp_path: Path
) -> None:
    """What cannot be trained is said before anything is written."""
    with pytest.raises(kind, match=message):
        run(configure(place, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_foreign_tokenizer_must_fit(place: Path, whole: tuple[Path, PretrainResult], tmp_path: Path) -> None:
    """A tokenizer of 300 entries does not fit a vocabulary of 64; it does fit one of ours, which takes its size."""
    tokenizer = str(whole[0] / "tokenizer")
    with pytest.raises(ModelError, match="does not match the architecture's vocabulary"):
        run(configure(place, tmp_path / "run", train_tokenizer=None, tokenizer=tokenizer))
    result = run(configure(place, tmp_path / "run", architecture="llama-3m", train_tokenizer=None, tokenizer=tokenizer))
    assert AutoConfig.from_pretrained(result.model).vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "foo"}, "no language model can be made of .*: KeyError 'foo'"),
        ({"hidden_size": 0}, "hidden_size of .* is 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of .* is 0; it must be at least 1"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change: dict[str, Any], says: str, place: Path, tmp_path: Path) -> None:
    """Whatever its constructor stumbles over, before anything is written."""
    settings = json.loads((place / "llama" / "config.json").read_text()) | change
    (tmp_path / "arch").mkdir()
    (tmp_path / "arch" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=says):
        run(configure(place, tmp_path / "run", architecture=str(tmp_path / "arch")))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_drawn_in_parts_is_no_bad_config(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out of the constructor as it is, so that every rank draws the whole model instead."""
    started = object.__new__(pretrain_module._Pretrain)
    started.config = configure(place, tmp_path / "run")
    monkeypatch.setattr(pretrain_module.AutoModelForCausalLM, "from_config", Mock(side_effect=NotDrawn("one module")))
    with pytest.raises(NotDrawn, match="one module"):
        started.from_config(LlamaConfig())


def test_what_becomes_of_vocabulary_and_head_is_said(place: Path, whole: tuple[Path, PretrainResult], tmp_path: Path) -> None:
    """Rows that no text can reach, if they are more than padding, and a head that projections untie."""
    settings = json.loads((place / "llama" / "config.json").read_text())
    settings |= {"vocab_size": 2 * VOCABULARY, "tie_word_embeddings": True}
    (tmp_path / "arch").mkdir()
    (tmp_path / "arch" / "config.json").write_text(json.dumps(settings))
    notes, ours = Notes(), {"architecture": str(tmp_path / "arch"), "max_tokens": STEP_TOKENS}
    run(configure(place, tmp_path / "run", **ours, train_tokenizer=None, tokenizer=str(whole[0] / "tokenizer")), notes)
    assert any(note.startswith("300 of the vocabulary's 600 rows are never used") for note in notes.said)
    assert any("embedding projections untie them" in note for note in notes.said)
    padded = AutoConfig.for_model("llama", vocab_size=VOCABULARY + PADDED)
    assert not unused_rows(padded, range(VOCABULARY)) and unused_rows(padded, range(VOCABULARY - 1))


def test_layer_norms_are_refused(place: Path, tmp_path: Path) -> None:
    """GPT-2 has LayerNorms: single-scale norms are refused, and said why."""
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="LayerNorm"):
        run(configure(place, tmp_path / "run", architecture=str(tmp_path / "gpt2")))
    assert not (tmp_path / "run").exists()


class Notes(Listener):
    """What a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_muon_trains_gpt2(place: Path, tmp_path: Path) -> None:
    """All matrices of its layers, which are Conv1D, each in every step, and what is left to AdamW by name; its residual stream
    is watched."""
    GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64).save_pretrained(tmp_path / "gpt2")
    notes, settings = Notes(), {**RECIPES["pretrain"]["muon"](), "architecture": str(tmp_path / "gpt2")}
    run(configure(place, tmp_path / "run", **settings), notes)
    (said,) = [note for note in notes.said if note.startswith("Muon")]
    assert "Muon trains 8 matrices of 4 shapes" in said and "AdamW transformer.wte.weight, transformer.wpe.weight, 18 v" in said
    assert {row["matrices_iterated"] for row in rows(tmp_path / "run")} == {8}
    assert any(note.startswith("outliers are watched between layers only: transformer.h.0") for note in notes.said)
    assert [set(row["kurtosis"]) for row in rows(tmp_path / "run") if "kurtosis" in row] == [{"residual"}, {"residual"}]


@pytest.mark.parametrize("settings", [{"normuon": True}, {"muon_scale": "spectral"}])
def test_rows_that_may_be_columns_are_refused(settings: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """What depends on which side of a matrix is its outputs does not take GPT-2's, which are stored the other way."""
    GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64).save_pretrained(tmp_path / "gpt2")
    settings = {**RECIPES["pretrain"]["muon"](), "architecture": str(tmp_path / "gpt2"), **settings}
    with pytest.raises(ConfigError, match="needs to know a matrix' rows from its columns"):
        run(configure(place, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_experts_in_parts_are_not_muons(place: Path, tmp_path: Path) -> None:
    """A rank that had rows of some experts could not step them: refused before anything is trained."""
    started = object.__new__(pretrain_module._Pretrain)
    started.config = configure(place, tmp_path / "run", optimizer="muon")
    started.model = build("mixtral", num_local_experts=2)
    started.arrangement, started.listener = Arrangement("fsdp", 1, 2, "two ranks"), Listener()
    with pytest.raises(ConfigError, match="does not share out the matrices of experts: --mesh ddp"):
        started.note_optimizer()
    started.arrangement = Arrangement("ddp", 2, 1, "two ranks")
    started.note_optimizer()


def test_texts_ends_are_learned_where_they_are_the_padding_too(place: Path, tmp_path: Path) -> None:
    """A tokenizer whose padding is its end-of-text token (SmolLM2's, and most) does not freeze that row at zero."""
    tokenizer = train_tokenizer(documents(str(place / "text.jsonl")), VOCABULARY)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {"architecture": "llama-3m", "train_tokenizer": None, "tokenizer": str(tmp_path / "tokenizer")}
    result = run(configure(place, tmp_path / "run", max_tokens=2 * STEP_TOKENS, embproj=False, **settings))
    table = load_file(Path(result.model) / "model.safetensors")["model.embed_tokens.weight"]
    norms = table.norm(dim=1)
    assert norms[tokenizer.eos_token_id] > 0.5 * norms.median()
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.get_input_embeddings().padding_idx is None and load_tokenizer(result.model).pad_token_id is not None


def test_a_last_update_that_broke_the_model_is_not_saved(place: Path, tmp_path: Path) -> None:
    """Loss and gradient of the only step are finite, what follows is not: a message, and neither row nor checkpoint."""
    with pytest.raises(NonFiniteError, match=r"first in layer 0, \w.*The last update broke the weights.* lower --lr"):
        run(configure(place, tmp_path / "run", max_tokens=STEP_TOKENS, lr=1e38, weight_decay=0))
    assert not (tmp_path / "run" / "log.jsonl").exists() and not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_the_layer_that_is_not_finite_is_named() -> None:
    """The first layer and site is in the message, nothing of it in the log."""
    model = build("llama")
    probes, why = outlier_probes(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("inf")
    assert not why
    with pytest.raises(NonFiniteError, match="not finite, first in layer 1, residual"):
        site_kurtosis(model, probes, torch.randint(0, 90, (2, 9)), 2)


def test_the_tokenizer_is_made_of_what_is_trained_on() -> None:
    """Held-out documents do not count; equal text gives an equal tokenizer; every text can be written in it."""
    from trilobit.corpus import Document

    texts = [" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(40)]
    documents = [Document(text, len(text), False) for text in texts]
    first = train_tokenizer(documents, VOCABULARY)
    second = train_tokenizer([*documents, Document("zebra " * 500, 3000, True)], VOCABULARY)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.decode(first("Zoë 🦓 naïvely\n\t").input_ids) == "Zoë 🦓 naïvely\n\t"
    assert first.eos_token_id == first.bos_token_id == 0


def test_the_seed_decides_the_start(place: Path, whole: tuple[Path, PretrainResult], tmp_path: Path) -> None:
    """Equal seeds give equal losses from the first step on, other seeds others."""
    again = run(configure(place, tmp_path / "again"))
    other = run(configure(place, tmp_path / "other", seed=1))
    assert again.nats_per_token == whole[1].nats_per_token != other.nats_per_token
    assert rows(tmp_path / "other")[0]["loss"] != rows(whole[0])[0]["loss"]


def test_a_start_that_differs_is_not_continued(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose random weights cannot be made again (other versions) is refused."""

    class Stop(Listener):
        def row(self, row: dict[str, Any], max_tokens: int) -> None:
            if row["step"] == 1:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(configure(place, tmp_path / "run"), Stop())
    monkeypatch.setattr(pretrain_module, "weights_fingerprint", lambda model: "another")
    with pytest.raises(ModelError, match="began from other random weights"):
        run(configure(place, tmp_path / "run", resume=True))


def test_the_loss_is_the_models(place: Path, whole: tuple[Path, PretrainResult]) -> None:
    """The loss that is reported is that of model/ on the held-out windows."""
    out, result = whole
    loaded = load(out)
    from trilobit.train.loop import Signals
    from trilobit.train.text import read_corpus

    config = configure(place, out)
    tokens = read_corpus(config, loaded.tokenizer, VOCABULARY, Signals())
    total, count = nats(loaded.model, evaluation_windows(tokens.heldout, 16, 64), 2)
    assert total / count == pytest.approx(result.nats_per_token, rel=1e-6)
