"""docs/fourbit.md is executed: its commands parse, and run on a small model and text."""

import re
import shlex
from pathlib import Path

import pytest

from infer.checkpoints import byte_model, byte_tokenizer, save
from trilobit.cli import main, parse

DOCS = (Path(__file__).parents[2] / "docs" / "fourbit.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]
SMALL = ["--sequence-length", "16", "--max-tokens", "64", "--calibration-samples", "4", "--calibration-length", "16"]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    """Each command line is one that the command line accepts, flag for flag."""
    words = shlex.split(line)
    assert words[0] == "trilobit" and parse(words[1], words[2:])[0] is not None


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, on a random model: each ends well, and the last continues the one before it."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", byte_model(num_hidden_layers=1, intermediate_size=32), byte_tokenizer())
    (tmp_path / "wiki.test.raw").write_text("A text that is measured, and nothing else.\n" * 8)
    (tmp_path / "wiki.train.raw").write_text("Another one, that models are calibrated on.\n" * 8)
    for line in (line for line in COMMANDS if line.startswith("trilobit quantize")):
        words = ["model" if word == "HuggingFaceTB/SmolLM2-135M" else word for word in shlex.split(line)[1:]]
        assert main([*words, *SMALL, "--learning-steps", "1", "--device", "cpu"]) == 0, line
        assert "perplexity" in capsys.readouterr().out or "--grid" in line
    assert (tmp_path / "out" / "grid" / "report" / "table.md").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_exports_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the page's exports is written and read back by transformers."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", byte_model(num_hidden_layers=1, intermediate_size=32), byte_tokenizer())
    (tmp_path / "wiki.test.raw").write_text("A text that readings are compared on, and nothing else.\n" * 20)
    (tmp_path / "wiki.train.raw").write_text("Another one, that models are calibrated on.\n" * 8)
    exports = [line for line in COMMANDS if line.startswith("trilobit export")]
    assert len(exports) == 4
    for line in exports:
        words = ["model" if word == "HuggingFaceTB/SmolLM2-135M" else word for word in shlex.split(line)[1:]]
        small = ["--calibration-samples", "4", "--calibration-length", "16"] if "gptq" in words else []
        assert main([*words, *small]) == 0, line
        assert "| transformers | the quantised model |" in capsys.readouterr().out
