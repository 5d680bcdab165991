"""What is pre-trained: a transformers config from the hub or a directory, or one of a few Llamas by name."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from trilobit.errors import ModelError
from trilobit.infer.hub import names_a_place, require_on_hub
from trilobit.infer.quiet import clear_errors
from trilobit.recipes import RECIPES

OURS = ("llama-", "osp-")  # how names of ours begin, and those of recipes
PADDED = 256  # rows of an embedding that a vocabulary may be padded by without a word

LLAMAS: dict[str, dict[str, Any]] = {
    "llama-3m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6,
                 "num_key_value_heads": 2},
    "llama-60m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
                  "num_key_value_heads": 8},
    "llama-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                   "num_key_value_heads": 3},
    "llama-1.4b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16,
                   "num_key_value_heads": 16},
}  # fmt: skip
"""Parameters without embeddings: 2 M, 39 M, 106 M (the shape of SmolLM2-135M), 1.2 G (the model of arXiv 2506.19697, whose
1.416 G parameters are those of an untied head)."""


def read_architecture(source: str, sequence_length: int, names: Sequence[str] = tuple(LLAMAS)) -> PretrainedConfig:
    """The config of `source`, without a quantisation; one of ours has the positions that will be trained, and no more.

    names: those of ours, to which a misspelt one is compared. Raises ModelError for no config, and for too few positions.
    """
    if source in LLAMAS:
        seen = {"max_position_embeddings": sequence_length, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        return LlamaConfig.from_dict(LLAMAS[source] | seen)
    if not names_a_place(source):
        _require_no_misspelt_one(source, names)
        require_on_hub(source)
    elif not Path(source).exists():
        raise ModelError(f"there is no {source}.")
    with clear_errors(source):
        config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source} is the config of a quantised checkpoint: take that of the full-precision one.")
    text = config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if isinstance(size := getattr(text, name, 1), int) and size < 1:
            raise ModelError(f"{name} of {source} is {size}; it must be at least 1.")
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ModelError(f"--sequence-length {sequence_length} is longer than the {positions} positions of {source}.")
    return config


def _require_no_misspelt_one(source: str, names: Sequence[str]) -> None:
    """Raise ModelError for what looks like a name of ours and is none: no hub is asked for it."""
    close = difflib.get_close_matches(source, names, n=1)
    if "/" in source or not (close or source.startswith(OURS)):
        return
    alike = source.replace("osp-", "llama-", 1)
    hint = f"; did you mean {close[0]}?" if close else "."
    if source in RECIPES["pretrain"] and alike in LLAMAS:
        hint = f": it is a recipe, --recipe {source} (of {alike})."
    raise ModelError(
        f"there is no architecture {source!r}{hint} Ours are {', '.join(names)}; anything else is a hub id (owner/name) or a "
        "directory with a config.json."
    )


def fit_vocabulary(config: PretrainedConfig, tokenizer: Any, free: bool) -> None:
    """Give `config` the tokens that begin and end `tokenizer`'s texts and, where it is `free`, its vocabulary's size.

    Elsewhere a larger vocabulary than the tokenizer's is kept (many are padded); raises ModelError for a smaller one.
    """
    text, needed = config.get_text_config(), len(tokenizer)
    if free:
        text.vocab_size = needed
    if text.vocab_size < needed:
        raise ModelError(
            f"the tokenizer does not match the architecture's vocabulary: it has {needed:,} entries, the config "
            f"{text.vocab_size:,}. Use its own tokenizer, or make one with --train-tokenizer."
        )
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if special["pad_token_id"] in (special["bos_token_id"], special["eos_token_id"]):
        special["pad_token_id"] = None  # its row would be zeros, and never learn: texts are made of it, nothing is padded
    for name, token in special.items():
        for part in {id(config): config, id(text): text}.values():
            setattr(part, name, token)


def unused_rows(config: PretrainedConfig, tokenizer: Any) -> str:
    """In words, how much of the vocabulary no text of `tokenizer` can have, if that is more than padding."""
    size, needed = config.get_text_config().vocab_size, len(tokenizer)
    if size - needed <= max(PADDED, size // 20):
        return ""
    return f"{size - needed:,} of the vocabulary's {size:,} rows are never used: the tokenizer has {needed:,} entries"
