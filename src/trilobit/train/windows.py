"""Windows of a token array, in an order that depends on (seed, step) alone.

Sample i of training is window P_e(i mod n) of n, where e = i div n is the epoch and P_e a permutation computed, not
stored: a Feistel network on the smallest 2^(2h) >= n, walked along its cycle until it lands below n (Black & Rogaway,
"Ciphers with arbitrary finite domains", 2002). Any sample is found in O(1), so resuming needs no state, and the order
does not know how many ranks or micro-batches share the work.
"""

import numpy as np
import torch
from torch import Tensor

from trilobit.errors import DataError

FEISTEL_ROUNDS = 8


class Windows:
    """Non-overlapping windows of `tokens`, shuffled anew in every epoch.

    Window k is tokens[k·length : k·length + length + 1]: inputs are w[:-1], targets w[1:], and each token but the first
    is a target once. The last, incomplete window is never seen.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self.count = _window_count(tokens, length)
        self.length, self._tokens, self._seed = length, tokens, seed

    def samples(self, start: int, number: int) -> Tensor:
        """Samples start … start + number − 1, counted from the beginning of training: int64 [number, length + 1]."""
        return _take(self._tokens, self.order(start, number), self.length)

    def order(self, start: int, number: int) -> np.ndarray:
        """Which window each of these samples is: int64 [number], each in [0, count)."""
        sample = np.arange(start, start + number, dtype=np.uint64)
        epoch, x = np.divmod(sample, np.uint64(self.count))
        half = np.uint64(max(1, ((self.count - 1).bit_length() + 1) // 2))
        epoch_key = _mix(epoch + _mix(np.array([self._seed % 2**64], dtype=np.uint64)))
        keys = [_mix(epoch_key + np.uint64(r)) for r in range(FEISTEL_ROUNDS)]
        x = _feistel(x, keys, half)
        while (outside := x >= self.count).any():
            x[outside] = _feistel(x[outside], [key[outside] for key in keys], half)
        return x.astype(np.int64)


def evaluation_windows(tokens: np.ndarray, length: int, limit_tokens: int) -> Tensor:
    """At most `limit_tokens` targets (one window at least) in windows spread evenly: int64 [N, length + 1]."""
    count = _window_count(tokens, length)
    number = min(count, max(1, limit_tokens // length))
    return _take(tokens, np.arange(number, dtype=np.int64) * count // number, length)


def _window_count(tokens: np.ndarray, length: int) -> int:
    if len(tokens) < length + 1:
        raise DataError(
            f"there are {len(tokens):,} tokens, but one window of --sequence-length {length} needs {length + 1:,}: "
            "give more text or a shorter --sequence-length."
        )
    return (len(tokens) - 1) // length


def _take(tokens: np.ndarray, windows: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(tokens[windows[:, None] * length + np.arange(length + 1)].astype(np.int64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of uint64."""
    x = x + np.uint64(0x9E37_79B9_7F4A_7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, keys: list[np.ndarray], half: np.uint64) -> np.ndarray:
    """A permutation of [0, 2^(2·half)): (L, R) → (R, L ⊕ F(R, key)) per key. A permutation whatever F is."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right
