"""The embedded model is what the package says it is, and the demo shows it."""

import re
import subprocess
from pathlib import Path

import pytest

from trilobit.cli import COMMANDS
from trilobit.config.demo import DemoConfig
from trilobit.demo import MODEL, PROMPT, DemoResult, run
from trilobit.errors import OutputError
from trilobit.infer.load import load


def test_the_embedded_model_is_small_and_whole() -> None:
    """At most 3.6 M parameters, 4,096 tokens and 8 MB, and it loads like any checkpoint."""
    loaded = load(MODEL)
    assert sum(p.numel() for p in loaded.model.parameters()) <= 3_600_000
    assert len(loaded.tokenizer) <= 4096
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


def test_a_folder_that_is_no_earlier_demo_is_left_alone(tmp_path: Path) -> None:
    """The demo replaces its own output only."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    (out / "run.json").write_text('{"config": {"model": "another"}}')
    with pytest.raises(OutputError, match="not an earlier demo"):
        run(DemoConfig(out=str(out)))
    assert (out / "thesis.txt").read_text() == "years of work"


def test_the_end_of_a_demo_says_how_to_go_on() -> None:
    """Sizes, perplexities, both samples, what was made, and commands that exist, as a shell takes them."""
    result = DemoResult(
        out="out/demo", seconds=161.0, tokens=1_000_000, original_bytes=7_080_000, ternary_bytes=6_840_000,
        ternary_parameters=1_966_080, original_perplexity=21.56, ternary_perplexity=25.31, nats_above_original=0.16,
        form="autobitlinear", prompt=PROMPT, original_sample=" one", ternary_sample=" two",
    )  # fmt: skip
    text = result.summary()
    assert re.search(r"layers' matrices +3\.93 MB +0\.49 MB", text)
    assert f"{PROMPT} one" in text and f"{PROMPT} two" in text
    commands = [line.split()[1] for line in text.splitlines() if line.startswith("  trilobit ")]
    assert commands == ["generate", "eval", "export", "bench", "tune", "export"] and set(commands) <= set(COMMANDS)
    quoted = next(line for line in text.splitlines() if "trilobit generate" in line)
    said = subprocess.run(["bash", "-c", quoted.replace("trilobit", "printf '%s|'", 1)], capture_output=True, text=True)
    assert said.stdout == f"generate|out/demo|{PROMPT}|--repetition-penalty|1.2|"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_demo_runs_twice(tmp_path: Path) -> None:
    """A short demo gives a smaller model with sizes, perplexities, samples and pictures; a second one replaces it."""
    config = DemoConfig(out=str(tmp_path / "demo"), max_tokens=8192)
    for _ in range(2):
        result = run(config)
        assert result.ternary_bytes < result.original_bytes
        assert result.ternary_perplexity > result.original_perplexity > 1
        assert result.original_sample
        assert "perplexity, held out" in result.summary()
        assert (tmp_path / "demo" / "loss.png").stat().st_size > 5000
