"""What a run is trained and measured on: --data, or text sampled from the model itself, as cached tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trilobit.config.training import TrainingConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError
from trilobit.infer.hf import sample_windows
from trilobit.infer.loaded import Loaded
from trilobit.surgery.roles import vocabulary_size
from trilobit.tensors import weights_fingerprint
from trilobit.train.data import Tokens, from_tokens, prepare
from trilobit.train.loop import Signals

HELDOUT_TOKENS = 262_144


def read_corpus(config: TrainingConfig, tokenizer: Any, vocabulary: int, signals: Signals) -> Tokens:
    """Training and held-out tokens of --data, from the cache if they are there; a signal stops the work between documents.
    Raises DataError for text that is missing or too short."""
    return prepare(
        config.data, tokenizer, vocab_size=vocabulary, text_field=config.text_field,
        max_tokens=config.max_tokens + config.sequence_length + 1, sequence_length=config.sequence_length,
        cache_dir=Path(config.cache_dir) if config.cache_dir else None,
        heldout_tokens=max(HELDOUT_TOKENS, config.evaluation_tokens),
        progress=lambda size, count: signals.raise_if_set(),
    )  # fmt: skip


def read_tokens(config: TuneConfig, base: Loaded, signals: Signals) -> Tokens:
    """Training and held-out tokens of --data for `base`, from the cache if they are there; a signal stops the work between
    documents. Raises DataError for text that is missing or too short, ConfigError where nothing can be sampled from."""
    model, tokenizer = base.model, base.tokenizer
    vocabulary = vocabulary_size(model)
    cache = Path(config.cache_dir) if config.cache_dir else None
    needed = config.max_tokens + config.sequence_length + 1
    if config.data != "self":
        return read_corpus(config, tokenizer, vocabulary, signals)
    end: Any = tokenizer.eos_token_id
    start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if start is None:
        raise ConfigError("--data self: this tokenizer has no beginning-of-text or end-of-text token to start from.")
    wanted, length = config.self_tokens or needed, config.sequence_length
    heldout = config.evaluation_tokens + 1  # the last token of a part is a target alone
    key = f"self windows {weights_fingerprint(model)} {start} {wanted} {length}"

    def make() -> Iterator[Any]:
        held = trained = 0
        for chain in sample_windows(model, start, wanted + heldout, length, 0, between=signals.raise_if_set):
            signals.raise_if_set()
            yield chain
            if held < heldout:
                held += len(chain)
            else:
                trained += len(chain)
            if trained >= wanted:
                return

    return from_tokens(
        key, make, tokenizer, vocab_size=vocabulary, heldout_tokens=heldout,
        sequence_length=config.sequence_length, cache_dir=cache,
    )  # fmt: skip
