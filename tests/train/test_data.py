import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from train.byte_level import VOCABULARY, WORDS, byte_level, make_tokenizer
from trilobit.errors import DataError, ModelError
from trilobit.train import data as data_module
from trilobit.train import encode as encode_module
from trilobit.train.data import Tokens, from_tokens, prepare
from trilobit.train.windows import Windows, evaluation_windows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(byte_level()), eos_token="<|end|>")


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {WORDS}"}) + "\n" for i in range(400)))
    return path


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Tokens]:
    def build(data: Path | str, **options) -> Tokens:
        defaults = {"vocab_size": VOCABULARY, "cache_dir": tmp_path / "cache", "sequence_length": 16}
        return prepare(str(data), options.pop("tokenizer", tokenizer), **{**defaults, **options})

    return build


def documents_of(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> list[str]:
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1)
    assert len(parts[-1]) == 0, "the last document has no end-of-text token"
    return [tokenizer.backend_tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]


def test_tokens_give_the_text_back(tokenizer, corpus_file: Path, build) -> None:
    """Both parts decode to exactly the documents of each side, an end-of-text token after each, with their bytes."""
    tokens = build(corpus_file)
    for split, ids, size in (
        ("train", tokens.train, tokens.train_bytes),
        ("heldout", tokens.heldout, tokens.heldout_bytes),
    ):
        expected = [document.text for document in data_module.corpus.documents(str(corpus_file), split=split)]
        assert expected
        assert documents_of(tokenizer, ids) == expected
        assert size == sum(len(text.encode()) for text in expected)
    assert isinstance(tokens.train, np.memmap)
    assert tokens.train.dtype == np.uint16
    assert not tokens.train.flags.writeable
    assert "400 documents" in tokens.description


def test_a_second_call_does_not_tokenise(corpus_file: Path, build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text, tokenizer and options are found in the cache, even if the file has moved."""
    first = build(corpus_file)
    monkeypatch.setattr(data_module, "encode_documents", None)
    second = build(corpus_file.rename(corpus_file.with_name("moved.jsonl")), sequence_length=32)
    assert (second.train == first.train).all()
    assert second.key == first.key
    assert "kept in" in first.description
    assert "reused from" in second.description


def test_caches_are_where_the_desktop_says(corpus_file: Path, build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In $XDG_CACHE_HOME if that is set, else in ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    key = build(corpus_file, cache_dir=None).key
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    build(corpus_file, cache_dir=None)
    for place in ("home/.cache", "caches"):
        assert (tmp_path / place / "trilobit" / "tokens" / key[:32]).is_dir()


def test_a_change_is_never_served_from_the_cache(tokenizer, corpus_file: Path, build) -> None:
    """Another text, tokenizer or held-out size gives another key."""
    keys = {build(corpus_file).key, build(corpus_file, heldout_tokens=500).key}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|end|>"
    )
    other.add_tokens("perhaps")
    keys.add(build(corpus_file, tokenizer=other, vocab_size=VOCABULARY + 1).key)
    corpus_file.write_text(corpus_file.read_text().replace("399", "398"))
    keys.add(build(corpus_file).key)
    assert len(keys) == 4


def test_a_half_written_cache_does_not_count(corpus_file: Path, build, tmp_path: Path) -> None:
    """A failure while tokenising leaves nothing, and a damaged directory is built again."""
    whole = corpus_file.read_text()
    corpus_file.write_text(whole + "{")
    with pytest.raises(DataError, match="line 401 is not JSON"):
        build(corpus_file)
    assert list((tmp_path / "cache").iterdir()) == []
    corpus_file.write_text(whole)
    expected = build(corpus_file).train.copy()
    (file,) = (tmp_path / "cache").glob("*/tokens.bin")
    file.unlink()
    assert (build(corpus_file).train == expected).all()


def test_batches_and_truncation_leave_no_trace(
    tokenizer, corpus_file: Path, build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are the same however documents are batched and cut; a tokenizer set to truncate and pad neither
    truncates nor is changed."""
    expected = build(corpus_file)
    monkeypatch.setattr(encode_module, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(encode_module, "CUT_CHARACTERS", 20)
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|end|>"
    )
    other.backend_tokenizer.enable_truncation(5)
    other.backend_tokenizer.enable_padding(length=4096)
    found = build(corpus_file, tokenizer=other, cache_dir=tmp_path / "again")
    assert (found.train == expected.train).all()
    assert (found.heldout == expected.heldout).all()
    assert other.backend_tokenizer.truncation["max_length"] == 5
    assert found.key == expected.key


def test_one_document_is_held_out_at_its_end(tokenizer, build, tmp_path: Path) -> None:
    """With too few documents the last 2 % of the tokens, one window at least, are held out, and no text is lost."""
    path = tmp_path / "a.txt"
    for copies, expected in ((200, lambda total: int(total * 0.02)), (10, lambda _: 17)):
        path.write_text(WORDS * copies)
        tokens = build(path)
        total = len(tokens.train) + len(tokens.heldout)
        assert len(tokens.heldout) == expected(total)
        assert documents_of(tokenizer, np.concatenate([tokens.train, tokens.heldout])) == [path.read_bytes().decode()]
        tail = tokenizer.backend_tokenizer.decode(tokens.heldout.tolist())
        assert tokens.heldout_bytes == len(tail.encode())
        assert tokens.train_bytes + tokens.heldout_bytes == path.stat().st_size


def test_the_held_out_part_is_bounded(build, corpus_file: Path, tmp_path: Path) -> None:
    """Held-out documents stop at `heldout_tokens` and are not trained on instead; so does a tail."""
    full, less = build(corpus_file), build(corpus_file, heldout_tokens=100)
    assert 100 <= len(less.heldout) < 200 < len(full.heldout)
    assert (less.heldout == full.heldout[: len(less.heldout)]).all()
    assert (less.train == full.train).all()
    (tmp_path / "a.txt").write_text(WORDS * 200)
    assert len(build(tmp_path / "a.txt", heldout_tokens=50).heldout) == 50


def test_a_stream_stops_at_max_tokens(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless hub dataset is read until `max_tokens` training tokens and refused without them; files ignore it."""
    taken = []

    def load(*_: object, **__: object):
        for i in range(10**9):
            taken.append(i)
            yield {"text": f"{i} {WORDS}"}

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(encode_module, "BATCH_CHARACTERS", 1000)
    with pytest.raises(DataError, match="--max-tokens"):
        build("owner/name")
    tokens = build("owner/name", max_tokens=2000)
    assert 2000 <= len(tokens.train) + len(tokens.heldout) < 2500
    assert len(taken) < 200


def test_progress_counts_up(build, corpus_file: Path) -> None:
    """`progress` hears the bytes and tokens done so far, and at last the totals."""
    heard: list[tuple[int, int]] = []
    tokens = build(corpus_file, progress=lambda size, count: heard.append((size, count)))
    assert heard == sorted(heard)
    assert heard[-1] == (
        tokens.train_bytes + tokens.heldout_bytes,
        len(tokens.train) + len(tokens.heldout),
    )


def test_a_foreign_tokenizer_is_refused(build, corpus_file: Path) -> None:
    """A token that the model has no entry for is refused, when tokenising and from the cache."""
    with pytest.raises(ModelError, match="does not match the model's vocabulary"):
        build(corpus_file, vocab_size=100)
    build(corpus_file)
    with pytest.raises(ModelError, match="100 entries"):
        build(corpus_file, vocab_size=100)


def test_a_large_vocabulary_takes_four_bytes(build, corpus_file: Path, tmp_path: Path) -> None:
    """Above 65,536 entries tokens are uint32, with the same values."""
    narrow, wide = build(corpus_file), build(corpus_file, vocab_size=65_537, cache_dir=tmp_path / "wide")
    assert wide.train.dtype == np.uint32
    assert (wide.train == narrow.train).all()


def test_bos_separates_where_there_is_no_eos(tokenizer, build, corpus_file: Path) -> None:
    """Documents end in eos, else bos; a tokenizer with neither is refused."""
    backend = tokenizer.backend_tokenizer
    found = build(corpus_file, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>"))
    assert found.train[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="neither an eos nor a bos"):
        build(corpus_file, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))


def test_too_short_is_said_in_numbers(build, tmp_path: Path) -> None:
    """Text too short for a training and a held-out window is refused with both numbers."""
    (tmp_path / "a.txt").write_text("end")
    with pytest.raises(DataError, match=r"\d tokens.*window of 17 each"):
        build(tmp_path / "a.txt")


def test_ready_tokens_are_kept_under_their_name(tokenizer, tmp_path: Path) -> None:
    """`from_tokens` calls `make` once per name, keeps the tokens as they are, and holds out the first, or the last 2 %
    where they are few."""
    calls = []

    def make() -> list[np.ndarray]:
        calls.append(1)
        return [np.arange(3, 103), np.array([], dtype=np.int64), np.arange(200, 250).reshape(5, 10)]

    for name in ("a", "a", "b"):
        tokens = from_tokens(name, make, tokenizer, vocab_size=VOCABULARY, sequence_length=8, cache_dir=tmp_path / "cache")
        assert [*tokens.train, *tokens.heldout] == [*range(3, 103), *range(200, 250)]
        assert len(tokens.heldout) == 9
        assert tokens.heldout_bytes > 0
    assert len(calls) == 2
    documents = [np.arange(3, 15), np.arange(20, 28), np.arange(100, 150)]
    tokens = from_tokens(
        "c", lambda: documents, tokenizer, vocab_size=VOCABULARY, heldout_tokens=15, sequence_length=8,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert [*tokens.heldout] == [*range(3, 15), *range(20, 28)], "whole documents, until there are 15 tokens"
    assert [*tokens.train] == [*range(100, 150)]


@given(count=st.integers(1, 700), seed=st.integers(-3, 2**64), epoch=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_each_epoch_visits_every_window_once(count: int, seed: int, epoch: int) -> None:
    """In each epoch, for any number of windows and any seed, every window comes exactly once."""
    windows = Windows(np.zeros(count * 4 + 3, dtype=np.uint16), 4, seed)
    assert windows.count == count
    assert sorted(windows.order(epoch * count, count)) == list(range(count))


def test_seeds_and_epochs_shuffle_differently() -> None:
    """No two epochs of nearby seeds have the same order, and no order is nearly that of the file or of another."""
    tokens = np.zeros(1001, dtype=np.uint16)
    orders = [Windows(tokens, 1, seed).order(epoch * 1000, 1000) for seed in range(4) for epoch in range(4)]
    for i, first in enumerate(orders):
        assert (np.diff(first) == 1).sum() < 12  # Poisson with mean 1
        for second in [*orders[:i], np.arange(1000)]:
            assert (first == second).sum() < 12
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_every_place_is_equally_likely() -> None:
    """Over seeds, each of a few windows comes first about equally often (chi-square, far beyond its 99.9 % point)."""
    tokens = np.zeros(6, dtype=np.uint16)
    first = [Windows(tokens, 1, seed).order(0, 1)[0] for seed in range(2000)]
    observed = np.bincount(first, minlength=5)
    assert ((observed - 400) ** 2 / 400).sum() < 25, observed


@given(start=st.integers(0, 200), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_samples_do_not_know_how_they_are_shared(start: int, sizes: list[int]) -> None:
    """Any split of a range of samples over ranks or micro-batches, even across epochs, gives the same samples."""
    tokens = np.arange(1000, dtype=np.uint16)
    whole = Windows(tokens, 13, 7).samples(start, sum(sizes))
    starts = [start + sum(sizes[:i]) for i in range(len(sizes))]
    parts = [Windows(tokens, 13, 7).samples(at, size) for at, size in zip(starts, sizes, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_batch_is_windows_of_the_text() -> None:
    """A batch is int64 [size, length + 1], each row a window that starts at a multiple of the length."""
    windows = Windows(np.arange(1000, dtype=np.uint16), 13, 7)
    batch = windows.samples(80, 4)
    assert (batch.dtype, batch.shape) == (torch.int64, (4, 14))
    assert torch.equal(batch, windows.samples(80, 4))
    assert (batch[:, 0] % 13 == 0).all()
    assert (batch.diff(dim=1) == 1).all()


def test_evaluation_windows_are_spread_evenly() -> None:
    """They do not overlap, reach from the first window into the last tenth, and stay within the limit."""
    tokens = np.arange(10_001, dtype=np.uint16)
    windows = evaluation_windows(tokens, 10, 500)
    assert windows.shape == (50, 11)
    assert windows[0, 0] == 0
    assert (windows[:, 0].diff() == 200).all()
    assert evaluation_windows(tokens, 10, 10**9).shape == (1000, 11)
    assert evaluation_windows(tokens, 10, 3).shape == (1, 11)


def test_one_window_is_enough_and_less_is_refused() -> None:
    """length + 1 tokens are one window; one fewer is refused with both numbers."""
    tokens = np.arange(9, dtype=np.uint16)
    assert torch.equal(Windows(tokens, 8, 0).samples(5, 2), torch.arange(9).repeat(2, 1))
    for use in (lambda: Windows(tokens, 9, 0), lambda: evaluation_windows(tokens, 9, 100)):
        with pytest.raises(DataError, match=r"9 tokens.*--sequence-length 9 needs 10"):
            use()
