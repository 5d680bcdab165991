"""What a native model's header may say, and which tensors it must have."""

from typing import Any

import pytest

from trilobit.errors import ModelError
from trilobit.infer.graph import Header

HEADER = Header(
    width=32, hidden=64, heads=4, kv_heads=2, head_size=8, layers=2, vocabulary=300, positions=128, eps=1e-6,
    attention_scale=0.35, rotary_scale=1.0, gate="silu", windows=[0, 7], rotary=[True, False], layout="base-3", group=0,
    activations="token", norm_eps=1e-6, ternary_head=False, head_group=32, ternary_embedding=False,
)  # fmt: skip


def test_a_header_survives_json() -> None:
    """from_json gives back what to_json wrote, and a value of another kind or size is refused with its name or reason."""
    assert Header.from_json(HEADER.to_json()) == HEADER
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"width": "32"}, "width = '32'"), ({"width": True}, "width = 'True'"), ({"width": 32.0}, "width"),
        ({"eps": "0"}, "eps"),
        ({"eps": None}, "eps"), ({"eps": float("nan")}, "eps"), ({"eps": 1e31}, "eps"), ({"gate": "gelu"}, "gate"),
        ({"gate": ["silu"]}, "gate"), ({"layout": "int4"}, "layout"), ({"windows": 0}, "windows"),
        ({"windows": [0, "1"]}, "windows"),
        ({"rotary": [1, 1]}, "rotary"), ({"ternary_head": 1}, "ternary_head"), ({"activations": "token "}, "activations"),
        ({"width": 0}, "no model has"), ({"heads": -4}, "no model has"), ({"layers": 3}, "no model has"),
        ({"windows": []}, "no model has"), ({"windows": [0, -1]}, "no model has"), ({"windows": [0, 1 << 31]}, "no model has"),
        ({"vocabulary": 1 << 24}, "no model has"), ({"hidden": 1 << 20}, "no model has"), ({"positions": 0}, "no model has"),
        ({"layout": "int8"}, "no model has"), ({"activations": "int16"}, "no model has"), ({"group": -1}, "no model has"),
        ({"layers": 0, "windows": [], "rotary": []}, "no model has"), ({"colour": 1}, "does not list the fields"),
    ]  # fmt: skip
    for change, says in wrong:
        with pytest.raises(ModelError, match=says):
            Header.from_json(HEADER.to_json() | change)
    for value in (None, [], "x", {}, {key: v for key, v in HEADER.to_json().items() if key != "width"}):
        with pytest.raises(ModelError, match="does not list the fields"):
            Header.from_json(value)
