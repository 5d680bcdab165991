"""A tokenizer in GGUF's words: which of llama.cpp's tokenizers it is, its tokens, merges, and special tokens.

Byte-level BPE is llama.cpp's `gpt2` with a named splitting rule (`pre`); BPE with byte fallback is its `llama`, which merges
by score: minus the rank of the merge that makes a token. A rule that llama.cpp has no name for is refused; whether the named
one does the same is seen when the export is verified, by tokenising text with both.
"""

import json
from typing import Any

import gguf

from trilobit.errors import ExportError
from trilobit.infer.gguf_tokenizer import BYTE, CONTROL, LLAMA_3, NORMAL, QWEN_2, UNKNOWN, UNUSED, USER_DEFINED

SPLITS = {LLAMA_3: "llama-bpe", QWEN_2: "qwen2"}
NO_MERGE = -1e6  # score of a token that no merge makes


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write the tokenizer for an embedding of `size` rows. Raises ExportError for one that llama.cpp does not have."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ExportError(f"llama.cpp's vocabularies here are BPE, this tokenizer is {model['type']}. Use --to hf.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {token["id"]: token for token in description.get("added_tokens", [])}
    fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(model["vocab"], special, size, model.get("unk_token") if fallback else None, fallback)
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    if not fallback:
        writer.add_tokenizer_pre(_splitting(description))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if fallback:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prefixes_a_space(description))
    else:
        writer.add_token_merges(merges)
    begins, ends = _added(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    for name, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None and token < size:
            add(token)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(
    vocabulary: dict[str, int], special: dict[int, Any], size: int, unknown: str | None, fallback: bool
) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in vocabulary.items()} | {i: entry["content"] for i, entry in special.items()}
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        if token == unknown:
            types.append(UNKNOWN)
        elif index in special:
            types.append(CONTROL if special[index]["special"] else USER_DEFINED)
        else:
            is_byte = fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            types.append(BYTE if is_byte else NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """llama.cpp joins the pair whose token has the highest score: the earliest merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else NO_MERGE for token in tokens]


def _splitting(description: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text before merging."""
    rule = description["pre_tokenizer"] or {}
    steps = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in SPLITS and steps[0]["behavior"] == "Isolated":
            return SPLITS[pattern]
    raise ExportError(
        f"llama.cpp has no name for the way this tokenizer splits text ({', '.join(map(str, kinds))}). Use --to hf."
    )


def _prefixes_a_space(description: dict[str, Any]) -> bool:
    normalizer = description["normalizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    rule = description["pre_tokenizer"] or {}
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or (rule.get("type") == "Metaspace" and rule.get("prepend_scheme", "always") != "never")


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts a start token before a text and an end token after it."""
    ids = tokenizer("a")["input_ids"]
    begins = len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    ends = len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return begins, ends
