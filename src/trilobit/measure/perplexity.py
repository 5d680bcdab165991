"""Perplexity and bits per byte, with every knob stated: windows, beginning-of-text, what is counted.

The text is tokenised whole and cut into windows of W tokens that do not overlap; each window predicts all of its tokens
but the first. With a beginning-of-text token each window holds that and W − 1 tokens of text, all of them predicted.

    perplexity = exp(nats / tokens)        bits per byte = nats / ln 2 / bytes of the predicted text

Models differ in whether they need the token (Gemma without it: 74 instead of 27), so `auto` does what the model's own
tokenizer does when it encodes a text.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilobit.config.eval import EvalConfig
from trilobit.corpus import documents
from trilobit.errors import DataError, ModelError
from trilobit.infer.loaded import Loaded
from trilobit.listener import SILENT, Listener
from trilobit.surgery.roles import vocabulary_size

BLOCK_ELEMENTS = 1 << 24  # of logits that are fp32 at once: 64 MB


@dataclass(frozen=True)
class Perplexity:
    """What was measured, and how."""

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    windows: int
    sequence_length: int
    bos: bool


@torch.no_grad()
def nats(
    model: torch.nn.Module, windows: Tensor, sequences: int, precision: str = "fp32", listener: Listener = SILENT
) -> tuple[float, int]:
    """Total nats and number of predicted tokens. windows: [N, W + 1] holds W inputs and, shifted, W targets each."""
    start = time.perf_counter()
    device = next(iter(model.parameters()), windows).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in windows.split(sequences):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += _sum_nats(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
        count += batch[:, 1:].numel()
        listener.progress("Measuring tokens", count, windows[:, 1:].numel(), time.perf_counter() - start)
    model.train(training)
    return total, count


def perplexity(nats_per_token: float) -> float:
    """exp(nats), held at the largest power that a float can hold: a broken model is a large number, not a crash."""
    return math.exp(min(nats_per_token, 700.0))


def _sum_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of nats in float64. logits: [N, V] in any dtype, made fp32 a block of rows at a time; targets: [N]."""
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    blocks = zip(logits.split(rows), targets.split(rows), strict=True)
    parts = [F.cross_entropy(block.float(), labels, reduction="sum").double() for block, labels in blocks]
    return torch.stack(parts).sum()


def text_windows(
    texts: Iterable[str], tokenizer: Any, length: int, bos: bool, limit: int | None = None, flag: str = "--sequence-length"
) -> tuple[Tensor, Tensor]:
    """Windows [N, length] of the joined text and the bytes [N] of what each predicts; N ≤ limit, if given.

    Documents are separated by the end-of-text token when there are several, and read only as far as the limit needs (a
    stream has no end). Raises DataError if the text is too short.
    """
    own = length - 1 if bos else length
    ids: list[int] = []
    ends: list[int] = []  # bytes of text before the end of each token
    done = 0
    for text in texts:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            ends.append(done)
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        position = [0]
        for character in text:
            position.append(position[-1] + len(character.encode("utf-8", "surrogatepass")))
        ids.extend(encoding.ids)
        ends.extend(done + position[end] for _, end in encoding.offsets)
        done += position[-1]
        if limit is not None and len(ids) >= limit * own:
            break
    count = len(ids) // own if limit is None else min(limit, len(ids) // own)
    if count == 0:
        raise DataError(f"the text has {len(ids)} tokens, fewer than one window of {own}. Lower {flag}.")
    windows = torch.tensor(ids[: count * own], dtype=torch.int64).view(count, own)
    boundary = torch.tensor([0, *ends[: count * own]], dtype=torch.int64)
    starts = torch.arange(count) * own
    sizes = boundary[starts + own] - boundary[starts + (0 if bos else 1)]
    if bos:
        windows = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1)
    return windows, sizes


def uses_bos(tokenizer: Any, choice: str) -> bool:
    """Whether windows begin with the beginning-of-text token. Raises ModelError for `yes` without such a token."""
    if choice == "auto":
        ids = tokenizer("a")["input_ids"]
        return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    if choice == "yes" and tokenizer.bos_token_id is None:
        raise ModelError("--bos yes: this tokenizer has no beginning-of-text token.")
    return choice == "yes"


def require_positions(model: Any, length: int, flag: str = "--sequence-length") -> None:
    """Raise ModelError if the model has fewer positions than `length`."""
    if (most := fitting(model, length)) < length:
        raise ModelError(f"{flag} {length} is longer than the model's {most} positions: give {flag} {most}, or less.")


def fitting(model: Any, length: int) -> int:
    """`length`, or the model's positions where it has fewer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if positions is None else min(length, positions)


@dataclass(frozen=True)
class Text:
    """What is measured on: windows [N, W], the bytes [N] of what each predicts, and whether they begin with a token."""

    windows: Tensor
    sizes: Tensor
    bos: bool


def read(loaded: Loaded, config: EvalConfig) -> Text:
    """The text of --data as windows for this model. Raises DataError and ModelError."""
    assert config.data is not None
    split = "heldout" if config.data == "stdlib" else None
    texts = (document.text for document in documents(config.data, text_field=config.text_field, split=split))
    require_positions(loaded.model, config.sequence_length)
    bos = uses_bos(loaded.tokenizer, config.bos)
    limit = None if config.max_tokens is None else max(1, config.max_tokens // (config.sequence_length - 1))
    windows, sizes = text_windows(texts, loaded.tokenizer, config.sequence_length, bos, limit)
    if int(windows.max()) >= vocabulary_size(loaded.model):
        raise ModelError(f"the text has token {int(windows.max())}, beyond the model's embedding.")
    return Text(windows, sizes, bos)


def measure(loaded: Loaded, config: EvalConfig, listener: Listener = SILENT, text: Text | None = None) -> Perplexity:
    """The text part of `trilobit eval`; `text` saves reading it again. Raises DataError and ModelError."""
    text = read(loaded, config) if text is None else text
    total, tokens = nats(loaded.model, text.windows, config.sequences, config.precision, listener)
    if not math.isfinite(total):
        raise ModelError(f"{config.model} has a loss of {total} on this text: its weights are damaged, or overflow.")
    return Perplexity(
        perplexity=perplexity(total / tokens),
        nats_per_token=total / tokens,
        bits_per_byte=total / math.log(2) / int(text.sizes.sum()),
        tokens=tokens,
        windows=len(text.windows),
        sequence_length=config.sequence_length,
        bos=text.bos,
    )
