"""Excess kurtosis of activations over channels, by our definition and by the one of outlier-safe pre-training.

    contextual:  mean((x − mean x)⁴) / mean((x − mean x)²)² − 3        population moments in float64
    osp:         relu(mean(x⁴) / std(x)⁴ − 3)                          x not centred; std centred and unbiased; fp32

Both are 0 for a Gaussian; where one of W channels holds everything, W − 5 + 1/(W − 1) and W − 3. `osp` follows
evaluate_kurtosis.py of the authors (arXiv 2506.19697) to the letter: the text is documents joined by blank lines, tokenised
whole; x are the `hidden_states` that transformers returns (embeddings, residual stream after each layer, the last after the
final norm); the mean goes over tokens, then over states and sequences. And it hands `seq.unsqueeze(1)` to the model, which
makes a sequence of 2,048 tokens 2,048 sequences of one: every token is measured at position 0, without a context.

A token alone gives the same states wherever it comes from, so each distinct token is run once here and counted as often
as it occurs; the mean is the same to rounding. Their model is in bf16 (`--precision bf16`).
"""

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.errors import DataError, ModelError
from trilobit.listener import SILENT, Listener
from trilobit.surgery.roles import decoder_layers, evaluating

DOCUMENTS = 1000  # the authors' script reads no more
STATE_ELEMENTS = 1 << 25  # of hidden states that are kept at once: 128 MB of fp32


@dataclass(frozen=True)
class OspKurtosis:
    """What the authors' script prints, and its parts. states: [layers + 1], embeddings first, after the final norm last."""

    excess_kurtosis: float
    states: list[float]
    tokens: int
    windows: int
    sequence_length: int
    bos: bool


def excess_kurtosis(x: Tensor) -> Tensor:
    """Population excess kurtosis over channels. x: [..., W] → [...] float64; 0 where all channels are equal."""
    x = x.double()
    squares = (x - x.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1)
    return torch.where(variance == 0, 0.0, squares.square_().mean(-1) / variance.square() - 3)


def osp_kurtosis(x: Tensor) -> Tensor:
    """The authors' measure of each token. x: [..., W] → [...] fp32."""
    x = x.float()
    return ((x**4).mean(-1) / x.std(-1) ** 4 - 3).relu()


def osp_windows(texts: Iterable[str], tokenizer: Any, length: int, bos: bool, limit: int) -> Tensor:
    """The first `limit` windows [N, length] of the text, each document followed by a blank line. bos: begin the text with
    the beginning-of-text token. Raises DataError if the text is too short for one."""
    whole, ids = "", []
    enough = 4 * length * limit  # characters: more are read where they give too few tokens
    for text in itertools.islice(texts, DOCUMENTS):
        whole += text + "\n\n"
        if len(whole) > enough:
            ids = _encode(whole, tokenizer, bos)
            if len(ids) > length * (limit + 1):  # the last tokens may depend on what would follow
                break
            enough = 2 * len(whole)
    else:
        ids = _encode(whole, tokenizer, bos)
    count = min(limit, len(ids) // length)
    if count == 0:
        raise DataError(f"the text has {len(ids)} tokens, fewer than one sequence of {length}. Lower --sequence-length.")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _encode(text: str, tokenizer: Any, bos: bool) -> list[int]:
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return [tokenizer.bos_token_id, *ids] if bos else ids


def measure_osp(model: PreTrainedModel, windows: Tensor, bos: bool, listener: Listener = SILENT) -> OspKurtosis:
    """The authors' excess kurtosis of `model` on windows [N, T]. Raises ModelError without hidden states, and naming the
    state that is not finite."""
    tokens, counts = windows.flatten().unique(return_counts=True)
    device, start, layers = next(model.parameters()).device, time.perf_counter(), len(decoder_layers(model))
    width = getattr(model.config.get_text_config(), "hidden_size", 1 << 14)
    batch = max(1, STATE_ELEMENTS // ((layers + 1) * width))
    sums: Tensor | None = None
    done = 0
    with evaluating(model):
        for alone, weights in zip(tokens.split(batch), counts.split(batch), strict=True):
            values = torch.stack([osp_kurtosis(state)[:, 0] for state in _states(model, alone[:, None].to(device))])
            part = values.double() @ weights.double().to(device)
            _require_finite(part, layers)
            sums = part if sums is None else sums + part
            done += len(alone)
            listener.progress("Measuring distinct tokens", done, len(tokens), time.perf_counter() - start)
    assert sums is not None
    states = (sums / windows.numel()).tolist()
    return OspKurtosis(sum(states) / len(states), states, windows.numel(), len(windows), windows.shape[1], bos)


def _states(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, ...]:
    """hidden_states of tokens [N, 1], each [N, 1, D]. The base model has them: logits are not needed."""
    output = model.base_model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    if not (states := getattr(output, "hidden_states", None)):
        raise ModelError(f"{type(model).__name__} gives no hidden states, so its outliers cannot be measured.")
    return states


def _require_finite(states: Tensor, layers: int) -> None:
    broken = (~states.isfinite()).nonzero().flatten().tolist()
    if broken:
        where = f"layer {broken[0] - 1}" if broken[0] else "embedding"
        where = "final norm" if 0 < broken[0] == layers else where
        raise ModelError(
            f"the excess kurtosis of the {where}'s output is not finite: the model's weights are damaged, its activations "
            "overflow, or a token's are all equal."
        )
