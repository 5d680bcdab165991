"""Protocol `contextual`: outliers of activations while a model reads whole sequences, site by site.

Everything is reported apart for the first position, where attention sinks put their massive activations (arXiv
2309.17453, 2402.17762), and for the later ones.

    headline       mean over layers of the residual stream's excess kurtosis at later positions
    max / median   of |x| over all channels and tokens of a site: a channel that dwarfs the others
    sink share     the fraction of their attention that later positions give to the first

Letters: N sequences, T positions, W channels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.listener import SILENT, Listener
from trilobit.measure.probes import SITES, Probe, SiteName, find_probes, watched
from trilobit.measure.sinks import sink_shares
from trilobit.measure.stream import Histogram, Stream, histogram
from trilobit.surgery.roles import evaluating


@dataclass(frozen=True)
class Channel:
    """A channel with its largest |x|, its share of the squared activations, and the token at which it peaks."""

    channel: int
    max_abs: float
    energy_share: float
    token: str
    sequence: int
    position: int


@dataclass(frozen=True)
class Positions:
    """Statistics over some positions of all sequences. max_to_median: max |x| / median |x|, None where the median is 0."""

    tokens: int
    excess_kurtosis: float
    max_abs: float
    max_to_median: float | None
    channels: list[Channel]


@dataclass(frozen=True)
class SiteOutliers:
    """One site of one layer: the first position of each sequence apart from the later ones. module: the first to read it."""

    layer: int | None
    site: SiteName
    module: str
    width: int
    later: Positions
    first: Positions


@dataclass(frozen=True)
class Contextual:
    """Sequences as they are read. sink_share: by layer, None for a layer that gives no attention weights. histograms:
    |x|/rms of each token, by site, over all layers and later positions. unwatched: why the sites inside the layers are missing,
    if they are."""

    excess_kurtosis: float
    first_excess_kurtosis: float
    sink_share: list[float | None] | None
    sites: list[SiteOutliers]
    histograms: dict[SiteName, Histogram]
    tokens: int
    windows: int
    sequence_length: int
    bos: bool
    unwatched: str = ""

    def at(self, layer: int | None, site: SiteName) -> SiteOutliers | None:
        return next((row for row in self.sites if (row.layer, row.site) == (layer, site)), None)

    def extremes(self) -> list[tuple[SiteOutliers, str, Positions]]:
        """For each site the layer with the largest max / median, at later positions and at the first."""
        rows = []
        for site in (site for site in SITES if site in self.histograms):
            for where in ("later", "first"):
                members = [(row, where, getattr(row, where)) for row in self.sites if row.site == site]
                rows.append(max(members, key=lambda member: member[2].max_to_median or 0.0))
        return rows


def measure_contextual(
    model: PreTrainedModel, windows: Tensor, decode: Callable[[int], str], *, sequences: int = 4, bos: bool = False,
    listener: Listener = SILENT,
) -> Contextual:  # fmt: skip
    """Watch `model` read windows [N, T], `sequences` at a time. Raises ModelError naming layer and site of what is not finite.

    decode: token id → text. The model is left as it was.
    """
    probes, unwatched = find_probes(model)
    start, device = time.perf_counter(), next(model.parameters()).device
    streams: dict[Probe, tuple[Stream, Stream]] = {}
    indices = torch.arange(windows.numel(), device=device).view(windows.shape)

    def begin(probe: Probe, x: Tensor) -> None:
        streams[probe] = (Stream(x.shape[-1], device), Stream(x.shape[-1], device))

    with evaluating(model):
        with watched(model, probes, begin):  # before there are large tensors, between which what stays would hold their memory
            model.base_model(input_ids=windows[:1, :1].to(device), use_cache=False)
        for batch, index in zip(windows.split(sequences), indices.split(sequences), strict=True):

            def see(probe: Probe, x: Tensor, index: Tensor = index) -> None:
                x = x.reshape(*index.shape, -1)  # OPT flattens batch and time
                first, later = streams[probe]
                first.add(x[:, 0], index[:, 0])
                later.add(x[:, 1:].flatten(0, 1), index[:, 1:].flatten())

            with watched(model, probes, see):
                model.base_model(input_ids=batch.to(device), use_cache=False)
            _require_finite(streams)
            done = int(index[-1, -1]) + 1
            listener.progress("Measuring tokens", done, windows.numel(), time.perf_counter() - start)
        shares = sink_shares(model, windows)

    def positions(stream: Stream) -> Positions:
        channels = []
        for peak in stream.channels():
            sequence, position = divmod(peak.index, windows.shape[1])
            place = (decode(int(windows[sequence, position])), sequence, position)
            channels.append(Channel(peak.channel, peak.max_abs, peak.energy_share, *place))
        return Positions(stream.tokens, stream.mean_kurtosis(), channels[0].max_abs, stream.max_to_median(), channels)

    rows: list[SiteOutliers] = []
    ratios: dict[SiteName, Tensor] = {}
    for probe, (first, later) in streams.items():
        width = len(later.peaks)
        rows.append(SiteOutliers(probe.layer, probe.site, probe.module, width, positions(later), positions(first)))
        ratios[probe.site] = ratios[probe.site] + later.ratios if probe.site in ratios else later.ratios
    residual = [row for row in rows if row.site == "residual"]
    return Contextual(
        excess_kurtosis=sum(row.later.excess_kurtosis for row in residual) / len(residual),
        first_excess_kurtosis=sum(row.first.excess_kurtosis for row in residual) / len(residual),
        sink_share=shares,
        sites=rows,
        histograms={site: histogram(counts) for site, counts in ratios.items()},
        tokens=windows.numel(),
        windows=len(windows),
        sequence_length=windows.shape[1],
        bos=bos,
        unwatched=unwatched,
    )


def _require_finite(streams: dict[Probe, tuple[Stream, Stream]]) -> None:
    sums = torch.stack([first.kurtosis + later.kurtosis for first, later in streams.values()])
    broken = (~sums.isfinite()).nonzero().flatten().tolist()
    if broken:
        probe = list(streams)[broken[0]]
        where = probe.site if probe.layer is None else f"layer {probe.layer}, {probe.site}"
        raise ModelError(f"activations are not finite, first at {where}: the model's weights are damaged, or overflow.")
