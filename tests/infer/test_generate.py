"""`trilobit generate`: the text, piece by piece and whole, on either engine."""

from pathlib import Path

import pytest
import torch

from infer.checkpoints import byte_model, byte_tokenizer, save
from infer.natives import native_directory
from trilobit.config.generate import GenerateConfig
from trilobit.errors import ConfigError, ModelError
from trilobit.infer.generate import run
from trilobit.infer.hf import continue_tokens
from trilobit.kernels import native
from trilobit.listener import Listener

needs_library = pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")


class Heard(Listener):
    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.notes: list[str] = []

    def stream(self, text: str) -> None:
        self.pieces.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native directory of 600 positions."""
    return native_directory(tmp_path_factory.mktemp("packed") / "model", max_position_embeddings=600)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streamed_pieces_join_to_the_text(checkpoint: Path, temperature: float) -> None:
    """What the listener hears is the text and a newline, and the result counts its tokens."""
    heard = Heard()
    settings = GenerateConfig(
        model=str(checkpoint), prompt="naïve ✓ text", max_tokens=40, temperature=temperature, device="cpu"
    )
    result = run(settings, heard)
    assert len(heard.pieces) > 1
    assert "".join(heard.pieces) == result.text + "\n"
    assert 0 < result.tokens <= 40
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert run(settings).text == result.text
    assert "naïve" not in result.text


@needs_library
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streamed_pieces_of_the_native_engine_join_too(packed: Path, temperature: float) -> None:
    """Also where the text ends within a character (old code: what was never finished was in the result, and not streamed)."""
    unfinished = 0
    for seed in range(6):
        heard = Heard()
        options = {"max_tokens": 40, "temperature": temperature, "seed": seed}
        result = run(GenerateConfig(model=str(packed), prompt=f"naïve {seed}", **options), heard)
        assert "".join(heard.pieces) == result.text + "\n"
        assert len(heard.pieces) > 1
        assert 0 < result.tokens <= 40
        assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
        assert result.engine == "native"
        assert heard.notes[0].startswith("Runs on native engine, 1 thread, ")
        unfinished += result.text.endswith("\ufffd")
        assert run(GenerateConfig(model=str(packed), prompt=f"naïve {seed}", **options)).text == result.text
    assert unfinished or temperature == 0


def test_an_empty_prompt_starts_at_beginning_of_text(checkpoint: Path, tmp_path: Path) -> None:
    """An empty prompt is the beginning-of-text token alone; without such a token it is refused."""
    result = run(GenerateConfig(model=str(checkpoint), prompt="", max_tokens=8, device="cpu"))
    tokens = continue_tokens(byte_model(), torch.tensor([[1]]), 8)[0, 1:]
    assert result.text == byte_tokenizer().decode(tokens, skip_special_tokens=True)
    save(tmp_path, tokenizer=byte_tokenizer(has_bos=False))
    with pytest.raises(ConfigError, match="prompt is empty"):
        run(GenerateConfig(model=str(tmp_path), prompt="", max_tokens=8, device="cpu"))


def test_text_beyond_the_models_positions_is_refused(checkpoint: Path) -> None:
    """Prompt and new tokens together fit the 64 positions, or the error says how many would (old code: transformers' text
    from positions that were never trained)."""
    settings = {"model": str(checkpoint), "prompt": "a" * 60, "device": "cpu"}
    assert run(GenerateConfig(**settings, max_tokens=4)).tokens <= 4
    with pytest.raises(ConfigError, match=r"--max-tokens 5 after a prompt of 60 tokens .* at most 4 fit"):
        run(GenerateConfig(**settings, max_tokens=5))
    assert run(GenerateConfig(**settings)).tokens <= 4  # the default is 128 or what fits
    with pytest.raises(ConfigError, match="the prompt has 64 tokens, and the model 64 positions"):
        run(GenerateConfig(**settings | {"prompt": "a" * 64}, max_tokens=1))


@needs_library
def test_positions_bound_the_native_engine_alike(packed: Path) -> None:
    """The same words for a prompt and --max-tokens that are together more than the model's positions; up to there text goes,
    over more than one chunk of a prompt."""
    settings = {"model": str(packed), "prompt": "a" * 560}
    assert run(GenerateConfig(**settings, max_tokens=40)).tokens <= 40
    with pytest.raises(ConfigError, match=r"--max-tokens 41 after a prompt of 560 tokens .* at most 40 fit"):
        run(GenerateConfig(**settings, max_tokens=41))
    with pytest.raises(ConfigError, match="the prompt has 600 tokens, and the model 600 positions"):
        run(GenerateConfig(**settings | {"prompt": "a" * 600}, max_tokens=1))


@needs_library
def test_more_than_the_default_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text longer than a session is made for by default goes to its end (old code: it stopped at 4,096 tokens, silently)."""
    monkeypatch.setattr("trilobit.infer.engine.DEFAULT_CAPACITY", 30)
    folder = native_directory(tmp_path / "model", stops=None, max_position_embeddings=600)
    assert run(GenerateConfig(model=str(folder), prompt="a" * 20, max_tokens=90)).tokens == 90
    assert run(GenerateConfig(model=str(folder), prompt="a" * 40, max_tokens=3)).tokens == 3


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_damaged_weights_give_no_text(engine: str, tmp_path: Path) -> None:
    """Logits that are no numbers are a ModelError on either engine."""
    if engine == "native":
        if not native.available():
            pytest.skip("no native library")
        from trilobit.infer import native_file

        path = native_directory(tmp_path / "model")
        file = path / native_file.NAME
        read = native_file.read(file, "copied")
        read.tensors["norm"].fill_(torch.nan)
        native_file.write(read, file)
    else:
        model = byte_model()
        with torch.no_grad():
            model.lm_head.weight[7] = torch.nan
        path = save(tmp_path / "model", model)
    with pytest.raises(ModelError, match="not finite"):
        run(GenerateConfig(model=str(path), prompt="a", max_tokens=9, device="cpu"))


def test_a_prompt_that_is_no_text_is_refused(checkpoint: Path) -> None:
    """Bytes of a command line that are not UTF-8 are the user's to mend (old code: a TypeError of the tokenizer), and a cache
    that transformers does not have is said to be without effect (old code: said nothing)."""
    heard = Heard()
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        run(GenerateConfig(model=str(checkpoint), prompt="def \udcff", max_tokens=4, device="cpu", cache="int8"), heard)
    assert any("--cache" in note for note in heard.notes)
