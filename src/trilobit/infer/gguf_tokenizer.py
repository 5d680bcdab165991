"""The tokenizer that a GGUF file carries, as a fast one of transformers.

    tokenizer.ggml.model   gpt2     byte-level BPE: tokens, merges, and a name (tokenizer.ggml.pre) for how text is cut first
                           llama    byte-fallback BPE, as SentencePiece's: tokens with scores; two neighbours are joined
                                    where their union has the best score, so that every split of a token is a merge of its
                                    rank; what no token covers is spelt in bytes
    tokenizer.ggml.token_type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte

A way of cutting that is not known by name is refused rather than taken for another: a tokenizer.json beside the file serves
then, if it has the file's tokens.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trilobit.errors import ModelError
from trilobit.infer.quiet import clear_errors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MOST_TOKENS = 1 << 20
MOST_SPLITTING = 1 << 28  # sum of the squares of the tokens' lengths: what finding their splits costs
SPACE = "▁"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
# tokenizer.ggml.pre: whether digits stand alone before GPT-2's own pattern cuts, or the pattern that cuts
LLAMA_3, QWEN_2 = WORDS + r"\p{N}{1,3}" + REST, WORDS + r"\p{N}" + REST
CUTS: dict[str, bool | str] = {
    "gpt-2": False, "gpt2": False, "smollm": True, "llama-bpe": LLAMA_3, "llama3": LLAMA_3, "llama-v3": LLAMA_3,
    "falcon3": LLAMA_3, "qwen2": QWEN_2, "deepseek-r1-qwen": QWEN_2,
}  # fmt: skip
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def read_tokenizer(metadata: dict[str, Any], beside: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a file's metadata; of the folder `beside` it where the metadata's is of a kind that is not known.

    Raises ModelError if there is none, or it has other tokens than an embedding of `vocabulary` rows.
    """
    tokens = _list(metadata, "tokens", str)
    if not tokens or len(tokens) > min(vocabulary, MOST_TOKENS) or len(set(tokens)) != len(tokens):
        raise ModelError(f"its tokenizer has {len(tokens)} tokens, some twice or beyond the embedding's {vocabulary} rows.")
    types = _list(metadata, "token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"its tokenizer has {len(tokens)} tokens and {len(types)} types of tokens.")
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    known = kind == "llama" or (kind == "gpt2" and isinstance(pre, str) and pre in CUTS)
    if not known:
        return _beside(beside, tokens, f"its tokenizer is of a kind that is not known here ({str(kind)[:40]}, {str(pre)[:40]})")
    with clear_errors("its tokenizer"):
        backend = _byte_fallback(metadata, tokens, types) if kind == "llama" else _byte_level(metadata, tokens, CUTS[pre])
        special = [_added(t, True) for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
        backend.add_special_tokens(special)
        backend.add_tokens([_added(t, False) for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED])
        roles = {role: name for role, key in ROLES.items() if (name := _token(metadata, key, tokens)) is not None}
        start_is_usual = kind == "llama" or CUTS.get(pre) is LLAMA_3
        _frame(backend, metadata, tokens, start_is_usual)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    if len(tokenizer) != len(tokens):
        raise ModelError(f"its tokenizer has {len(tokens)} tokens, {len(tokenizer)} after it was built.")
    return tokenizer


def end_tokens(metadata: dict[str, Any]) -> list[int]:
    """The tokens that end a text or a turn."""
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return sorted({i for i in found if isinstance(i, int)})


def _list(metadata: dict[str, Any], name: str, kind: type) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ModelError(f"its tokenizer.ggml.{name} is no list of {kind.__name__}.")
    return value


def _token(metadata: dict[str, Any], role: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelError(f"its {role} token is {str(index)[:40]}, of {len(tokens)}.")
    return tokens[index]


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _byte_level(metadata: dict[str, Any], tokens: list[str], cut: bool | str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    ignores = cut is LLAMA_3  # whole words that are tokens are not built from merges
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=ignores))  # pyright: ignore
    if isinstance(cut, str):
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(cut), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if cut is QWEN_2:
            backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if cut else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _byte_fallback(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise ModelError(f"its tokenizer has {len(tokens)} tokens and {len(scores)} scores.")
    if sum(len(token) ** 2 for token in tokens) > MOST_SPLITTING:
        raise ModelError("its tokenizer has tokens that are too long to be any language's.")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    usable = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for token in sorted(usable, key=lambda token: (-scores[vocabulary[token]], vocabulary[token])):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        parts = [(left, right) for left, right in splits if left in usable and right in usable]
        merges += sorted(parts, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = _token(metadata, "unknown", tokens)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if spaced else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])  # pyright: ignore
    strips = [decoders.Strip(" ", 1, 0)] if spaced else []
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strips]
    )
    return backend


def _frame(backend: Tokenizer, metadata: dict[str, Any], tokens: list[str], start_is_usual: bool) -> None:
    """Put the tokens around a text that the file wants there."""
    adds = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", start_is_usual),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    before, after = (_token(metadata, role, tokens) if adds[role] else None for role in ("bos", "eos"))
    named = [name for name in (before, after) if name is not None]
    if named:
        pieces = [*([before] if before else []), "$A", *([after] if after else [])]
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=pieces, special_tokens=[(name, backend.token_to_id(name)) for name in dict.fromkeys(named)]
        )


def _beside(folder: Path, tokens: list[str], why: str) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{why}: put the tokenizer.json of the model it was made from beside it.")
    with clear_errors(str(path)):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    own = tokenizer.get_vocab()
    odd = [token for index, token in enumerate(tokens) if own.get(token) != index]
    if odd:
        raise ModelError(f"{why}, and {path} has other tokens: {len(odd)} differ.")
    return tokenizer
