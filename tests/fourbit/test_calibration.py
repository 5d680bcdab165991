"""The sequences that weights are fitted on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.checkpoints import byte_model, byte_tokenizer
from trilobit.config.quantize import QuantizeConfig
from trilobit.corpus import stdlib_documents
from trilobit.errors import ConfigError, DataError, ModelError
from trilobit.fourbit.calibration import calibration_source, calibration_windows
from trilobit.fourbit.protocol import PRESETS
from trilobit.infer.loaded import Loaded
from trilobit.measure.perplexity import text_windows

TEXT = "".join(f"{i:03}" for i in range(134))
PROTOCOL = replace(PRESETS["osp"], calibration_samples=4, calibration_length=10)


def loaded(**tokenizer: Any) -> Loaded:
    return Loaded(byte_model(num_hidden_layers=1), byte_tokenizer(**tokenizer), None, "pretrained")


def config(folder: Path, text: str = TEXT, **more: Any) -> QuantizeConfig:
    (folder / "text.txt").write_text(text)
    return QuantizeConfig(models=("m",), data="other.txt", **{"calibration": str(folder / "text.txt"), **more})


def test_windows_are_drawn_with_the_protocols_seed(tmp_path: Path) -> None:
    """They are different pieces of the text's first 8 × samples, whole and in order within; a seed draws the same again."""
    found = calibration_windows(loaded(), config(tmp_path), PROTOCOL)
    pieces = ["".join(byte_tokenizer().convert_ids_to_tokens(row)) for row in found.tolist()]  # pyright: ignore
    pool = [TEXT[i : i + 10] for i in range(0, 320, 10)]
    assert found.shape == (4, 10) and len(set(pieces)) == 4 and set(pieces) <= set(pool)
    assert not set(pieces) <= set(pool[:16])  # of all of them, not of the first few
    assert torch.equal(found, calibration_windows(loaded(), config(tmp_path), PROTOCOL))
    other = replace(PROTOCOL, calibration_seed=1)
    assert not torch.equal(found, calibration_windows(loaded(), config(tmp_path), other))


def test_each_begins_as_the_tokenizer_says(tmp_path: Path) -> None:
    """A tokenizer that puts <s> in front of a text has it in front of each sequence."""
    found = calibration_windows(loaded(adds_bos=True), config(tmp_path), PROTOCOL)
    assert found.shape == (4, 10) and (found[:, 0] == 1).all() and (found[:, 1:] > 2).all()


def test_too_little_text(tmp_path: Path) -> None:
    """A text of three sequences where four are needed, of less than one, and a length beyond the model's positions."""
    with pytest.raises(DataError, match=r"too short: 3 sequences of 10 tokens, 4 are needed.*--calibration-samples"):
        calibration_windows(loaded(), config(tmp_path, TEXT[:39]), PROTOCOL)
    with pytest.raises(DataError, match="Lower --calibration-length"):
        calibration_windows(loaded(), config(tmp_path, TEXT[:9]), PROTOCOL)
    with pytest.raises(ModelError, match="--calibration-length 65 is longer than the model's 64 positions"):
        calibration_windows(loaded(), config(tmp_path), replace(PROTOCOL, calibration_length=65))


def test_stdlib_is_calibrated_on_its_training_part() -> None:
    """Where --data is stdlib, of which the held-out part is measured: every sequence is of the other."""
    protocol = replace(PROTOCOL, calibration_length=40)
    found = calibration_windows(loaded(), QuantizeConfig(models=("m",), data="stdlib"), protocol).tolist()

    def windows_of(split: Any) -> list[list[int]]:
        texts = (text for _, text in stdlib_documents(split) if text)
        return text_windows(texts, byte_tokenizer(), 40, False, 8 * 4)[0].tolist()

    assert all(row in windows_of("train") for row in found)
    assert not any(row in windows_of("heldout") for row in found)


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    """A tokenizer of more tokens than the model has rows."""
    small = Loaded(byte_model(num_hidden_layers=1, vocab_size=20), byte_tokenizer(), None, "pretrained")
    with pytest.raises(ModelError, match=r"token \d+, beyond the model's embedding"):
        calibration_windows(small, config(tmp_path), PROTOCOL)


def test_where_the_text_comes_from(tmp_path: Path) -> None:
    """The flag, else the protocol's, else the training part of stdlib; never what is measured, and never a guess."""
    given = config(tmp_path)
    pinned = replace(PROTOCOL, calibration_data="pinned.txt")
    assert calibration_source(given, pinned) == str(tmp_path / "text.txt")
    none = replace(given, calibration=None)
    assert calibration_source(none, pinned) == "pinned.txt"
    assert calibration_source(replace(none, data="stdlib"), PROTOCOL) == "stdlib"
    with pytest.raises(ConfigError, match="give --calibration"):
        calibration_source(none, PROTOCOL)
    with pytest.raises(ConfigError, match="must not be fitted to what is measured"):
        calibration_source(none, replace(PROTOCOL, calibration_data="other.txt"))
