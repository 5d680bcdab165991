"""Which engine runs what, and that the choice is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import build
from infer.checkpoints import BYTES, byte_tokenizer, save, word_tokenizer
from infer.natives import latent, native_directory
from infer.test_generate import Heard
from trilobit.config.running import EngineConfig, RunningConfig
from trilobit.errors import ConfigError, ModelError
from trilobit.export.hf import write_latent
from trilobit.infer import writer as module
from trilobit.infer.compiler import NotNative
from trilobit.infer.writer import NativeWriter, Pieces, TransformersWriter, open_writer, sampling_of
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.surgery.ternary import TernarySpec, ternarize

needs_library = pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ordinary checkpoint, a native directory, and trainable ternary models of a native family and another."""
    folder = tmp_path_factory.mktemp("places")
    save(folder / "ordinary")
    latent(folder / "ternary")
    if native.available():
        native_directory(folder / "native")
    gemma = build("gemma3_text", vocab_size=BYTES, num_hidden_layers=2)
    write_latent(gemma, ternarize(gemma, TernarySpec()).plan, byte_tokenizer(), folder / "gemma")
    return folder


def opened(path: Path, **settings: Any) -> tuple[Any, str]:
    heard = Heard()
    return open_writer(EngineConfig(model=str(path), **settings), None, heard), heard.notes[0]


@needs_library
@pytest.mark.parametrize(
    ("model", "settings", "kind", "says"),
    [
        ("native", {}, NativeWriter, "Runs on native engine, 1 thread, "),
        ("native", {"engine": "native", "device": "cpu", "threads": 3}, NativeWriter, "native engine, 3 threads, "),
        ("native", {"instructions": "scalar"}, NativeWriter, "native engine, 1 thread, scalar: --instructions"),
        ("native", {"verify": True, "cache": "int8"}, NativeWriter, "the fastest of scalar"),
        ("ternary", {}, NativeWriter, "Runs on native engine"),
        ("ternary", {"engine": "transformers"}, TransformersWriter, "Runs on transformers: --engine transformers"),
        ("ordinary", {}, TransformersWriter, "transformers: its projections are not ternary: the engine runs ternary models"),
        ("gemma", {"device": "cpu"}, TransformersWriter, "transformers: the engine has no graph for Gemma3ForCausalLM (it has"),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(places: Path, model: str, settings: Any, kind: type, says: str) -> None:
    """Ternary models of native families run natively, everything else through transformers, and the listener hears which,
    why, and with which instructions (old code: the best ones were named whatever --instructions said)."""
    if not torch.cuda.is_available() or "device" in settings:
        writer, note = opened(places / model, **settings)
        assert type(writer) is kind
        assert says in note
        assert writer.positions == 64


@needs_library
@pytest.mark.parametrize(
    ("model", "settings", "error", "says"),
    [
        ("ordinary", {"engine": "native"}, NotNative, "its projections are not ternary"),
        ("gemma", {"engine": "native"}, NotNative, "no graph for Gemma3ForCausalLM"),
        ("native", {"engine": "transformers"}, ConfigError, "native is written for the native engine, which runs on the CPU"),
        ("native", {"instructions": "sse9"}, ConfigError, "sse9 does not exist here: choose one of scalar"),
        ("nothing", {}, ModelError, "there is no .*nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(places: Path, model: str, settings: Any, error: type[Exception], says: str) -> None:
    """--engine native without a graph, a native file for another engine, instructions that are not here: an error, no other
    engine in silence."""
    with pytest.raises(error, match=says):
        opened(places / model, **settings)


@needs_library
def test_without_the_library_transformers_runs_what_it_can(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels: ternary checkpoints run through transformers, which says why; native files and --engine native do not."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "choice", lambda: native.Instructions("none", "no native library: not built yet"))
    writer, note = opened(places / "ternary", device="cpu")
    assert type(writer) is TransformersWriter
    assert "transformers: no native kernels: no native library: not built yet" in note
    for model, settings in (("native", {}), ("ternary", {"engine": "native"})):
        with pytest.raises(NotNative, match="no native kernels"):
            opened(places / model, **settings)


def test_a_model_on_a_gpu_runs_through_transformers(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto on a machine with a GPU loads the model there; a native file with an explicit GPU is refused."""
    seen = []

    def load(source: str, device: Any) -> Any:
        seen.append(device)
        return real(source)

    real = module.load
    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
    _, note = opened(places / "ternary")
    assert "transformers: the model is on cuda" in note
    assert seen == [torch.device("cuda")]
    if native.available():
        assert type(opened(places / "native")[0]) is NativeWriter
        with pytest.raises(ConfigError, match="runs on the CPU"):
            opened(places / "native", device="cuda")


@needs_library
def test_both_write_what_they_were_asked_for(places: Path) -> None:
    """A writer's ids decode to what it emitted; end-of-text tokens end it and are not emitted; timings count them; greedy text
    of the two agrees at the start at least."""
    found = []
    for engine in ("native", "transformers"):
        writer, _ = opened(places / "ternary", engine=engine, device="cpu")
        ids, pieces = writer.start("abc"), []
        written = writer.write(ids, 20, Sampling(temperature=0), 0, pieces.append)
        assert "".join(pieces) == writer.tokenizer.decode(written.ids, skip_special_tokens=True)
        assert written.timing.tokens == len(written.ids) <= 20
        assert written.timing.prompt_tokens == 3
        assert 2 not in written.ids[:-1]
        found.append(written.ids)
        sampled = [writer.write(ids, 20, Sampling(), seed, lambda _: None).ids for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
    assert found[0][0] == found[1][0]


def test_what_transformers_does_not_know_is_said(places: Path) -> None:
    """Settings of the native engine are named where another one runs, and only those that were given."""
    heard = Heard()
    settings = EngineConfig(model=str(places / "ordinary"), device="cpu", threads=2, verify=True)
    open_writer(settings, None, heard)
    assert heard.notes[1:] == ["(without effect there: --threads, --verify)"]
    assert opened(places / "ordinary", device="cpu")[1] == heard.notes[0]


@given(ids=st.lists(st.integers(0, 270), max_size=60), kind=st.sampled_from(["bytes", "merges", "words"]))
def test_pieces_join_to_the_text(ids: list[int], kind: str) -> None:
    """Whatever the tokens, of bytes that are no characters or words that are joined by spaces, what is emitted joins to what
    the tokenizer decodes; nothing is emitted that a later token would change."""
    merges = ("a b", "ab c", "Ã ©") if kind == "merges" else ()
    tokenizer = word_tokenizer(271) if kind == "words" else byte_tokenizer(merges=merges)
    ids = [i % len(tokenizer) for i in ids]
    told: list[str] = []
    pieces = Pieces(tokenizer)
    for i in ids:
        pieces.add(i, told.append)
    pieces.finish(told.append)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(told) == text
    assert pieces.ids == ids
    assert len(told) > 5 or len(text) < 20


def test_settings_become_sampling() -> None:
    """Each setting of the command line is that of the sampler."""
    config = RunningConfig(model="m", temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=1.5)
    assert sampling_of(config) == Sampling(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=1.5)
    assert sampling_of(RunningConfig(model="m")) == Sampling(temperature=0)
