"""The engine with a tokenizer: what it keeps between texts, where it stops, what it opens."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.checkpoints import byte_tokenizer
from infer.natives import latent, native_directory
from trilobit.errors import ConfigError, ModelError
from trilobit.infer import engine as module
from trilobit.infer import native_file
from trilobit.infer.compiler import NotNative
from trilobit.infer.engine import Engine, Timing, engine_of, open_engine, open_native
from trilobit.infer.graph import Graph
from trilobit.infer.load import load
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")

POSITIONS = 700
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("native") / "model", max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Graph:
    return native_file.read(folder / native_file.NAME)


def engine(model: Graph, stops: tuple[int, ...] = (), **options: Any) -> Engine:
    return Engine(model, byte_tokenizer(), stops, **options)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def last_logits(model: Graph, ids: list[int]) -> torch.Tensor:
    """Of a fresh engine, every position run at once."""
    return engine(model, capacity=POSITIONS).logits(torch.tensor(ids))[-1:]


def test_what_is_cached_is_not_run_again(model: Graph) -> None:
    """A text that begins as the one before is read from where they part, at least its last token; the logits are those of a
    fresh read, for longer, shorter, equal and different texts in any order."""
    reused, base = engine(model), ids_of(40)
    other = [*base[:25], *ids_of(30, 1)]
    texts = [
        (base, 40),
        (base, 1),
        ([*base, 7, 8], 2),
        (base[:10], 1),
        (other, 45),
        ([*other[:54], 5], 1),
        ([9], 1),
        (base, 40),
    ]
    for ids, run in texts:
        assert reused.read(ids) == run, (len(ids), run)
        assert reused.cached == ids
        assert torch.equal(reused._logits, last_logits(model, ids))


def test_a_long_prompt_is_read_in_chunks(model: Graph) -> None:
    """More tokens than a call takes have the logits of one call's."""
    long, ids = engine(model, capacity=POSITIONS), ids_of(650)
    assert long.session.most_tokens == 512
    assert long.read(ids) == 650
    assert torch.equal(long._logits, last_logits(model, ids))
    assert torch.equal(long.logits(torch.tensor(ids)), engine(model, capacity=POSITIONS).logits(torch.tensor(ids)))


def test_greedy_text_is_the_argmax(model: Graph) -> None:
    """At temperature 0 each token is the likeliest after those before it, whatever the seed; times and tokens are counted."""
    ids, timing = ids_of(5), Timing()
    new = list(engine(model).stream(ids, 12, GREEDY, timing=timing))
    text = list(ids)
    for token in new:
        assert token == last_logits(model, text).argmax()
        text.append(token)
    assert list(engine(model).stream(ids, 12, GREEDY, seed=9)) == new
    assert (timing.prompt_tokens, timing.tokens) == (5, 12)
    assert timing.tokens_per_second == timing.tokens / timing.seconds > 0
    assert timing.prompt_seconds > 0


def test_texts_continue_each_other(model: Graph) -> None:
    """What was generated is cached: a text that goes on from there costs its new tokens, also after a stream that was not
    read to its end; the penalty sees prompt and text."""
    chat, ids = engine(model), ids_of(20)
    new = list(chat.stream(ids, 10, Sampling(), seed=3))
    assert chat.cached == [*ids, *new[:-1]], "nothing asks for what comes after the last token"
    assert chat.read([*ids, *new, 4, 5]) == 3
    stream = chat.stream(ids, 10, Sampling(), seed=3)
    assert [next(stream) for _ in range(4)] == new[:4]
    stream.close()
    assert chat.cached == [*ids, *new[:3]]
    assert chat.read([*ids, *new]) == 7
    assert torch.equal(chat._logits, last_logits(model, [*ids, *new]))
    penalised = list(engine(model).stream(ids, 30, Sampling(temperature=0, repetition_penalty=1e9)))
    assert len({*ids, *penalised}) == len(set(ids)) + 30


def test_a_stop_ends_the_text(model: Graph) -> None:
    """The first end-of-text token is the last of the text, and is not in the cache; unless the text is not to end."""
    ids = ids_of(5)
    free = list(engine(model).stream(ids, 30, Sampling(), seed=1))
    stop = free[10]
    stopping = engine(model, (stop, free[20]))
    stopped = list(stopping.stream(ids, 30, Sampling(), seed=1))
    assert stopped == free[: free.index(stop) + 1]
    assert stopping.cached == [*ids, *stopped[:-1]]
    assert list(stopping.stream(ids, 30, Sampling(), seed=1, ends=False)) == free


def test_streams_may_take_turns(model: Graph) -> None:
    """Two texts generated in turns from one engine, and reads between them, are those that each is alone."""
    both, prompts = engine(model), [ids_of(20), ids_of(31, 1)]
    alone = [list(engine(model).stream(ids, 8, Sampling(), seed=4)) for ids in prompts]
    streams = [both.stream(ids, 8, Sampling(), seed=4) for ids in prompts]
    got: list[list[int]] = [[], []]
    for turn in range(8):
        for stream, into in zip(streams, got, strict=True):
            into.append(next(stream))
        if turn == 3:
            both.read(ids_of(5, 2))
        if turn == 5:
            both.logits(torch.tensor(ids_of(9, 3)))
    assert got == alone


def test_capacity(model: Graph) -> None:
    """A text stops where the session is full, a prompt that leaves no room is refused with both numbers, and the model's
    positions are the most that is ever given."""
    small, ids = engine(model, capacity=20), ids_of(15)
    assert len(list(small.stream(ids, 100, GREEDY))) == 5
    assert len(list(small.stream(ids_of(19), 100, GREEDY))) == 1
    assert small.read(ids_of(20)) > 0
    assert list(small.stream(ids_of(20), 100, GREEDY)) == []
    with pytest.raises(ConfigError, match="the prompt has 21 tokens, and there is room for 20"):
        small.read(ids_of(21))
    assert engine(model, capacity=10**6).capacity == POSITIONS == engine(model).capacity
    small.reserve(10)
    assert small.capacity == 20
    small.reserve(10**6)
    assert small.capacity == POSITIONS
    assert small.cached == []
    assert small.read(ids_of(600)) == 600
    assert torch.equal(small._logits, last_logits(model, ids_of(600)))


def test_room_that_there_is_not_changes_nothing(model: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory for more, the error comes and the engine goes on with what it has."""
    small, ids = engine(model, capacity=20), ids_of(10)
    small.read(ids)

    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("there is no memory")

    with monkeypatch.context() as patched:
        patched.setattr(module, "Session", refuse)
        with pytest.raises(ModelError, match="there is no memory"):
            small.reserve(100)
    assert small.capacity == 20
    assert small.read([*ids, 5]) == 1
    assert torch.equal(small._logits, last_logits(model, [*ids, 5]))


def test_prompts_that_are_none(model: Graph) -> None:
    """No tokens, and tokens that the embedding does not have, are refused before anything is run."""
    with pytest.raises(ConfigError, match="the prompt is empty"):
        engine(model).read([])
    for odd in (-1, 259):
        fresh = engine(model)
        with pytest.raises(ModelError, match=f"a token {odd}, beyond the model's embedding"):
            fresh.read([5, odd])
        assert fresh.cached == []


def test_whatever_is_opened_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """A native directory, and the trainable form it was made from, give the same logits, tokenizer and end-of-text tokens."""
    trainable = latent(tmp_path / "latent", max_position_embeddings=POSITIONS)
    opened, compiled, loaded = open_engine(folder), open_engine(trainable), engine_of(load(trainable))
    ids = torch.tensor(ids_of(50))
    assert torch.equal(opened.logits(ids), compiled.logits(ids))
    assert torch.equal(opened.logits(ids), loaded.logits(ids))
    assert opened.stops == compiled.stops == {2}
    assert opened.tokenizer("é")["input_ids"] == byte_tokenizer()("é")["input_ids"]
    other = open_engine(folder, cache="int8", threads=2, instructions="scalar", capacity=64)
    difference = (other.logits(ids) - opened.logits(ids)).norm() / opened.logits(ids).norm()
    assert 0 < difference < 0.2


@pytest.mark.parametrize(("stops", "expected"), [(7, [7]), ([7, 9], [7, 9]), (None, [2])])
def test_end_of_text_tokens_of_a_directory(stops: Any, expected: list[int], tmp_path: Path) -> None:
    """Those of generation_config.json, one or several, else those of config.json."""
    assert open_native(native_directory(tmp_path / "model", stops=stops))[2] == expected


def test_verify_reads_all_of_it(folder: Path, tmp_path: Path) -> None:
    """A changed byte in a weight is noticed with `verify`, and only then; a file of another size, or a directory without its
    card or manifest, always: it was not completely written."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    open_native(copy, verify=True)
    data = bytearray((copy / native_file.NAME).read_bytes())
    data[-1] ^= 1
    (copy / native_file.NAME).write_bytes(data)
    open_native(copy)
    with pytest.raises(ModelError, match=r"native\.safetensors is missing or damaged"):
        open_native(copy, verify=True)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config + " ")
    with pytest.raises(ModelError, match="is not whole: files are missing, or have other sizes"):
        open_native(copy)
    (copy / "config.json").write_text(config)
    (copy / "manifest.json").unlink()
    with pytest.raises(ModelError, match="not completely written"):
        open_native(copy, verify=True)
    with pytest.raises(ModelError, match="is not whole"):
        open_native(copy)
    (copy / "trilobit.json").unlink()
    with pytest.raises(ModelError, match=r"no trilobit\.json that says so: it was not completely written"):
        open_native(copy, complete=False)


def test_without_the_library_the_engine_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No native library: NotNative with the reason, for every way in."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "choice", lambda: native.Instructions("none", "no native library: not built yet"))
    with pytest.raises(NotNative, match="no native kernels: no native library: not built yet"):
        open_engine(folder)
    with pytest.raises(NotNative, match="not built yet"):
        module.require_library()
