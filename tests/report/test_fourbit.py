"""`trilobit quantize` as a whole: cells, grids that are continued, reports, refusals."""

import csv
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from infer.checkpoints import byte_model, byte_tokenizer, save
from trilobit.cli import main
from trilobit.config.eval import EvalConfig
from trilobit.config.quantize import ROWS, QuantizeConfig
from trilobit.errors import ConfigError, DataError, ModelError, OutputError, UnsupportedError
from trilobit.fourbit import evaluate, gptq_layers
from trilobit.fourbit.calibration import calibration_windows
from trilobit.fourbit.evaluate import COLUMNS, ORIGINAL
from trilobit.fourbit.progress import windows_fingerprint
from trilobit.fourbit.protocol import PRESETS, find_protocol
from trilobit.fourbit.result import QuantizeResult
from trilobit.infer.load import load
from trilobit.listener import Listener
from trilobit.measure.perplexity import measure
from trilobit.report import fourbit
from trilobit.report.fourbit import run
from trilobit.storage import verify_manifest

pytestmark = pytest.mark.filterwarnings(  # torch's own imports, on the way to transformers' bitnet classes
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
TEXT = "Ein naïver Satz, ✓ geprüft 😀, und noch einer.\n" * 8
OTHER = "Another text, which is about nothing, and has been put here for calibration only.\n" * 8


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save(folder / "model", byte_model(num_hidden_layers=1, intermediate_size=32), byte_tokenizer(adds_bos=True))
    save(folder / "gemma", byte_model("gemma3_text", num_hidden_layers=1, intermediate_size=32), byte_tokenizer())
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(OTHER)
    return folder


def settings(place: Path, *models: str, **more: Any) -> QuantizeConfig:
    common = {
        "models": tuple(str(place / name) for name in models or ("model",)), "data": str(place / "text.txt"),
        "calibration": str(place / "other.txt"), "calibration_samples": 6, "calibration_length": 16, "sequence_length": 16,
        "max_tokens": 100, "device": "cpu", "learning_steps": 2,
    }  # fmt: skip
    return QuantizeConfig(**{**common, **more})


@pytest.fixture(scope="module")
def grid(place: Path) -> tuple[QuantizeResult, Path]:
    out = place / "grid"
    return run(settings(place, "model", "gemma", grid="osp", out=str(out))), out


def test_a_single_cell(place: Path) -> None:
    """The original's number is that of `trilobit eval`, the cell's is worse, and the protocol is there with its hash."""
    result = run(settings(place))
    original, cell = result.cells
    expected = measure(
        load(place / "model"),
        EvalConfig(model="m", data=str(place / "text.txt"), sequence_length=16, max_tokens=100, sequences=4),
    )
    assert (original.column, original.bits, original.loss) == (ORIGINAL, "16-16-16", 0.0)
    assert original.perplexity == expected.perplexity and original.tokens == expected.tokens == 90
    assert (cell.column, cell.bits, cell.method) == ("RTN", "4-4-4", "rtn")
    assert cell.loss == pytest.approx(cell.nats_per_token - original.nats_per_token)
    assert abs(cell.loss) > 1e-4
    protocol = replace(PRESETS["osp"], calibration_samples=6, calibration_length=16, learning_steps=2)
    assert result.protocols[cell.protocol_sha256] == protocol.text and cell.protocol_sha256 == protocol.sha256
    assert set(result.protocols) == {original.protocol_sha256, protocol.sha256}
    assert cell.excess_kurtosis == original.excess_kurtosis  # RTN turns nothing
    assert all(part in result.summary() for part in (protocol.sha256, "weight_clip", "4-4-4", "RTN", "above"))


def test_short_models_are_measured_and_fitted_on_what_they_have(place: Path) -> None:
    """By default windows and calibration sequences are 2,048 tokens or the model's positions, and hashes have the real length
    (old code: "--sequence-length 2048 is longer than the model's 64 positions"). A protocol in a file pins its own."""
    said = Notes()
    common: dict[str, Any] = {"method": "gptq", "calibration_samples": 2}
    result = run(settings(place, sequence_length=None, calibration_length=None, **common), said)
    asked = run(settings(place, sequence_length=64, calibration_length=64, **common))
    assert [replace(cell, seconds=None, seconds_weights=None) for cell in result.cells] == [
        replace(cell, seconds=None, seconds_weights=None) for cell in asked.cells
    ]
    assert "calibration_length        64" in result.protocols[result.cells[1].protocol_sha256]
    assert any(note.startswith("windows of 64 tokens: ") for note in said.notes)
    pinned = place / "pinned.json"
    pinned.write_text(json.dumps(asdict(PRESETS["osp"])))
    with pytest.raises(ModelError, match=r"--calibration-length 2048 .*64 positions: give --calibration-length 64, or less"):
        run(settings(place, protocol=str(pinned), calibration_length=None, **common))


def test_sixteen_bits_are_the_original(place: Path) -> None:
    """--bits 16-16-16 gives the original's number, exactly."""
    original, cell = run(settings(place, bits="16-16-16")).cells
    assert cell.nats_per_token == original.nats_per_token and cell.loss == 0.0


@pytest.mark.parametrize(
    ("more", "column"),
    [
        ({"rotate": "ffn"}, "RTN + FFN Hadamard"), ({"method": "gptq"}, "GPTQ"), ({"bits": "3-8-4-5"}, "RTN"),
        ({"precision": "bf16"}, "RTN"), ({"protocol": "quarot", "rotate": "ffn"}, "GPTQ + FFN Hadamard"),
    ],
)  # fmt: skip
def test_settings_reach_the_protocol(place: Path, more: Any, column: str) -> None:
    """Flags change the protocol that is named and hashed, and the number."""
    base = run(settings(place)).cells[1]
    result = run(settings(place, **more))
    cell = result.cells[1]
    assert cell.column == column and cell.bits == more.get("bits", "4-4-4")
    assert cell.nats_per_token != base.nats_per_token
    text = result.protocols[cell.protocol_sha256]
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["ffn_hadamard"] == ("true" if "FFN" in column else "false")
    assert rows["method"] == ('"gptq"' if "GPTQ" in column else '"rtn"')
    assert (rows["calibration_data"] == "null") == ("GPTQ" not in column)


def test_the_grid_has_every_cell(grid: tuple[QuantizeResult, Path]) -> None:
    """Of each model the original and four rows of five columns, none twice; a column that a model cannot have says why."""
    result, _ = grid
    for model in {cell.model for cell in result.cells}:
        cells = [cell for cell in result.cells if cell.model == model]
        expected = Counter([(ORIGINAL, ROWS[0]), *((column, row) for column in COLUMNS for row in ROWS[1:])])
        assert Counter((cell.column, cell.bits) for cell in cells) == expected
        for cell in cells:
            assert (cell.perplexity is None) == (cell.refused is not None)
        done = {cell.column for cell in cells if cell.refused is None}
        assert done >= {ORIGINAL, "RTN", "+ FFN Hadamard", "+ GPTQ"}


def test_a_cell_of_the_grid_is_the_cell_alone(place: Path, grid: tuple[QuantizeResult, Path]) -> None:
    """Sharing weights between the rows of a column changes no number."""
    cells = {(cell.column, cell.bits): cell for cell in grid[0].cells if cell.model.endswith("model")}
    alone = run(settings(place, bits="4-8-8", method="gptq", rotate="ffn")).cells[1]
    assert alone.nats_per_token == cells["+ GPTQ", "4-8-8"].nats_per_token
    assert alone.protocol_sha256 == cells["+ GPTQ", "4-8-8"].protocol_sha256
    assert cells["RTN", "4-8-16"].kurtosis_mlp_output != cells["+ FFN Hadamard", "4-8-16"].kurtosis_mlp_output


def test_the_report_is_whole(grid: tuple[QuantizeResult, Path]) -> None:
    """JSON is the result, CSV has a line a cell, the table a row a setting, the plot lines, and protocols are read back."""
    result, out = grid
    report = out / "report"
    verify_manifest(report)
    assert json.loads((report / "fourbit.json").read_text()) == json.loads(json.dumps(asdict(result)))
    with (report / "fourbit.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.cells)
    assert [row["perplexity"] for row in rows] == ["" if c.perplexity is None else str(c.perplexity) for c in result.cells]
    table = (report / "table.md").read_text(encoding="utf-8")
    assert table.count("| 4-4-4 |") == 2 and "| bits | RTN | + FFN Hadamard | + GPTQ | QuaRot | SpinQuant |" in table
    assert all(row in result.summary() for row in (*ROWS, "kurtosis", "seconds", "QuaRot: values:"))
    image = imread(report / "perplexity.png")[..., :3]
    assert (np.ptp(image, axis=-1) > 0.2).sum() > 500
    for digest in result.protocols:
        assert find_protocol(str(report / "protocols" / f"{digest[:12]}.json")).sha256 == digest


def test_a_protocol_of_a_report_repeats_its_cell(place: Path, grid: tuple[QuantizeResult, Path]) -> None:
    """--protocol with a file of a report, at its bits, gives the number that the report has."""
    result, out = grid
    cell = next(c for c in result.cells if (c.column, c.bits) == ("+ FFN Hadamard", "4-8-8"))
    path = out / "report" / "protocols" / f"{cell.protocol_sha256[:12]}.json"
    again = run(settings(place, protocol=str(path), bits="4-8-8")).cells[1]
    assert (again.nats_per_token, again.protocol_sha256) == (cell.nats_per_token, cell.protocol_sha256)


def test_a_stopped_grid_continues(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Any) -> None:
    """A grid that dies after any number of cells has, resumed, the numbers of one that was left alone, and measures no cell
    twice."""
    out, kept, real = tmp_path / "grid", 0, fourbit._keep

    def dying(*arguments: Any) -> None:
        nonlocal kept
        real(*arguments)
        kept += 1
        if kept in (1, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(fourbit, "_keep", dying)
    config = settings(place, grid="osp", out=str(out))
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(replace(config, resume=resume))
        assert not (out / "report").exists()
    result = run(replace(config, resume=True))
    whole = {(c.column, c.bits): c for c in grid[0].cells if c.model.endswith("model")}
    assert kept == sum(cell.refused is None for cell in whole.values())
    assert [c.nats_per_token for c in result.cells] == [whole[c.column, c.bits].nats_per_token for c in result.cells]
    monkeypatch.setattr(evaluate, "measure", None)  # a third time nothing is measured
    assert run(replace(config, resume=True)) == result
    assert not list((out / "progress").glob("*/layer-*")), "GPTQ's layers are of no use once their cells are kept"


def test_other_settings_are_no_continuation(place: Path, grid: tuple[QuantizeResult, Path]) -> None:
    """--resume with another text or seed names what differs; without --resume the directory is taken."""
    config = settings(place, "model", "gemma", grid="osp", out=str(grid[1]))
    with pytest.raises(OutputError, match="exists already"):
        run(config)
    with pytest.raises(ConfigError, match=r"--max-tokens was 100, is 50; --seed was None, is 1\."):
        run(replace(config, resume=True, max_tokens=50, seed=1))


def test_a_continuation_is_of_the_same_protocol_model_and_text(place: Path, tmp_path: Path) -> None:
    """--resume with a protocol file, weights, a config or a text that changed under the same path names what changed."""
    for name in ("model", "text.txt", "other.txt"):
        (shutil.copytree if name == "model" else shutil.copy)(place / name, tmp_path / name)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asdict(replace(PRESETS["osp"], method="gptq", calibration_samples=6, calibration_length=16))))
    config = settings(tmp_path, protocol=str(path), out=str(tmp_path / "out"))
    first = run(config)
    assert run(replace(config, resume=True)) == first

    def refused(says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            run(replace(config, resume=True))

    before = path.read_text()
    path.write_text(before.replace('"clip_norm": 2.4', '"clip_norm": 2.0'))
    refused(r"--resume.*another protocol_sha256 \(clip_norm was 2\.4, is 2\.0\)")
    path.write_text(before)
    (tmp_path / "other.txt").write_text(OTHER[1:])
    refused("calibration_sha256 was")
    (tmp_path / "other.txt").write_text(OTHER)
    (tmp_path / "text.txt").write_text(TEXT[2:])
    refused("windows_sha256 was")
    (tmp_path / "text.txt").write_text(TEXT)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    save(tmp_path / "model", byte_model(num_hidden_layers=1, intermediate_size=32, seed=7), byte_tokenizer(adds_bos=True))
    refused("model_sha256 was")
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-3}))
    refused("model_sha256 was")
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    assert run(replace(config, resume=True)) == first
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    (measured,) = record["measured"].values()
    assert measured["model_sha256"] == first.cells[0].model_sha256 and measured["version"] == first.cells[0].version
    record["versions"]["trilobit"] = "0.0.1"
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    refused("begun by trilobit 0.0.1")


def test_the_hashes_say_what_compares(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dtype, beginning or measured text is another measurement; another calibration text another protocol; another
    spelling of its path neither."""

    def hashes(**more: Any) -> tuple[str, str]:
        cell = run(settings(place, **{"method": "gptq", **more})).cells[1]
        return cell.protocol_sha256, cell.measurement_sha256

    protocol, measurement = hashes()
    assert hashes(precision="bf16")[1] != measurement != hashes(max_tokens=50)[1]
    assert hashes(bos="no")[1] != measurement
    (place / "third.txt").write_text("And a third text, of which nobody knows why it is there at all.\n" * 8)
    other = hashes(calibration=str(place / "third.txt"))
    assert other[0] != protocol and other[1] == measurement
    monkeypatch.chdir(place)
    assert hashes(calibration="other.txt") == (protocol, measurement)
    (place / "again").mkdir()
    (place / "again" / "copy.txt").write_text(OTHER)
    assert hashes(calibration="again") == (protocol, measurement)


def test_what_was_applied_is_in_the_result(place: Path, tmp_path: Path) -> None:
    """Heads without a matrix, values left alone, the budget of a learned rotation: in cells, summary and table."""
    shape = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "intermediate_size": 32}
    save(tmp_path / "nine", byte_model(num_hidden_layers=1, **shape), byte_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    result = run(settings(tmp_path, "nine", protocol="quarot", out=str(tmp_path / "out")))
    said = " ".join(result.cells[1].applied)
    assert all(
        part in said for part in ("no Hadamard matrix of 9 heads", "signs, seed 0", "MLP output: Sylvester", "after RoPE")
    )
    assert "no Hadamard matrix of 9 heads" in result.summary()
    assert "no Hadamard matrix of 9 heads" in (tmp_path / "out" / "report" / "table.md").read_text(encoding="utf-8")
    learned = run(settings(place, protocol="spinquant")).cells[1]
    assert any("2 steps, 256 tokens, lr 1.5, seed 0, loss" in line for line in learned.applied)


def test_what_the_user_must_mend_ends_a_grid(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration file that does not exist ends the run before a cell is measured; a disk that refuses, when it does."""
    missing = settings(place, grid="osp", calibration=str(place / "nowhere.txt"), out=str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"calibration text .*nowhere\.txt"):
        run(missing)
    assert not list((tmp_path / "a" / "cells").iterdir())

    def full(*arguments: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(gptq_layers, "_write_layer", full)
    with pytest.raises(OutputError, match="disk is full"):
        run(settings(place, grid="osp", out=str(tmp_path / "b")))


def test_what_a_model_cannot_have_is_said_before_it_costs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of six and an attention that is not reached are refused before GPTQ, with a remedy that works; in a grid the rows
    without a quantised cache are measured."""
    six = byte_model(num_hidden_layers=1, head_dim=6, intermediate_size=32)
    capped = byte_model("gemma2", num_hidden_layers=1, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    save(tmp_path / "six", six, byte_tokenizer())
    save(tmp_path / "capped", capped, byte_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "gptq", None)
        with pytest.raises(UnsupportedError, match=r"width 6 .*--bits 4-4-16-4"):
            run(settings(tmp_path, "six", method="gptq"))
        with pytest.raises(ModelError, match=r"as eager.*--bits 4-4-16"):
            run(settings(tmp_path, "capped", method="gptq"))
    assert run(settings(tmp_path, "six", bits="4-4-16-4")).cells[1].perplexity
    assert run(settings(tmp_path, "capped", bits="4-4-16")).cells[1].perplexity
    cells = run(settings(tmp_path, "six", grid="osp", out=str(tmp_path / "out"))).cells
    refused = {(cell.column, cell.bits) for cell in cells if cell.refused is not None}
    assert {bits for column, bits in refused if column == "+ GPTQ"} == {"4-8-8", "4-4-4"}


def test_the_original_is_not_calibrated_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured file under another spelling, in a folder or a list; and a copy of its text under another name."""
    monkeypatch.chdir(place)
    for spelling in ("./text.txt", "../place/text.txt".replace("../place", f"../{place.name}"), "text.txt,other.txt", "*.txt"):
        with pytest.raises(ConfigError, match="must not be fitted to what is measured"):
            run(settings(place, data=str(place / "text.txt"), method="gptq", calibration=spelling))
    (place / "copy").mkdir()
    (place / "copy" / "text.txt").write_text(TEXT)
    long: Any = {"sequence_length": 40, "calibration_length": 40, "calibration_samples": 2}
    with pytest.raises(DataError, match="one of those that are measured"):
        run(settings(place, method="gptq", calibration="copy/text.txt", **long))


def test_seconds_of_processes_that_were_killed_count(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ's finished layers bring the seconds that they took; weights take some in any case."""
    assert (run(settings(place)).cells[1].seconds_weights or 0) > 0
    config, real = settings(place, method="gptq", out=str(tmp_path / "out")), evaluate.measure
    calls = 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(evaluate, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    (record,) = (tmp_path / "out" / "progress").glob("*/layer-000/layer.json")
    content = json.loads(record.read_text())
    assert content["seconds"] > 0
    record.write_text(json.dumps(content | {"seconds": 5000.0}))
    manifest = json.loads((record.parent / "manifest.json").read_text())
    data = record.read_bytes()
    manifest["files"]["layer.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (record.parent / "manifest.json").write_text(json.dumps(manifest))
    (record.parent.parent / ".layer-001.partial-1").mkdir()
    (tmp_path / "out" / "cells" / ".x.json.1").write_text("{")
    cell = run(replace(config, resume=True)).cells[1]
    assert (cell.seconds_weights or 0) > 5000
    left = [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name or path.name.startswith(".")]
    assert not left and not list((tmp_path / "out" / "progress").glob("*/layer-*"))


def test_rows_that_are_in_no_grid_are_refused() -> None:
    """--task-bits takes rows of the grid in any spelling, and at least one where there are tasks."""
    common: Any = {"models": ("m",), "data": "d", "grid": "osp", "out": "o", "tasks": "five"}
    assert QuantizeConfig(**common, task_bits="4-4-4-4, 16-16-16").task_rows() == ("4-4-4", "16-16-16")
    with pytest.raises(ConfigError, match="3-3-3 is no row of --grid osp"):
        QuantizeConfig(**common, task_bits="3-3-3")
    with pytest.raises(ConfigError, match="names no row"):
        QuantizeConfig(**common, task_bits="")


def test_refusals(place: Path, tmp_path: Path) -> None:
    """Alone, what a model or text cannot do is an error: damaged weights, too few positions, too little text."""
    broken = byte_model(num_hidden_layers=1)
    with torch.no_grad():
        broken.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = torch.nan
    save(tmp_path / "broken", broken, byte_tokenizer())
    with pytest.raises(ModelError, match="not finite"):
        run(settings(tmp_path, "broken", data=str(place / "text.txt")))
    with pytest.raises(ModelError, match="--calibration-length 65 is longer than the model's 64 positions"):
        run(settings(place, method="gptq", calibration_length=65))


def test_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags reach the run, --json is the result alone, and --from repeats what run.json says."""
    arguments = [
        "quantize", str(place / "model"), "--data", str(place / "text.txt"), "--sequence-length", "16", "--max-tokens", "100",
        "--bits", "4-8-8", "--rotate", "ffn", "--device", "cpu", "--out", str(tmp_path / "a"), "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["bits"] for cell in found["cells"]] == ["16-16-16", "4-8-8"]
    again = ["quantize", "--from", str(tmp_path / "a" / "run.json"), "--out", str(tmp_path / "b"), "--json"]
    assert main(again) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["perplexity"] for cell in cells] == [cell["perplexity"] for cell in found["cells"]]


def test_a_protocol_file_is_left_as_it_is(place: Path, tmp_path: Path) -> None:
    """Bits, seeds and calibration text that a file pins hold unless a flag says otherwise: the hash is the file's."""
    protocol = replace(
        PRESETS["osp"].with_bits("3-8-8"), method="gptq", rotation_seed=7, calibration_seed=8, calibration_samples=5,
        calibration_length=16, calibration_data=str(place / "other.txt"),
    )  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asdict(protocol)))
    plain: Any = {"calibration": None, "calibration_samples": None, "calibration_length": None, "learning_steps": None}
    cell = run(settings(place, protocol=str(path), **plain)).cells[1]
    drawn = json.loads(json.dumps(asdict(protocol)))["calibration_data"]
    assert cell.bits == "3-8-8" and drawn == str(place / "other.txt")
    digest = windows_fingerprint(calibration_windows(load(place / "model"), settings(place, **plain), protocol))
    pinned = replace(protocol, calibration_sha256=digest)
    assert cell.protocol_sha256 == pinned.sha256 != protocol.sha256
    other = run(settings(place, protocol=str(path), **plain | {"seed": 9})).cells[1]
    assert other.protocol_sha256 != cell.protocol_sha256
    path.write_text(json.dumps(asdict(pinned)))
    assert run(settings(place, protocol=str(path), **plain)).cells[1].protocol_sha256 == pinned.sha256
    path.write_text(json.dumps(asdict(replace(pinned, calibration_sha256="0" * 64))))
    with pytest.raises(DataError, match="calibrated on other sequences"):
        run(settings(place, protocol=str(path), **plain))
    path.write_text(json.dumps(asdict(protocol)))
    with pytest.raises(ConfigError, match="must not be fitted to what is measured"):
        run(settings(place, protocol=str(path), **plain | {"data": str(place / "other.txt")}))
