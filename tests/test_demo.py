"""The embedded model is what the package says it is, and the demo shows it."""

from pathlib import Path

import pytest

from trilobit.config.demo import DemoConfig
from trilobit.demo import MODEL, run
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
