"""A tokenizer in GGUF's words: which of llama.cpp's tokenizers it is, its tokens, merges, and special tokens.

Byte-level BPE is llama.cpp's `gpt2` with a named splitting rule (`pre`); BPE with byte fallback is its `llama`, which merges
by score: minus the rank of the merge that makes a token. A rule that llama.cpp has no name for is refused, and so is whatever
a tokenizer does besides, because llama.cpp leaves it out without a word; whether the named rule does the same is seen when the
export is verified, by tokenising text with both.

One thing is let pass: Qwen's NFC. llama.cpp normalises nothing, no file can say otherwise, and text is composed already nearly
everywhere; decomposed characters (e and a combining accent) become other tokens there, as in every Qwen file.
"""

import json
from typing import Any

import gguf
from tokenizers import Tokenizer

from trilobit.errors import ExportError
from trilobit.infer.gguf_tokenizer import BYTE, CONTROL, LLAMA_3, NORMAL, QWEN_2, SPACE, UNKNOWN, UNUSED, USER_DEFINED

SPLITS = {LLAMA_3: "llama-bpe", QWEN_2: "qwen2"}
NO_MERGE = -1e6  # score of a token that no merge makes


ELSEWHERE = "Use --to native or --to hf."
PLAIN_NORMALIZERS = {"gpt-2": (), "smollm": (), "llama-bpe": (), "qwen2": ("NFC",)}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int, ends: list[int]) -> None:
    """Write the tokenizer for an embedding of `size` rows. ends: the tokens that end a text according to the checkpoint, after
    the tokenizer's own. Raises ExportError for a tokenizer that llama.cpp does not have."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ExportError(f"llama.cpp's vocabularies here are BPE, this tokenizer is {model['type']}. {ELSEWHERE}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {token["id"]: token for token in description.get("added_tokens", [])}
    fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(model["vocab"], special, size, model.get("unk_token") if fallback else None, fallback)
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    if fallback:
        _require_plain_spaces(description)
        _require_plain_merges(description, whole_words=False)
    else:
        name = _splitting(description)
        if odd := [kind for kind in _kinds(description["normalizer"], "normalizers") if kind not in PLAIN_NORMALIZERS[name]]:
            raise ExportError(f"llama.cpp does not normalise text, and this tokenizer does ({', '.join(odd)}). {ELSEWHERE}")
        _require_plain_merges(description, whole_words=name == "llama-bpe")
        writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if fallback:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix("Prepend" in _kinds(description["normalizer"], "normalizers"))
    else:
        writer.add_token_merges(merges)
    before, after = _added(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    for name, add in (("bos", writer.add_bos_token_id), ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None and token < size:
            add(token)
    _add_ends(writer, [token for token in (tokenizer.eos_token_id, *ends) if token is not None and token < size])
    _add_templates(writer, tokenizer.chat_template)


def _add_ends(writer: gguf.GGUFWriter, ends: list[int]) -> None:
    """llama.cpp has three names for a token that ends a text. Where no file names one it takes number 11 (`gpt2`) or 2
    (`llama`), whatever token that is, and stops there."""
    if not ends:
        raise ExportError(
            "neither the tokenizer nor the checkpoint has an end token, and llama.cpp would stop at some ordinary one. Set "
            f"eos_token in tokenizer_config.json or eos_token_id in generation_config.json. {ELSEWHERE}"
        )
    add = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for token, write in zip(dict.fromkeys(ends), add, strict=False):
        write(token)


def _add_templates(writer: gguf.GGUFWriter, templates: Any) -> None:
    """One chat template, or several by name: the default one is llama.cpp's own choice."""
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    elif not isinstance(templates, dict):
        templates = {} if templates is None else {"default": templates}
    named = []
    for name, template in sorted(templates.items()):
        if name == "default":
            writer.add_chat_template(template)
        else:
            named.append("".join(c if c.isascii() and c.isalnum() else "_" for c in name))
            writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=named[-1]), template)
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, named)


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


def _steps(rule: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, those of sequences one by one."""
    if rule is None:
        return []
    return [step for part in rule[parts] for step in _steps(part, parts)] if rule["type"] == "Sequence" else [rule]


def _kinds(rule: dict[str, Any] | None, parts: str) -> list[str]:
    return [step["type"] for step in _steps(rule, parts)]


def _splitting(description: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text before merging."""
    steps = _steps(description["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise ExportError(
            "this tokenizer puts a space in front of a text (add_prefix_space), and llama.cpp's byte-level tokenizers do not. "
            + ELSEWHERE
        )
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in SPLITS and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return SPLITS[pattern]
    raise ExportError(
        f"llama.cpp has no name for the way this tokenizer splits text ({', '.join(kinds) or 'not at all'}). {ELSEWHERE}"
    )


def _require_plain_merges(description: dict[str, Any], whole_words: bool) -> None:
    """Raise ExportError unless merging is nothing but merging. whole_words: llama.cpp takes a word that is a token as it is;
    which is the same where every token is what its own merges make of it."""
    model = description["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ExportError(f"llama.cpp has no {key}, and this tokenizer has ({model[key]}). {ELSEWHERE}")
    if bool(model.get("ignore_merges")) == whole_words:
        return
    merging: Any = Tokenizer.from_str(json.dumps({**description, "model": {**model, "ignore_merges": False}})).model
    added = {token["content"] for token in description.get("added_tokens", [])}
    for token in model["vocab"]:
        if token not in added and [piece.value for piece in merging.tokenize(token)] != [token]:
            does = "takes words that are tokens as they are" if whole_words else "always merges"
            raise ExportError(
                f"llama.cpp {does} with this splitting, and this tokenizer has ignore_merges {str(not whole_words).lower()}: "
                f"its merges do not make the token {token!r}. {ELSEWHERE}"
            )


def _require_plain_spaces(description: dict[str, Any]) -> None:
    """Raise ExportError if a tokenizer with byte fallback does more to a text than write spaces as ▁."""
    normalizers = _steps(description["normalizer"], "normalizers")
    odd = [
        step["type"]
        for step in normalizers
        if not (step["type"] == "Prepend" and step["prepend"] == SPACE)
        and not (step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE))
    ]
    if odd:
        raise ExportError(
            f"llama.cpp does not normalise text but for its spaces, and this tokenizer does ({', '.join(odd)}). {ELSEWHERE}"
        )
    steps = _steps(description["pre_tokenizer"], "pretokenizers")
    replaces = any(step["type"] == "Replace" for step in normalizers)
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            if step.get("prepend_scheme", "always") != "never":
                raise ExportError(
                    f"this tokenizer puts {SPACE} before a text unless one is there (Metaspace), llama.cpp always or never. "
                    + ELSEWHERE
                )
            replaces = True
        elif step["type"] != "Split" or step["pattern"] != {"String": " "} or not replaces:  # of spaces, of which none is left
            raise ExportError(
                f"llama.cpp's byte-fallback tokenizers do not split text, and this one does ({step['type']}). {ELSEWHERE}"
            )
    if not replaces:
        raise ExportError(f"llama.cpp's byte-fallback tokenizers write spaces as {SPACE}, and this one does not. {ELSEWHERE}")


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts a start token before a text and an end token after it."""
    ids = tokenizer("a")["input_ids"]
    begins = len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    ends = len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return begins, ends
