"""`trilobit bench`: rates, bytes and fractions of a run."""

from pathlib import Path

import pytest

from infer.checkpoints import save
from trilobit.config.bench import BenchConfig
from trilobit.demo import MODEL
from trilobit.errors import ConfigError
from trilobit.export.hf import write_latent
from trilobit.infer.load import load
from trilobit.kernels import native
from trilobit.measure import speed
from trilobit.measure.speed import read_rate, run
from trilobit.surgery.ternary import TernarySpec, ternarize

needs_library = pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, made ternary untrained."""
    loaded = load(MODEL)
    surgery = ternarize(loaded.model, TernarySpec())
    path = tmp_path_factory.mktemp("ternary") / "latent"
    write_latent(loaded.model, surgery.plan, loaded.tokenizer, path)
    return path


@needs_library
def test_a_memory_rate_is_bytes_over_seconds() -> None:
    """Memory cannot be read at no rate, nor faster than ten terabytes a second."""
    assert 1e8 < read_rate(native.huge_pages(8 << 20).fill_(1), 2) < 1e13


def test_transformers_models_have_rates_and_no_roof(tmp_path: Path) -> None:
    """A model that is not ternary is measured through transformers, without a claim about memory."""
    result = run(BenchConfig(model=str(save(tmp_path / "checkpoint")), prompt_tokens=2, tokens=16, rounds=3, device="cpu"))
    assert result.engine == "transformers" and result.prompt_tokens_per_second > 0 and result.tokens_per_second > 0
    assert result.bandwidth is None and "GB/s" not in result.summary()


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    """A prompt that the model has no positions for is the user's to shorten."""
    with pytest.raises(ConfigError, match="positions"):
        run(BenchConfig(model=str(save(tmp_path / "checkpoint")), prompt_tokens=100_000, tokens=3, rounds=1, device="cpu"))


@needs_library
def test_the_engine_is_measured_against_memory(ternary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth is bytes of weights times tokens a second, and the fraction is of the roof; the summary says both. Weights that
    fit into caches are not held against memory (the old code said 195 % of it)."""
    config = BenchConfig(model=str(ternary), prompt_tokens=16, tokens=4, rounds=1, threads=1)
    small = run(config)
    assert small.engine == "native" and small.bandwidth is None and "GB/s" not in small.summary()
    monkeypatch.setattr(speed, "CACHED_BYTES", 0)
    result = run(config)
    assert result.weight_bytes and result.bandwidth and result.bandwidth_roof and result.bandwidth_fraction
    assert result.bandwidth == pytest.approx(result.weight_bytes * result.tokens_per_second)
    assert result.bandwidth_fraction == pytest.approx(result.bandwidth / result.bandwidth_roof)
    linears = sum(p.numel() for n, p in load(MODEL).model.named_parameters() if "layers" in n and p.ndim == 2)
    assert linears / 5 < result.weight_bytes < linears
    assert "GB/s" in result.summary()


def test_the_prompt_fits_the_model(tmp_path: Path) -> None:
    """Without --prompt-tokens a model of few positions is measured on what they hold (the old code refused it)."""
    result = run(BenchConfig(model=str(save(tmp_path / "checkpoint")), tokens=16, rounds=1, device="cpu"))
    assert result.prompt_tokens == 64 - 16


def test_one_token_cannot_be_timed(tmp_path: Path) -> None:
    """The first token belongs to the prompt: a rate of one token would be a made-up number."""
    with pytest.raises(ConfigError, match="at least 2"):
        run(BenchConfig(model=str(tmp_path), tokens=1))
