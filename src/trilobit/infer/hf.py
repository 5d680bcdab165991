"""Text through transformers: continue tokens; and sample from a model what another is tuned on.

The engine's way to text is infer/engine.py; `trilobit generate` takes either (infer/generate.py).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import TextStreamer

from trilobit.errors import ModelError
from trilobit.infer.cuda_graph import WORTHWHILE, GraphedSteps, obstacle
from trilobit.infer.engine import end_tokens


@torch.no_grad()
def continue_tokens(
    model: PreTrainedModel, inputs: torch.Tensor, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, streamer: TextStreamer | None = None, ends: bool = True, top_k: int = 0, min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """[B, T] token ids → [B, T + up to max_tokens]. Temperature 0 takes the likeliest token; rows end with end-of-text, or
    where not `ends`, only with the last token.

    Of the checkpoint's generation_config.json only the end-of-text tokens count: its penalties and cut-offs would make the
    text another distribution than the model's.
    """
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p or None}
    if repetition_penalty != 1:
        options["repetition_penalty"] = repetition_penalty
    stops = end_tokens(model) if ends else []
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=stops[0] if stops else None)
    try:
        return _generate(model, inputs, max_tokens, seed, streamer, options)
    finally:
        model.generation_config = own


def _refuse_damage(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """As a logits processor: scores that are no numbers give no token. (−inf is what sampling cuts off.)"""
    if (scores.isnan() | scores.isposinf()).any():
        raise ModelError("the model gives logits that are not finite: its weights are damaged, or overflow.")
    return scores


def _generate(
    model: PreTrainedModel, inputs: torch.Tensor, max_tokens: int, seed: int, streamer: TextStreamer | None, options: dict
) -> torch.Tensor:
    steps, positions = None, inputs.shape[1] + max_tokens
    if max_tokens >= WORTHWHILE and obstacle(model, positions) is None:
        steps = GraphedSteps(model, len(inputs), positions)
        options = {**options, "past_key_values": steps.cache, "disable_compile": True}
    drawn_on = [inputs.device] if inputs.device.type == "cuda" else []
    with steps.replaced() if steps else nullcontext(), torch.random.fork_rng(devices=drawn_on):
        torch.manual_seed(seed)
        output = model.generate(  # pyright: ignore[reportCallIssue]
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, streamer=streamer,
            logits_processor=LogitsProcessorList([_refuse_damage]), **options,
        )  # fmt: skip
    assert isinstance(output, torch.Tensor)
    return output


SAMPLING_CACHE_BYTES = 1 << 30
CHAINED = 16  # windows of a chain at least, at most four times as many


def _cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values a token takes, in the model's dtype."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


def sample_windows(
    model: PreTrainedModel, start_token: int, tokens: int, length: int, seed: int, rows: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield text sampled from the model itself at temperature 1, without end, for windows of `length` tokens to be read from.

    Window k of what is yielded, tokens k·length to (k + 1)·length, is sampled given its own first token alone, as it will be
    read: the model's loss on it is the entropy of what it samples, and another model's loss above that is a KL divergence.
    (Documents cut into windows would be read without the beginnings they were sampled after; the model itself can then be
    trained to a lower loss on its own text.) Each array is a chain of windows, the last token of one the first of the next.
    It begins with `start_token`, which stands where the last target of the chain before it would: one token of a chain was
    not sampled. Texts run on after an end-of-text token, as in packed training data.

    tokens: about how many will be taken, which decides how long chains are. `rows` are sampled at once: by default, as many
    as keep the keys and values in 1 GB, 256 at most, and fewer where chains would become short. `between` is called after
    each row of windows.
    """
    model.eval()
    most = max(8, min(256, SAMPLING_CACHE_BYTES // (length * _cache_bytes(model))))
    rows = rows or max(2, min(most, tokens // (CHAINED * length)))  # few rows rather than short chains
    windows = max(CHAINED, math.ceil(tokens / (rows * length)) + 1)  # one more: held-out and training parts are whole chains
    windows = min(windows, 4 * CHAINED)
    while True:
        last = torch.full((rows, 1), start_token, device=next(model.parameters()).device)
        parts = [last]
        for _ in range(windows):
            parts.append(continue_tokens(model, last, length, temperature=1.0, seed=seed, ends=False)[:, 1:])
            last, seed = parts[-1][:, -1:], seed + 1
            between()
        yield from torch.cat(parts, dim=1)[:, :-1].cpu().numpy()
