"""--to compressed-tensors: what transformers reads is what was quantised, and what the format has no words for is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from families import build
from infer.checkpoints import BYTES, byte_tokenizer, save
from trilobit.config.export import ExportConfig
from trilobit.errors import ConfigError, ExportError, VerificationError
from trilobit.export import compressed, convert
from trilobit.formats import PackQuantized
from trilobit.fourbit.protocol import PRESETS
from trilobit.fourbit.rtn import round_to_nearest, weight_scales
from trilobit.infer.load import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the package, imported
SIZES: dict[str, Any] = {"vocab_size": BYTES, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return save(tmp_path / "model", build("llama", **SIZES), byte_tokenizer())


def export(place: Path, **options: Any) -> convert.ExportResult:
    """Written where the package is there, without the check of the whole model's text unless `data` is one."""
    pytest.importorskip("compressed_tensors")
    text = place.parent / "text.txt"
    text.write_text("Something to compare readings on, not sampled from the model. " * 20)
    options = {"data": str(text), **options}
    return convert.run(ExportConfig(model=str(place), out=str(place.parent / "out"), to="compressed-tensors", **options))


@given(st.sampled_from(PackQuantized.BITS), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
def test_packing_is_undone(bits: int, rows: int, inputs: int, seed: int) -> None:
    """Any shape and every width: codes come back, and a row takes the words it needs."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (rows, inputs), generator=generator, dtype=torch.int8)
    packed = PackQuantized.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, -(-inputs * bits // 32))
    assert torch.equal(PackQuantized.unpack(packed, bits, inputs), codes)


@pytest.mark.parametrize("bits", PackQuantized.BITS)
def test_packing_is_the_packages(bits: int) -> None:
    """Bit by bit what the package itself packs."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (5, 41), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(PackQuantized.pack(codes, bits), helpers.pack_to_int32(codes, bits))


@pytest.mark.parametrize(("bits", "group"), [("4-16-16", None), ("2-16-16", 32), ("4-4-16", None), ("8-8-16", None)])
def test_transformers_reads_what_was_quantised(place: Path, bits: str, group: int | None) -> None:
    """W4A16, groups, int4 activations and W8A8: the check passes, and the stored weight is round_to_nearest's."""
    result = export(place, bits=bits, weight_group=group)
    rows = result.check.rows
    assert [row.reader for row in rows] == ["transformers", "the quantised model"]
    if bits.split("-")[1] == "16":
        assert rows[0].agreement.top1 == 1 and rows[0].agreement.kl < 1e-6
    path, width = "model.layers.0.mlp.down_proj", int(bits[0])
    stored = load_file(place.parent / "out" / "model.safetensors")
    protocol = replace(PRESETS["osp"], weight_bits=width, weight_group=group)
    weight = load(place).model.get_parameter(f"{path}.weight")
    expected, (scale, _) = round_to_nearest(weight, protocol), weight_scales(weight, protocol)
    codes = stored[f"{path}.weight"] if width == 8 else PackQuantized.unpack(stored[f"{path}.weight_packed"], width, 96)
    assert torch.equal(stored[f"{path}.weight_scale"], scale)
    assert torch.equal(codes * scale.repeat_interleave(96 // scale.shape[1], 1), expected)
    assert load(place.parent / "out").plan is None


def test_gptq_is_stored(place: Path) -> None:
    """By GPTQ with groups: other codes than rounding to nearest gives, and transformers reads them all the same."""
    (place.parent / "train.txt").write_text("What a model is calibrated on. " * 40)
    result = export(
        place, method="gptq", weight_group=16, calibration=str(place.parent / "train.txt"), calibration_samples=4,
        calibration_length=32,
    )  # fmt: skip
    assert "GPTQ" in result.reason and result.check.rows[0].agreement.top1 == 1


def test_another_reading_is_not_left_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose codes were damaged after they were written is noticed, and nothing remains."""

    def damaged(entries: Any, directory: Path) -> None:
        write(entries, directory)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight_packed"] ^= 1
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    write = compressed.stream_tensors
    monkeypatch.setattr(compressed, "stream_tensors", damaged)
    with pytest.raises(VerificationError, match=r"down_proj otherwise"):
        export(place)
    assert not (place.parent / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": "4-4-4"}, "no cache"),
        ({"bits": "5-16-16"}, "weights have 2, 4, 8 bits"),
        ({"protocol": "quarot", "calibration": "x"}, "no transforms in front"),
    ],
)
def test_what_the_format_has_no_words_for(place: Path, options: dict[str, Any], says: str) -> None:
    """Refused before anything is loaded, with what can be asked for."""
    with pytest.raises(ExportError, match=says):
        compressed.settings_of(ExportConfig(model="none", out="out", to="compressed-tensors", **options))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight_symmetric": False}, "weight_symmetric"),
        ({"activation_symmetric": True}, "activation_symmetric"),
        ({"activation_clip": 0.9}, "activation_clip"),
    ],
)
def test_protocols_that_cannot_be_held(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Knobs that the format's readers set otherwise are named."""
    protocol = replace(PRESETS["osp"].with_bits("4-4-16"), **changes)
    (tmp_path / "p.json").write_text(json.dumps(asdict(protocol)))
    with pytest.raises(ExportError, match=says):
        compressed.settings_of(
            ExportConfig(model="none", out="out", to="compressed-tensors", protocol=str(tmp_path / "p.json"))
        )


def test_bad_choices(place: Path) -> None:
    """Flags of another form, groups that do not fit, and GPTQ without a text are one clear error."""
    with pytest.raises(ConfigError, match=r"--bits is a choice of --to compressed-tensors"):
        ExportConfig(model="m", out="o", bits="4-16-16")
    with pytest.raises(ConfigError, match=r"--weight-group is 0"):
        ExportConfig(model="m", out="o", to="compressed-tensors", weight_group=0)
    with pytest.raises(ConfigError, match=r"--calibration"):
        compressed.settings_of(ExportConfig(model="m", out="o", to="compressed-tensors", method="gptq"))
    with pytest.raises(ExportError, match=r"no multiple of 40"):
        export(place, weight_group=40)
    assert not (place.parent / "out").exists()


def test_without_the_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written that cannot be checked: what to install is said."""
    monkeypatch.setattr(compressed, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"trilobit\[four\]"):
        convert.run(ExportConfig(model=str(place), out=str(place.parent / "out"), to="compressed-tensors"))
