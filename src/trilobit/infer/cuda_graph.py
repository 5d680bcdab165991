"""One-token steps of a model that transformers runs, as one CUDA graph: a token is then one launch instead of a thousand.

    prompt ──model, as ever──▶ static cache ──▶ step: token in a fixed place ──graph──▶ logits in a fixed place, cache grown

The cache has room for all tokens from the start (StaticCache) and knows on the device how many there are, so that mask and
positions follow from it inside the graph. Attention reads 256 places of it, and twice as many, by another graph, whenever
these are full: a short text does not pay for the room of a long one. What sits around the model (sampling, penalties, streams)
is transformers' own.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

WARM_UPS = 3
WORTHWHILE = 16
"""Tokens from which a graph is captured: it costs some four steps."""
LEAST_READ = 256
"""Places of the cache that the first graph's attention reads."""


class GrowingLayer(StaticLayer):
    """A layer's cache of which attention reads the first `read` places."""

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len)
        self.read = max_cache_len

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **options)
        return keys[:, :, : self.read], values[:, :, : self.read]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.read, 0


def obstacle(model: PreTrainedModel, positions: int) -> str | None:
    """Why a model's steps, up to so many positions, cannot be a graph; None if they can."""
    if next(model.parameters()).device.type != "cuda":
        return "it is not on a CUDA device"
    return cache_obstacle(model, positions)


def cache_obstacle(model: PreTrainedModel, positions: int) -> str | None:
    """The same, but for the device: whether every layer keeps all of its tokens."""
    if any(type(layer) is not StaticLayer for layer in StaticCache(_unwindowed(model, positions), positions).layers):
        return "not every layer keeps all of its tokens"
    return None


def _unwindowed(model: PreTrainedModel, positions: int) -> PreTrainedConfig:
    """A window of attention that is no shorter than the text is none."""
    config = copy.deepcopy(model.config.get_text_config())
    if not getattr(config, "layer_types", None) and (getattr(config, "sliding_window", None) or 0) >= positions:
        config.sliding_window = None
    return config


class GraphedSteps:
    """A model whose forward, inside `replaced`, takes one token a row from a graph. Rows without padding alone.

    cache: to be given to `generate`, for [rows, positions] tokens. capture: False runs the same steps without a graph.
    """

    def __init__(self, model: PreTrainedModel, rows: int, positions: int, capture: bool = True):
        self.model, self.capture = model, capture
        self.cache: Any = StaticCache(_unwindowed(model, positions), positions)
        self.cache.layers = [GrowingLayer(positions) for _ in self.cache.layers]
        self.positions, self.seen, self.read = positions, 0, 0
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=next(model.parameters()).device)
        self.logits: Tensor | None = None
        self._forward, self._graph = model.forward, None

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """The model's forward with steps by the graph while the block runs."""
        self.model.forward = self._call  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            del self.model.forward

    def _call(self, input_ids: Tensor, **inputs: Any) -> Any:
        if inputs.get("past_key_values") is not self.cache:
            return self._forward(input_ids=input_ids, **inputs)
        one = self.seen > 0 and input_ids.shape == self.token.shape  # else it is the prompt
        self.seen += input_ids.shape[1]
        if self.seen > self.read:
            self._read_more()
        if not one:
            return self._forward(input_ids=input_ids, **inputs)
        self.token.copy_(input_ids)
        if self.capture and self._graph is None:
            self._graph = self._captured()
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        return CausalLMOutputWithPast(logits=self.logits, past_key_values=self.cache)  # pyright: ignore[reportArgumentType]

    def _read_more(self) -> None:
        """Let attention read more places, by another graph."""
        self.read = max(LEAST_READ, self.read)
        while self.read < self.seen:
            self.read *= 2
        self.read, self._graph = min(self.read, self.positions), None
        for layer in self.cache.layers:
            layer.read = self.read

    def _step(self) -> None:
        self.logits = self._forward(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, the cache as before it; None, with a warning and no further try, for a model that waits for the
        device within a step."""
        lengths = [layer.cumulative_length.clone() for layer in self.cache.layers]
        graph = torch.cuda.CUDAGraph()
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):  # kernels are compiled and memory is found before the capture
                    self._step()
                    self._put(lengths)
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            warnings.warn(f"tokens are not taken by one CUDA graph, but one kernel after the other: {error}", stacklevel=2)
            self.capture, graph = False, None
        self._put(lengths)  # what was captured did not run
        return graph

    def _put(self, lengths: list[Tensor]) -> None:
        for layer, length in zip(self.cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)
