"""What `trilobit outliers` finds: its numbers by either protocol (contextual.py, kurtosis.py), and their tables.

Kurtosis predicts the loss at 4 bits poorly across optimizers (arXiv 2509.23500): measure that beside it.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from trilobit.config.outliers import OutliersConfig, Protocol
from trilobit.corpus import documents
from trilobit.errors import ModelError
from trilobit.infer.loaded import Loaded
from trilobit.listener import SILENT, Listener
from trilobit.measure.contextual import Contextual, measure_contextual
from trilobit.measure.kurtosis import OspKurtosis, measure_osp, osp_windows
from trilobit.measure.perplexity import require_positions, text_windows, uses_bos
from trilobit.measure.probes import SITES, SiteName
from trilobit.surgery.roles import vocabulary_size

TITLE = "excess kurtosis over channels, by site, at positions after the first | residual stream, also at the first position"
SOME, STRONG = 1.0, 10.0
"""Excess kurtosis from which outliers are spoken of, and spoken of as strong: a convention of ours. (Laplace's has 3.)"""


@dataclass(frozen=True)
class OutliersResult:
    """What was measured, and how; None is what was not asked for. excess_kurtosis: of the chosen protocol, contextual if
    both. out: the directory of the report."""

    model: str
    data: str
    protocol: str
    precision: str
    excess_kurtosis: float
    contextual: Contextual | None = None
    osp: OspKurtosis | None = None
    out: str | None = None

    def summary(self) -> str:
        """For people: a row for each layer, then where the largest activations are, then the other numbers."""
        lines = []
        if self.contextual is not None:
            rows = layer_rows(self.contextual)
            rows[0] = [("| " if i == len(rows[0]) - 4 else "") + name for i, name in enumerate(rows[0])]
            lines += [TITLE, *_aligned(rows), "", *_aligned(extreme_rows(self.contextual)), ""]
            lines += [*shared_channels(self.contextual), *unwatched(self.contextual)]
        if self.osp is not None:
            states = ", ".join(f"{value:,.2f}" for value in self.osp.states)
            lines += ["", f"osp, by hidden state: {states}"]
        shown: dict[str, Any] = {"model": self.model, "data": self.data, "protocol": self.protocol}
        for name, part in (("contextual", self.contextual), ("osp", self.osp)):
            if part is not None:
                shown[f"excess kurtosis, {name}"] = f"{part.excess_kurtosis:,.4f}"
                shown[f"tokens, {name}"] = f"{part.windows:,} × {part.sequence_length:,}"
        lines += ["", *verdict(self)]
        shown |= {"precision": self.precision} | ({} if self.out is None else {"report": f"{self.out}/index.html"})
        width = max(map(len, shown))
        return "\n".join([*lines, "", *(f"{name:<{width}}  {value}" for name, value in shown.items())]).strip("\n")


def verdict(result: OutliersResult) -> list[str]:
    """In a sentence or two: are there outliers between the layers, where, and what do the MLPs' last linears read."""
    value = result.excess_kurtosis
    degree = "strong outliers" if value >= STRONG else "outliers" if value >= SOME else "no outliers to speak of"
    said = f"The residual stream has {degree}: excess kurtosis {_number(value)} (a Gaussian has 0)"
    whole = result.contextual
    if whole is None:
        return [f"{said}, each token alone."]
    stream = [row for row in whole.sites if row.site == "residual"]
    if value >= SOME:
        top = max(stream, key=lambda row: row.later.channels[0].energy_share)
        channel = top.later.channels[0]
        said += f"; after layer {top.layer} channel {channel.channel} has {channel.energy_share:.0%} of the squared activations"
    read = [row.later for row in whole.sites if row.site == "mlp-output"]
    if not read:
        return [f"{said}."]
    mean, ratio = sum(part.excess_kurtosis for part in read) / len(read), max(part.max_to_median or 0.0 for part in read)
    return [
        f"{said}.",
        f"What the MLPs' last linears read (mlp-output) has {_number(mean)}, and up to {ratio:,.0f} × its median.",
    ]


def layer_rows(result: Contextual) -> list[list[str]]:
    """Cells: excess kurtosis by layer and site at later positions; of the residual stream also what else there is."""
    sites: list[SiteName] = [site for site in SITES if site in result.histograms and site != "final-norm"]
    lines = [["layer", *sites, "kurtosis, first", "max/median", "max/median, first", "sink share"]]
    shares = result.sink_share or []
    for layer in sorted({row.layer for row in result.sites if row.layer is not None}):
        rows = [result.at(layer, site) for site in sites]
        stream = rows[0]
        assert stream is not None, layer
        ratios = (stream.later.max_to_median, stream.first.max_to_median)
        share = shares[layer] if layer < len(shares) else None
        lines.append([
            str(layer), *(_number(row and row.later.excess_kurtosis) for row in rows),
            _number(stream.first.excess_kurtosis), *map(_number, ratios), "" if share is None else f"{share:.1%}",
        ])  # fmt: skip
    if (last := result.at(None, "final-norm")) is not None:
        ratios = (last.later.max_to_median, last.first.max_to_median)
        values = [_number(last.later.excess_kurtosis), *[""] * (len(sites) - 1), _number(last.first.excess_kurtosis)]
        lines.append(["final norm", *values, *map(_number, ratios), ""])
    return lines


def extreme_rows(result: Contextual) -> list[list[str]]:
    """Cells: the channel and token of the largest |x| / median, for each site."""
    lines = [["largest |x|/median", "positions", "layer", "max/median", "max |x|", "channel", "its energy", "token", "at"]]
    for row, where, part in result.extremes():
        top = part.channels[0]
        layer = "" if row.layer is None else str(row.layer)
        place = (f"{top.energy_share:.1%}", repr(top.token), str(top.position))
        lines.append([row.site, where, layer, _number(part.max_to_median), _number(part.max_abs), str(top.channel), *place])
    return lines


def shared_channels(result: Contextual) -> list[str]:
    """In how many layers the residual stream's largest activation is in the same channel."""
    lines, rows = [], [row for row in result.sites if row.site == "residual"]
    for where, name in (("later", "later positions"), ("first", "the first position")):
        channel, count = Counter(getattr(row, where).channels[0].channel for row in rows).most_common(1)[0]
        lines.append(f"residual stream, {name}: channel {channel} is the largest in {count} of {len(rows)} layers")
    return lines


def unwatched(result: Contextual) -> list[str]:
    """Why only the residual stream has rows, if that is so."""
    return [f"between the layers only: {result.unwatched}"] if result.unwatched else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}".replace("-0.00", "0.00")


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def read_text(loaded: Loaded, config: OutliersConfig, protocol: Protocol) -> tuple[Tensor, bool]:
    """Windows [N, T] of the text as a protocol cuts them, and whether they begin with the beginning-of-text token. Raises
    DataError and ModelError."""
    split = "heldout" if config.data == "stdlib" else None
    texts = (document.text for document in documents(config.data, text_field=config.text_field, split=split))
    bos, length, limit = uses_bos(loaded.tokenizer, config.bos), config.length(protocol), config.windows(protocol)
    if protocol == "osp":
        windows = osp_windows(texts, loaded.tokenizer, length, bos, limit)
    else:
        require_positions(loaded.model, length)
        windows, _ = text_windows(texts, loaded.tokenizer, length, bos, limit)
    if int(windows.max()) >= vocabulary_size(loaded.model):
        raise ModelError(f"the text has token {int(windows.max())}, beyond the model's embedding.")
    return windows, bos


def measure(loaded: Loaded, config: OutliersConfig, listener: Listener = SILENT) -> OutliersResult:
    """The numbers of `trilobit outliers`. Raises DataError and ModelError."""
    contextual = osp = None
    if config.protocol != "osp":
        windows, bos = read_text(loaded, config, "contextual")
        decode = partial(_decode, loaded.tokenizer)
        contextual = measure_contextual(
            loaded.model, windows, decode, sequences=config.sequences, bos=bos, listener=listener
        )  # fmt: skip
    if config.protocol != "contextual":
        osp = measure_osp(loaded.model, *read_text(loaded, config, "osp"), listener)
    headline = contextual or osp
    assert headline is not None
    kurtosis = headline.excess_kurtosis
    return OutliersResult(config.model, config.data, config.protocol, config.precision, kurtosis, contextual, osp, config.out)


def _decode(tokenizer: Any, token: int) -> str:
    """The text of a token; its name in the vocabulary where it is part of a character."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if not text or "\ufffd" in text else text
