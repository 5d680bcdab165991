"""The report of `trilobit outliers`: whole or absent, self-contained, and its numbers are those of the result."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from infer.checkpoints import byte_tokenizer, save
from trilobit.config.outliers import OutliersConfig
from trilobit.errors import OutputError
from trilobit.measure.outliers import OutliersResult
from trilobit.report import outliers
from trilobit.report.outliers import run, write
from trilobit.storage import verify_manifest

TEXT = "Ein <b>naïver</b> Satz, ✓ geprüft, und noch einer.\n" * 20
PICTURES = ("kurtosis", "max_to_median", "histograms", "surface_residual", "surface_mlp-output", "osp")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save(folder / "model", tokenizer=byte_tokenizer(adds_bos=True))
    (folder / "text.txt").write_text(TEXT)
    return folder


def settings(place: Path, **more: Any) -> OutliersConfig:
    common = {"model": str(place / "model"), "data": str(place / "text.txt"), "sequence_length": 16, "max_tokens": 200}
    return OutliersConfig(**{**common, "device": "cpu", "protocol": "both", **more})


@pytest.fixture(scope="module")
def made(place: Path) -> tuple[OutliersResult, Path]:
    return run(settings(place, out=str(place / "report"))), place / "report"


def test_the_directory_is_whole(made: tuple[OutliersResult, Path]) -> None:
    """Page, pictures and JSON are there with a manifest, the JSON is the result, and the result names the directory."""
    result, out = made
    verify_manifest(out)
    expected = {"index.html", "outliers.json", "manifest.json", *(f"{name}.png" for name in PICTURES)}
    assert {path.name for path in out.iterdir()} == expected
    assert json.loads((out / "outliers.json").read_text()) == json.loads(json.dumps(asdict(result)))
    assert result.out == str(out)
    assert result.summary().endswith(f"{out}/index.html")


def test_the_page_stands_alone(made: tuple[OutliersResult, Path]) -> None:
    """The page holds its pictures, refers to nothing outside itself, and shows the headline and a row for each layer."""
    result, out = made
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(PICTURES)
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|<script|<link""", page)
    assert not outside
    assert f"{result.excess_kurtosis:,.2f}</span> excess kurtosis" in page
    assert "<td>0</td>" in page and "<td>1</td>" in page and "<td>final norm</td>" in page


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_something(made: tuple[OutliersResult, Path], name: str) -> None:
    """Each picture has lines or cells in a colour."""
    image = imread(made[1] / f"{name}.png")[..., :3]
    assert image.shape[0] > 300 and image.shape[1] > 600
    assert (np.ptp(image, axis=-1) > 0.2).sum() > 500


def test_text_of_others_is_escaped(made: tuple[OutliersResult, Path], tmp_path: Path) -> None:
    """Names of models and data, and tokens, are shown as they are and are never markup."""
    result, _ = made
    write(tmp_path / "page", replace(result, model="<script>m", data="a&b"), [])
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "Outliers of &lt;script&gt;m" in page and "a&amp;b" in page and "&lt;s&gt;" in page


@pytest.mark.parametrize("protocol", ["contextual", "osp"])
def test_one_protocol_alone(place: Path, tmp_path: Path, protocol: Any) -> None:
    """The page of one protocol has its pictures and not the other's."""
    run(settings(place, protocol=protocol, out=str(tmp_path / "page")))
    pictures = {path.stem for path in (tmp_path / "page").glob("*.png")}
    assert pictures == ({"osp"} if protocol == "osp" else {*PICTURES} - {"osp"})


def test_what_exists_is_not_overwritten(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that holds something is refused before the model is loaded; an interrupted report leaves nothing."""

    def fails(*anything: Any) -> None:
        raise AssertionError("loaded")

    (tmp_path / "file").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr(outliers, "load", fails)
        with pytest.raises(OutputError, match=r"exists already\. Choose another name"):
            run(settings(place, out=str(tmp_path)))

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outliers, "write_json", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run(settings(place, out=str(tmp_path / "new")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
