"""Quantisation as the papers write it, group by group in float64: the oracle of fourbit/.

Independent of the package: a whole Llama with its own norms, RoPE, attention, search, GPTQ (by eliminating the inverse
Hessian, no Cholesky) and Hadamard (signs by parity), so that a cell of the table has a second implementation.
"""

import math
from typing import Any

import numpy as np


def levels(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def fake(x: Any, scale: float, zero: float, bits: int, symmetric: bool) -> Any:
    """Numbers of one group; numpy rounds half to even."""
    return (np.clip(np.round(x / scale) + zero, *levels(bits, symmetric)) - zero) * scale


def range_scale(values: Any, bits: int, symmetric: bool, clip: float, zero_inside: bool) -> tuple[float, float]:
    """Scale and zero point of one group of numbers."""
    low, high = float(np.min(values)), float(np.max(values))
    top = levels(bits, symmetric)[1]
    if symmetric:
        return max(abs(low), abs(high)) * clip / top or 1.0, 0.0
    if zero_inside:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) * clip / top or abs(low * clip) or 1.0  # a group of one value is that value
    return scale, float(np.round(-low * clip / scale))


def activation(
    x: Any, bits: int, symmetric: bool = False, clip: float = 1.0, group: int | None = None, inside: bool = True
) -> Any:
    """Rows [N, K], each (or each group of a row) on its own grid."""
    result = np.array(x, dtype=np.float64)
    for row in result:
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            scale, zero = range_scale(part, bits, symmetric, clip, inside)
            part[:] = fake(part, scale, zero, bits, symmetric)
    return result


def weight_scale(
    row: Any, bits: int, symmetric: bool = True, grid: int = 100, shrink: float = 0.8, norm: float = 2.4, inside: bool = True
) -> Any:
    """Scale and zero point of one row: the share of its range with the least error."""
    best, least = (1.0, 0.0), math.inf
    for i in range(int(shrink * grid)):
        scale, zero = range_scale(row, bits, symmetric, 1 - i / grid, inside)
        error = (abs(fake(row, scale, zero, bits, symmetric) - row) ** norm).sum()
        if error < least:
            best, least = (scale, zero), error
    return best


def weight(matrix: Any, bits: int, symmetric: bool = True) -> Any:
    rows = []
    for row in np.asarray(matrix, dtype=np.float64):
        scale, zero = weight_scale(row, bits, symmetric)
        rows.append(fake(row, scale, zero, bits, symmetric))
    return np.array(rows)


def gptq(matrix: Any, moment: Any, bits: int, damping: float = 0.01, group: int | None = None) -> Any:
    """Optimal brain surgery, column by column: the remaining weights move by −e · H⁻¹_j: / H⁻¹_jj, then row and column j are
    eliminated from H⁻¹. group: columns with a scale of their own, of what they are when the first of them has its turn."""
    matrix, moment = np.array(matrix, dtype=np.float64), np.array(moment, dtype=np.float64)
    for j in range(len(moment)):
        if moment[j, j] == 0:
            moment[j, j], matrix[:, j] = 1, 0
    inverse = np.linalg.inv(moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment)))
    grids = [weight_scale(row, bits) for row in matrix]
    result = np.zeros_like(matrix)
    for j in range(len(moment)):
        if group is not None and j % group == 0:
            grids = [weight_scale(row[j : j + group], bits) for row in matrix]
        result[:, j] = [fake(w, scale, zero, bits, True) for w, (scale, zero) in zip(matrix[:, j], grids, strict=True)]
        error = (matrix[:, j] - result[:, j]) / inverse[j, j]
        matrix -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


def sylvester(width: int) -> Any:
    """Orthonormal, of a power of two: the sign is the parity of the bits that i and j share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return np.array(signs, dtype=np.float64) / math.sqrt(width)


def rms_norm(x: Any, gain: Any, eps: float) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def rope(x: Any, theta: float) -> Any:
    """[T, H, d]: the first half of the channels turned against the second."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class Llama:
    """A Llama in numpy that computes with fake-quantised weights, activations, keys and values, as SpinQuant's code does.

    symmetric, clip: of activations. by_head: o_proj's input in groups of a head.
    """

    def __init__(
        self, model: Any, bits: tuple[int, int, int], *, symmetric: bool = False, clip: float = 1.0, cache_clip: float = 1.0,
        by_head: bool = True,
    ):  # fmt: skip
        self.config, self.bits, self.by_head = model.config, bits, by_head
        self.symmetric, self.clip, self.cache_clip = symmetric, clip, cache_clip
        self.w = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
        self.layers = range(self.config.num_hidden_layers)
        self.width = self.config.hidden_size // self.config.num_attention_heads
        self.ffn, self.heads = np.eye(self.config.intermediate_size), np.eye(self.config.hidden_size)
        self.seen: dict[str, Any] = {}

    def turn_online(self, ffn: Any, across_heads: bool) -> None:
        """What down_proj reads is turned, and what o_proj reads, across heads."""
        self.ffn = ffn
        if across_heads:
            self.heads = np.kron(sylvester(self.config.num_attention_heads), np.eye(self.width))
        for i in self.layers:
            self.w[f"model.layers.{i}.mlp.down_proj.weight"] @= self.ffn
            self.w[f"model.layers.{i}.self_attn.o_proj.weight"] @= self.heads

    def rotate(self, turn: Any, by_head: Any) -> None:
        """The residual stream x becomes x R; values of each head v R₂. Gains go into what reads them. Before all else."""
        w = self.w
        w.setdefault("lm_head.weight", w["model.embed_tokens.weight"])
        w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"] @ turn
        w["lm_head.weight"] = w["lm_head.weight"] * w["model.norm.weight"] @ turn
        w["model.norm.weight"] = np.ones(len(turn))
        for layer in self.layers:
            place = f"model.layers.{layer}"
            (q, k, v), (o,), (gate, up), (down,) = self.linears(layer)
            for norm, readers in (("input_layernorm", (q, k, v)), ("post_attention_layernorm", (gate, up))):
                for name in readers:
                    w[name] = w[name] * w[f"{place}.{norm}.weight"] @ turn
                w[f"{place}.{norm}.weight"] = np.ones(len(turn))
            for name in (o, down):
                w[name] = turn.T @ w[name]
            values, reads = len(w[v]) // self.width, self.config.num_attention_heads
            w[v] = np.kron(np.eye(values), by_head).T @ w[v]
            w[o] = w[o] @ np.kron(np.eye(reads), by_head)

    def linears(self, layer: int) -> list[list[str]]:
        """By input, in running order."""
        names = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
        part = ["self_attn", "self_attn", "mlp", "mlp"]
        return [[f"model.layers.{layer}.{p}.{n}.weight" for n in group] for p, group in zip(part, names, strict=True)]

    def round_weights(self) -> None:
        for layer in self.layers:
            for group in self.linears(layer):
                for name in group:
                    self.w[name] = weight(self.w[name], self.bits[0])

    def gptq_weights(self, sequences: Any) -> None:
        """In running order, each on what is quantised before it, activations and cache in full."""
        full = self.bits
        self.bits = (16, 16, 16)
        for layer in self.layers:
            for group in self.linears(layer):
                moment = 0
                for tokens in sequences:
                    self.logits(tokens)
                    moment = moment + self.seen[group[0]].T @ self.seen[group[0]]
                for name in group:
                    self.w[name] = gptq(self.w[name], moment, full[0])
        self.bits = full

    def linear(self, x: Any, name: str, group: int | None = None) -> Any:
        self.seen[name] = x
        if self.bits[1] < 16:
            x = activation(x, self.bits[1], self.symmetric, self.clip, group, group is None)
        return x @ self.w[name].T

    def attention(self, x: Any, layer: int) -> Any:
        c, ((q, k, v), (o,), *_) = self.config, self.linears(layer)
        width = self.width
        q, k, v = (self.linear(x, name).reshape(len(x), -1, width) for name in (q, k, v))
        theta = c.rope_parameters["rope_theta"]
        q, k = rope(q, theta), rope(k, theta)
        if self.bits[2] < 16:
            turn = sylvester(width)
            q, k = q @ turn, k @ turn
            clip = self.cache_clip
            k = activation(k.reshape(-1, width), self.bits[2], clip=clip).reshape(k.shape)
            v = activation(v.reshape(-1, width), self.bits[2], clip=clip, inside=False).reshape(v.shape)
        share, mask = q.shape[1] // k.shape[1], np.triu(np.full((len(x), len(x)), -np.inf), 1)
        heads = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // share].T / math.sqrt(width) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head // share])
        x = np.concatenate(heads, -1)
        return self.linear(x @ self.heads, o, group=width if self.by_head else None)

    def mlp(self, x: Any, layer: int) -> Any:
        *_, (gate, up), (down,) = self.linears(layer)
        gate, up = self.linear(x, gate), self.linear(x, up)
        x = gate / (1 + np.exp(-gate)) * up
        return self.linear(x @ self.ffn, down)

    def logits(self, tokens: Any) -> Any:
        """[T] → [T, V]."""
        eps, x = self.config.rms_norm_eps, self.w["model.embed_tokens.weight"][np.asarray(tokens)]
        for layer in self.layers:
            place = f"model.layers.{layer}"
            x = x + self.attention(rms_norm(x, self.w[f"{place}.input_layernorm.weight"], eps), layer)
            x = x + self.mlp(rms_norm(x, self.w[f"{place}.post_attention_layernorm.weight"], eps), layer)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return rms_norm(x, self.w["model.norm.weight"], eps) @ head.T

    def nats(self, sequences: Any) -> float:
        """Per token, each sequence predicting all of its tokens but the first."""
        total = count = 0.0
        for tokens in np.asarray(sequences):
            logits = self.logits(tokens[:-1])
            logits -= logits.max(-1, keepdims=True)
            chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
            total += (np.log(np.exp(logits).sum(-1)) - chosen).sum()
            count += len(tokens) - 1
        return total / count
