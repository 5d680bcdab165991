"""`trilobit outliers`: measure, and with --out write a page that explains what was found.

The directory holds index.html (pictures inside it, nothing is fetched), the same pictures as PNG, and outliers.json with
every number; it appears whole or not at all.
"""

import base64
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from trilobit.config.outliers import OutliersConfig
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded, pick_device
from trilobit.listener import SILENT, Listener
from trilobit.measure.contextual import Contextual, SiteOutliers
from trilobit.measure.kurtosis import OspKurtosis
from trilobit.measure.outliers import (
    OutliersResult,
    extreme_rows,
    layer_rows,
    measure,
    read_text,
    shared_channels,
    unwatched,
    verdict,
)
from trilobit.measure.probes import SiteName, activations
from trilobit.report.outlier_plots import plot_histograms, plot_kurtosis, plot_ratios, plot_states, plot_surface
from trilobit.storage import atomic_directory, require_new_directory, write_json

SURFACES: tuple[SiteName, ...] = ("residual", "mlp-output")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } img { max-width: 100%; display: block }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: 2px 8px; text-align: right; white-space: pre } th { border-bottom: 1px solid #a0a0a0; font-weight: 600 }
tr:nth-child(even) td { background: #f6f6f6 } .number { font-size: 2em; color: #c4472b } .quiet { color: #6a6a6a }
"""


def run(config: OutliersConfig, listener: Listener = SILENT) -> OutliersResult:
    """`trilobit outliers`. Raises OutputError, before anything is loaded, if --out is taken."""
    if config.out is not None:
        require_new_directory(Path(config.out), "Choose another name.")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    loaded = load(config.model, device=pick_device(config.device), dtype=dtype)
    result = measure(loaded, config, listener)
    if config.out is not None:
        surfaces = [] if result.contextual is None else find_surfaces(loaded, config, result.contextual)
        write(Path(config.out), result, surfaces)
    return result


def find_surfaces(loaded: Loaded, config: OutliersConfig, result: Contextual) -> list[tuple[SiteOutliers, Tensor]]:
    """For the residual stream and the MLP's output the layer of the highest kurtosis after the first position, and its
    |x| [T, W] on the sequence with the largest of them."""
    windows, _ = read_text(loaded, config, "contextual")
    surfaces = []
    for site in SURFACES:
        rows = [row for row in result.sites if row.site == site]
        if rows:
            row = max(rows, key=lambda row: row.later.excess_kurtosis)
            window = windows[row.later.channels[0].sequence]
            surfaces.append((row, activations(loaded.model, row.layer, site, window)))
    return surfaces


def write(out: Path, result: OutliersResult, surfaces: list[tuple[SiteOutliers, Tensor]]) -> None:
    """The report of `result` as a new directory `out`. Raises OutputError where the disk refuses."""
    with atomic_directory(out) as directory:
        body: list[str] = []
        if result.contextual is not None:
            body += _contextual(result.contextual, surfaces, directory)
        if result.osp is not None:
            body += _osp(result.osp, directory)
        title = f"Outliers of {escape(result.model)}"
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        top = [
            f"<h1>{title}</h1>",
            f'<p><span class="number">{result.excess_kurtosis:,.2f}</span> excess kurtosis '
            f"({'contextual' if result.contextual else 'osp'}; 0 is a Gaussian)</p>",
            *(f"<p>{escape(sentence)}</p>" for sentence in verdict(result)),
            f'<p class="quiet">text {escape(result.data)}, precision {result.precision}; every number is in outliers.json</p>',
        ]
        page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>'
        (directory / "index.html").write_text("\n".join([page, *top, *body, "</body></html>\n"]), encoding="utf-8")
        write_json(directory / "outliers.json", asdict(result))


def _contextual(result: Contextual, surfaces: list[tuple[SiteOutliers, Tensor]], directory: Path) -> list[str]:
    plot_kurtosis(result, directory / "kurtosis.png")
    plot_ratios(result, directory / "max_to_median.png")
    plot_histograms(result, directory / "histograms.png")
    parts = [
        f"<p>{result.windows:,} sequences of {result.sequence_length:,} tokens"
        f"{', each with the beginning-of-text token in front' if result.bos else ''}. The first position is reported apart: "
        "attention sinks put their massive activations there.</p>",
        *(f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in [*shared_channels(result), *unwatched(result)]),
        "<h2>Excess kurtosis by depth</h2>",
        _picture(directory / "kurtosis.png"),
        "<p>Mean over tokens of the excess kurtosis over channels, at positions after the first: of the residual stream "
        "after each layer, of what the attention's and the MLP's first linears read (input) and of what their last ones "
        "read (output).</p>",
        "<h2>Largest against median</h2>",
        _picture(directory / "max_to_median.png"),
        "<h2>Where the largest are</h2>",
        _table(extreme_rows(result)),
    ]
    for row, values in surfaces:
        path = directory / f"surface_{row.site}.png"
        plot_surface(values, row, path)
        where = f"Activations: {row.site}" + ("" if row.layer is None else f", layer {row.layer}")
        parts += [
            f"<h2>{where}</h2>",
            _picture(path),
            "<p>|x| in the layer with the highest kurtosis, on the sequence that holds its largest: white up to the median, "
            "a channel of outliers is a horizontal line, a massive token a vertical one. Above, the largest of each token; "
            "right, of each channel after the first position, the leading ones named.</p>",
        ]
    return [
        *parts,
        "<h2>Sizes</h2>",
        _picture(directory / "histograms.png"),
        "<p>Density of |x| over the root mean square of its token, all layers together, positions after the first.</p>",
        "<h2>By layer</h2>",
        _table(layer_rows(result)),
        "<p>Excess kurtosis by site after the first position; of the residual stream also its kurtosis at the first "
        "position, its largest over its median, and the share of their attention that later positions give to the first.</p>",
    ]


def _osp(result: OspKurtosis, directory: Path) -> list[str]:
    plot_states(result, directory / "osp.png")
    return [
        "<h2>Protocol osp</h2>",
        f"<p>{result.excess_kurtosis:,.2f} over {result.windows:,} sequences of {result.sequence_length:,} tokens, by the "
        "definition of outlier-safe pre-training (arXiv 2506.19697): every token alone at position 0, not centred.</p>",
        _picture(directory / "osp.png"),
    ]


def _picture(path: Path) -> str:
    return f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _table(rows: list[list[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line(rows[0], "th"), *(line(row, "td") for row in rows[1:]), "</table>"])
