"""Perplexity and bits per byte against a naive loop in float64, and the policy of windows."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from infer.checkpoints import byte_model, byte_tokenizer, save
from trilobit.config.eval import EvalConfig
from trilobit.corpus import documents
from trilobit.errors import ConfigError, DataError, ModelError
from trilobit.listener import Listener
from trilobit.measure import perplexity as perplexity_module
from trilobit.measure.evaluate import run
from trilobit.measure.perplexity import nats, text_windows, uses_bos

TEXT = "Ein naïver Satz, ✓ geprüft 😀, und noch einer.\n" * 3


def naive_nats(model: nn.Module, windows: torch.Tensor) -> float:
    """−Σ log p(next) in float64, token by token."""
    model = copy.deepcopy(model).double()
    total = 0.0
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        for row, target in zip(logits.tolist(), window[1:].tolist(), strict=True):
            peak = max(row)
            total += peak + math.log(math.fsum(math.exp(value - peak) for value in row)) - row[target]
    return total


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_nats_equal_a_naive_loop(sequences: int) -> None:
    """Total nats agree with float64 to 1e-5 relative, however windows are batched, and the mode is put back."""
    model = byte_model().train()
    windows = torch.randint(3, 250, (5, 9))
    total, count = nats(model, windows, sequences)
    assert count == 40
    assert total == pytest.approx(naive_nats(model.eval(), windows), rel=1e-5)
    assert nats(model.train(), windows, sequences) == (total, count)
    assert model.training


def test_bf16_is_near_and_is_not_fp32() -> None:
    """Under bf16 the same windows give another number within 2 %."""
    model, windows = byte_model(), torch.randint(3, 250, (4, 17))
    full, half = nats(model, windows, 2)[0], nats(model, windows, 2, "bf16")[0]
    assert full != half
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("length", [2, 3, 7, 16])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("merges", [(), ("a Ã", "Ã ¯", "Ġ n")])
def test_windows_and_bytes(length: int, bos: bool, merges: tuple[str, ...]) -> None:
    """Windows are the tokens in order, without overlap, with the token in front if asked, and the bytes of each are
    exactly those of the tokens it predicts (a character's bytes count with the token that begins it)."""
    tokenizer = byte_tokenizer(adds_bos=True, merges=merges)
    windows, sizes = text_windows([TEXT], tokenizer, length, bos)
    encoding = tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False)
    own = length - bos
    count = len(encoding.ids) // own
    assert windows.shape == (count, length)
    assert windows[:, int(bos) :].flatten().tolist() == encoding.ids[: count * own]
    assert not bos or set(windows[:, 0].tolist()) == {1}
    ends = [0, *(len(TEXT[:end].encode()) for _, end in encoding.offsets)]
    for index, size in enumerate(sizes.tolist()):
        first = index * own + (0 if bos else 1)
        assert size == ends[(index + 1) * own] - ends[first]
    if bos and count * own == len(encoding.ids):
        assert sizes.sum() == len(TEXT.encode())


def test_one_token_a_character_counts_each_byte() -> None:
    """A window that predicts é, ✓ and 😀 predicts 2 + 3 + 4 bytes, though it may be nine tokens."""
    windows, sizes = text_windows(["xé✓😀"], byte_tokenizer(), 10, False)
    assert windows.shape == (1, 10)
    assert sizes.tolist() == [9]
    windows, sizes = text_windows(["é✓😀x"], byte_tokenizer(), 11, True)
    assert sizes.tolist() == [10]


def test_documents_are_separated_by_end_of_text() -> None:
    """Between documents stands one end-of-text token, which is predicted and has no bytes."""
    windows, sizes = text_windows(["ab", "cd"], byte_tokenizer(), 6, True)
    ids = byte_tokenizer()("ab")["input_ids"], byte_tokenizer()("cd")["input_ids"]
    assert windows.tolist() == [[1, *ids[0], 2, *ids[1]]]
    assert sizes.tolist() == [4]


def test_a_limit_reads_no_further_than_it_needs() -> None:
    """With --max-tokens an endless stream is read as far as needed (old code: for ever)."""
    endless = ("abcdefgh" for _ in itertools.count())
    windows, sizes = text_windows(endless, byte_tokenizer(), 5, False, limit=3)
    whole, whole_sizes = text_windows(["abcdefgh"] * 4, byte_tokenizer(), 5, False)
    assert torch.equal(windows, whole[:3])
    assert torch.equal(sizes, whole_sizes[:3])


def test_too_short_a_text_is_refused() -> None:
    """Text of fewer tokens than one window is a DataError with both numbers; exactly one window is enough."""
    with pytest.raises(DataError, match=r"has 4 tokens, fewer than one window of 5\. Lower --sequence-length"):
        text_windows(["abcd"], byte_tokenizer(), 5, False)
    assert len(text_windows(["abcd"], byte_tokenizer(), 5, True)[0]) == 1
    with pytest.raises(DataError, match="has 0 tokens"):
        text_windows([], byte_tokenizer(), 5, False)


def test_bos_policy() -> None:
    """auto does what the tokenizer does by itself; yes and no override it; yes needs a token."""
    adds, plain, without = byte_tokenizer(adds_bos=True), byte_tokenizer(), byte_tokenizer(has_bos=False)
    assert [uses_bos(adds, choice) for choice in ("auto", "yes", "no")] == [True, True, False]
    assert [uses_bos(plain, choice) for choice in ("auto", "yes", "no")] == [False, True, False]
    assert [uses_bos(without, choice) for choice in ("auto", "no")] == [False, False]
    with pytest.raises(ModelError, match="--bos yes: this tokenizer has no beginning-of-text token"):
        uses_bos(without, "yes")


@pytest.mark.parametrize("bos", ["auto", "no"])
def test_eval_end_to_end(tmp_path: Path, bos: str) -> None:
    """The command's numbers are those of the naive loop: perplexity, nats, bits per byte, counts; and BOS as stated."""
    model = byte_model()
    save(tmp_path / "model", model, byte_tokenizer(adds_bos=True))
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"model": str(tmp_path / "model"), "data": str(tmp_path / "text.txt"), "sequence_length": 16, "device": "cpu"}
    result = run(EvalConfig(**settings, bos=bos))
    ids = list(TEXT.encode())
    assert len(byte_tokenizer()(TEXT)["input_ids"]) == len(ids)
    tokens = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    own = 15 if bos == "auto" else 16
    windows = tokens[: len(tokens) // own * own].view(-1, own)
    if bos == "auto":
        windows = torch.cat([torch.ones(len(windows), 1, dtype=torch.int64), windows], dim=1)
    expected = naive_nats(model, windows)
    assert (result.windows, result.tokens, result.bos) == (len(windows), 15 * len(windows), bos == "auto")
    assert result.nats_per_token == pytest.approx(expected / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected / result.tokens), rel=1e-4)
    _, sizes = text_windows([TEXT], byte_tokenizer(), 16, bos == "auto")
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / sizes.sum().item(), rel=1e-5)
    limited = run(EvalConfig(**settings, bos=bos, max_tokens=40))
    assert (limited.windows, limited.tokens) == (2, 30)


def test_eval_refuses_what_cannot_work(tmp_path: Path) -> None:
    """A window longer than the model's positions and settings out of range name their flag."""
    save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ModelError, match="--sequence-length 65 is longer than the model's 64 positions"):
        run(EvalConfig(model=str(tmp_path / "model"), data=str(tmp_path / "text.txt"), sequence_length=65, device="cpu"))
    for bad in ({"sequence_length": 1}, {"sequences": 0}):
        with pytest.raises(ConfigError, match=f"--{next(iter(bad)).replace('_', '-')} is"):
            EvalConfig(model="m", data="d", **bad)


def test_raw_files_are_joined_as_wikitext(tmp_path: Path) -> None:
    """Lines of a .raw file are joined by a blank line, as the field's scripts join WikiText's rows; .txt is left alone."""
    text = " \n = Title = \n\n One naïve line . \n"
    for suffix in (".raw", ".txt"):
        (tmp_path / f"a{suffix}").write_text(text)
    (raw,) = documents(str(tmp_path / "a.raw"))
    (plain,) = documents(str(tmp_path / "a.txt"))
    assert raw.text == " \n\n = Title = \n\n\n\n One naïve line . \n\n"
    assert raw.text == "\n\n".join(text.split("\n"))
    assert raw.bytes == len(raw.text.encode())
    assert plain.text == text


def test_stories260k_on_wikitext(stories260k: Path) -> None:
    """The real stories260K gives a finite perplexity on WikiText-2 that does not move."""
    data = stories260k.parents[1] / "wikitext-2" / "wiki.test.raw"
    if not data.exists():
        pytest.skip(f"{data} is not there")
    result = run(EvalConfig(model=str(stories260k), data=str(data), sequence_length=256, max_tokens=4096, device="cpu"))
    assert (result.windows, result.tokens) == (16, 16 * 255)
    assert result.nats_per_token == pytest.approx(4.8779, abs=1e-3)


def test_logits_are_made_fp32_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the blocks are in which logits become fp32, the nats are the same."""
    model, windows = byte_model().eval(), torch.randint(3, 200, (3, 17))
    whole = nats(model, windows, 3)
    monkeypatch.setattr(perplexity_module, "BLOCK_ELEMENTS", 1000)
    assert nats(model, windows, 3)[0] == pytest.approx(whole[0], rel=1e-6)


def test_a_broken_model_is_a_large_number() -> None:
    """More nats than a float's exponent holds are no crash (old code: OverflowError)."""
    assert perplexity_module.perplexity(800.0) == perplexity_module.perplexity(700.0) > 1e300


def test_a_model_without_numbers_has_no_perplexity(tmp_path: Path) -> None:
    """Weights with a NaN are refused (old code: perplexity NaN, exit 0, and --json that is not JSON)."""
    model = byte_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    save(tmp_path / "model", model)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ModelError, match="has a loss of nan on this text"):
        run(EvalConfig(model=str(tmp_path / "model"), data=str(tmp_path / "text.txt"), sequence_length=16, device="cpu"))


def test_progress_is_heard_batch_by_batch() -> None:
    """Measuring says how many of its tokens are done, up to all of them."""
    heard: list[tuple[int, int]] = []

    class Ears(Listener):
        def progress(self, what: str, done: int, total: int, seconds: float) -> None:
            heard.append((done, total))

    nats(byte_model(), torch.randint(0, 200, (5, 9)), 2, listener=Ears())
    assert heard == [(16, 40), (32, 40), (40, 40)]
