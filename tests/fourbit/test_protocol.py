"""Protocols: presets, text, hash, files, and what is refused."""

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobit.config.quantize import WIDTHS, format_bits, parse_bits
from trilobit.errors import ConfigError
from trilobit.fourbit.protocol import PRESETS, Protocol, find_protocol

DOCS = Path(__file__).parents[2] / "docs" / "fourbit.md"


@given(st.tuples(*[st.sampled_from(WIDTHS)] * 4))
def test_bits_are_read_back(bits: tuple[int, int, int, int]) -> None:
    """What format_bits writes, parse_bits reads."""
    assert parse_bits(format_bits(*bits)) == bits


@pytest.mark.parametrize("bad", ["4", "4-4", "4-4-4-4-4", "4-1-4", "9-4-4", "15-4-4", "4-x-4", "4--4", "", "4-4-４", "-4-4-4"])
def test_bits_out_of_range_are_refused(bad: str) -> None:
    """Anything but three or four numbers, each from 2 to 8 or 16."""
    with pytest.raises(ConfigError, match="--bits"):
        parse_bits(bad)


def test_the_hash_is_of_every_knob() -> None:
    """Changing any one knob changes the hash; equal protocols have equal ones."""
    base = PRESETS["osp"].rotated("quarot")
    assert replace(base).sha256 == base.sha256
    other: dict[str, Any] = {
        "name": "x", "weight_clip": "none", "weight_group": 32, "output_group": "token", "ranges_with_zero": (),
        "residual_rotation": "learned", "query_key_hadamard": "none", "method": "gptq", "calibration_sha256": "0",
    }  # fmt: skip
    pinned = {"full_precision", "arithmetic", "gptq_order", "calibration_draw", "calibration_data"}
    hashes = {base.sha256}
    for field in fields(Protocol):
        value = getattr(base, field.name)
        if field.name in pinned:
            continue
        if field.name not in other:
            other[field.name] = not value if isinstance(value, bool) else value / 2 if isinstance(value, float) else value + 1
        hashes.add(replace(base, **{field.name: other[field.name]}).sha256)
    assert len(hashes) == len(fields(Protocol)) - len(pinned) + 1
    assert replace(base, calibration_data="elsewhere.txt").sha256 == base.sha256  # a path is no text


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_has_the_whole_protocol(tmp_path: Path, name: str) -> None:
    """A protocol written as JSON is read back equal; the text has a line for each knob."""
    path = tmp_path / "p.json"
    path.write_text(json.dumps(asdict(PRESETS[name])))
    assert find_protocol(str(path)) == PRESETS[name] == find_protocol(name)
    assert [line.split()[0] for line in PRESETS[name].text.splitlines()] == [field.name for field in fields(Protocol)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_bits": 9}, "weight_bits is 9: from 2 to 8, or 16"),
        ({"weight_bits": True}, "weight_bits cannot be True"),
        ({"weight_clip": "best"}, "weight_clip cannot be 'best'"),
        ({"activation_clip": 0}, "activation_clip is 0.0; it must be above 0"),
        ({"activation_clip": "1"}, "activation_clip cannot be '1'"),
        ({"ranges_with_zero": ["all"]}, "ranges_with_zero cannot be"),
        ({"ranges_with_zero": "keys"}, "ranges_with_zero cannot be"),
        ({"weight_group": 0}, "weight_group is 0"),
        ({"gptq_act_order": True, "weight_group": 32}, "gptq_act_order with weight_group"),
        ({"clip_norm": 0}, "clip_norm and gptq_damping above 0"),
        ({"colour": 1}, "knobs that do not exist: colour"),
        ({"seed": None, "bits": 4}, "knobs that do not exist: bits, seed"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """A knob that does not exist, or a value that it cannot have, is named."""
    path = tmp_path / "p.json"
    path.write_text(json.dumps(asdict(PRESETS["osp"]) | change))
    with pytest.raises(ConfigError, match=re.escape(says)):
        find_protocol(str(path))


@pytest.mark.parametrize(
    "typo", [{"weight_clip": "MSE"}, {"output_group": "Head"}, {"method": "GPTQ"}, {"residual_rotation": "Hadamard"}]
)
def test_typos_in_python_are_refused(typo: dict[str, Any]) -> None:
    """A value that no file may have, no code may have."""
    with pytest.raises(ConfigError, match="cannot be"):
        replace(PRESETS["osp"], **typo)


def test_a_protocol_leaves_nothing_open(tmp_path: Path) -> None:
    """A file without one of the knobs is refused, and the knob named."""
    values = asdict(PRESETS["osp"])
    del values["clip_norm"]
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="leaves knobs open: clip_norm"):
        find_protocol(str(tmp_path / "p.json"))


def test_rotations_by_name() -> None:
    """--rotate none takes every rotation out but that of queries and keys; quarot keeps the preset's choice across heads."""
    for preset in PRESETS.values():
        none = preset.rotated("none")
        assert (none.residual_rotation, none.value_hadamard, none.ffn_hadamard, none.head_hadamard) == ("none", *[False] * 3)
        assert none.query_key_hadamard == "quantized"
        assert preset.rotated("ffn") == replace(none, ffn_hadamard=True)
    assert PRESETS["quarot"].rotated("quarot") == PRESETS["quarot"]
    assert PRESETS["spinquant"].rotated("spinquant") == PRESETS["spinquant"]
    assert not PRESETS["osp"].rotated("quarot").head_hadamard


def test_weights_alone_decide_what_is_shared() -> None:
    """Settings that differ in activations and cache alone share weights; other weights do not."""
    four = PRESETS["osp"].with_bits("4-4-4").weights_alone
    assert four == PRESETS["osp"].with_bits("4-8-16").weights_alone
    assert four != PRESETS["osp"].with_bits("3-8-16").weights_alone


def test_the_table_in_the_docs_is_true() -> None:
    """docs/fourbit.md has a row for each knob with the value of each preset."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:4] for row in rows if row[0].strip("`") in asdict(PRESETS["osp"])}
    assert list(table) == [field.name for field in fields(Protocol) if field.name != "name"]
    for knob, values in table.items():
        for value, preset in zip(values, PRESETS.values(), strict=True):
            assert value.strip() == json.dumps(asdict(preset)[knob], ensure_ascii=False).strip('"'), (knob, preset.name)
