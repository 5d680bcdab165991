"""Statistics of one tensor of activations, batch by batch, in memory that does not grow with the text.

Letters: N tokens, W channels. Sums are float64, counts and maxima exact, so batches of any size give the same result.

Medians and histograms come from counts over the leading bits of fp32: sign, exponent and six bits of mantissa,

    |x| = 2^e · (1 + m/64 + …)        bin = bits(|x|) >> 17 = 64·(e + 127) + m

which makes 64 bins an octave, each at most 1.6 % wide, over all that fp32 can hold; a median is off by 0.8 % at most.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trilobit.measure.kurtosis import excess_kurtosis

TOP_CHANNELS = 5
BLOCK_ELEMENTS = 1 << 16  # of one tensor that are worked on at once: 0.5 MB of float64, which caches hold
MANTISSA_BITS, KEPT_BITS = 23, 6
BINS = 1 << (8 + KEPT_BITS)
STEPS = 4  # bins an octave in histograms for people
SMALLEST = 2.0**-8  # of |x|/rms in them


@dataclass(frozen=True)
class ChannelPeak:
    """A channel, its largest |x|, its share of the squared activations, and the token where it peaks: `index` counts
    through the whole text."""

    channel: int
    max_abs: float
    energy_share: float
    index: int


@dataclass(frozen=True)
class Histogram:
    """edges: [n + 1] of |x|/rms, ascending, four an octave; fractions: [n] of all activations; `below`: what is smaller than
    the first edge, zeros included."""

    edges: list[float]
    fractions: list[float]
    below: float


class Stream:
    """What is remembered of a tensor: [N, W] at a time, with the index of each token. Starts empty."""

    def __init__(self, width: int, device: torch.device):
        self.tokens = 0
        self.kurtosis = torch.zeros((), dtype=torch.float64, device=device)  # sum over tokens
        self.peaks = torch.full((width,), -1.0, device=device)
        self.where = torch.zeros(width, dtype=torch.int64, device=device)
        self.energy = torch.zeros(width, dtype=torch.float64, device=device)
        self.magnitudes = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.ratios = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, x: Tensor, index: Tensor) -> None:
        """x: [N, W] in any dtype; index: [N] int64, ascending from one call to the next. Nothing is read back to the host."""
        rows = max(1, BLOCK_ELEMENTS // x.shape[1])
        for block, places in zip(x.split(rows), index.split(rows), strict=True):
            block = block.float()
            self.tokens += len(block)
            self.kurtosis += excess_kurtosis(block).sum()
            magnitude = block.abs()
            largest, row = magnitude.max(dim=0)
            self.where.copy_(torch.where(largest > self.peaks, places[row], self.where))
            self.peaks.copy_(torch.maximum(self.peaks, largest))  # NaN stays NaN
            squares = block.double().square_()
            self.energy += squares.sum(0)
            rms = squares.mean(1, keepdim=True).sqrt_().float().clamp_min_(torch.finfo(torch.float32).tiny)
            self.magnitudes += _counts(magnitude)
            self.ratios += _counts(magnitude.div_(rms))

    def mean_kurtosis(self) -> float:
        """Mean excess kurtosis over tokens."""
        return self.kurtosis.item() / self.tokens

    def max_to_median(self) -> float | None:
        """max |x| / median |x|; None where at least half of the activations are zero."""
        median = _median(self.magnitudes)
        return self.peaks.max().item() / median if median > 0 else None

    def channels(self) -> list[ChannelPeak]:
        """The channels with the largest |x|, largest first."""
        total = self.energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        peaks, channels = self.peaks.topk(min(TOP_CHANNELS, len(self.peaks)))
        rows = zip(channels.tolist(), peaks.tolist(), (self.energy / total)[channels].tolist(), strict=True)
        return [ChannelPeak(channel, peak, share, int(self.where[channel])) for channel, peak, share in rows]


def _counts(magnitude: Tensor) -> Tensor:
    """Activations per bin of their leading bits, [BINS] int64. magnitude: fp32, not negative, contiguous."""
    bins = (magnitude.flatten().view(torch.int32) >> (MANTISSA_BITS - KEPT_BITS)) & (BINS - 1)  # the sign of a NaN
    return torch.bincount(bins, minlength=BINS)


def _edge(position: int) -> float:
    """The smallest number in a bin: its bits, with zeros after them."""
    bits = torch.tensor(position << (MANTISSA_BITS - KEPT_BITS), dtype=torch.int32)
    return bits.view(torch.float32).item()


def _median(counts: Tensor) -> float:
    """The middle of the bin that holds the lower median; 0 where that is zero or not a normal number."""
    cumulative = counts.cumsum(0)
    position = int((cumulative >= (cumulative[-1] + 1) // 2).to(torch.int8).argmax())
    return 0.0 if position < 1 << KEPT_BITS else (_edge(position) + _edge(position + 1)) / 2


def histogram(ratios: Tensor) -> Histogram:
    """Bins for people of summed `Stream.ratios`, [BINS]: from 2⁻⁸ to the largest that occurs."""
    per_bin = (1 << KEPT_BITS) // STEPS
    coarse = ratios.view(-1, per_bin).sum(1).double().cpu() / ratios.sum().cpu()
    first = (127 + round(torch.tensor(SMALLEST).log2().item())) * STEPS
    last = max(first, int(coarse.nonzero().max())) + 1
    edges = [_edge(position * per_bin) for position in range(first, last + 1)]
    assert all(low < high for low, high in pairwise(edges)), edges
    return Histogram(edges, coarse[first:last].tolist(), coarse[:first].sum().item())
