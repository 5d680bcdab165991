"""Headings of --help: everything is below one, and a configuration stays flat."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import pytest

from trilobit.config.export import ExportConfig
from trilobit.config.flags import docstrings, headings, parse_flags
from trilobit.config.pretrain import PretrainConfig
from trilobit.config.quantize import QuantizeConfig
from trilobit.config.tune import TuneConfig

MOST = 14  # flags below one heading


@dataclass(frozen=True, kw_only=True)
class Base:
    HEADINGS: ClassVar[dict[str, str]] = {"colour": "the look", "weight": "what it-weighs"}

    name: str
    """What it
    is called."""
    colour: str = "red"
    """Its colour."""
    weight: float | None = None
    """In kg."""


@dataclass(frozen=True, kw_only=True)
class Derived(Base):
    HEADINGS: ClassVar[dict[str, str]] = {"weight": "what it-weighs", **Base.HEADINGS, "gloss": "the look"}

    colour: str = "blue"
    gloss: bool = False
    """Whether it shines."""


def test_flags_below_headings_make_a_flat_configuration() -> None:
    """Values come from the arguments, the given defaults, the declared ones, in this order, below whatever heading they are."""
    assert asdict(parse_flags(Derived, ["--name", "a", "--gloss"], {"weight": 2.0})) == {
        "name": "a", "colour": "blue", "weight": 2.0, "gloss": True,
    }  # fmt: skip
    assert parse_flags(Derived, ["--colour", "green"], {"name": "given"}) == Derived(name="given", colour="green")


def test_headings_follow_their_dictionary() -> None:
    """Titles stand in the order of HEADINGS; one that begins twice gathers the fields of both places; others are in none."""
    found = {title: [field.name for field in below] for title, below in headings(Derived).items()}
    assert found == {"what it-weighs": ["weight"], "the look": ["colour", "gloss"]}
    assert list(found) == ["what it-weighs", "the look"]


def test_docstrings_are_one_line_and_inherited() -> None:
    """The text under a field, lines joined; a field that is declared anew without one keeps its own."""
    assert docstrings(Derived) == {
        "name": "What it is called.", "colour": "Its colour.", "weight": "In kg.", "gloss": "Whether it shines.",
    }  # fmt: skip


@pytest.mark.parametrize("config", [TuneConfig, PretrainConfig, QuantizeConfig, ExportConfig])
def test_long_helps_have_headings(config: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag of a long command is below one heading or among the few at the top, and none has more than fourteen (old
    code: one list of 55)."""
    monkeypatch.setenv("COLUMNS", "80")
    below = headings(config)
    names = [field.name for group in below.values() for field in group]
    assert len(names) == len(set(names)) >= len(fields(config)) - 4
    assert all(0 < len(group) <= MOST for group in below.values())
    with pytest.raises(SystemExit):
        parse_flags(config, ["--help"], {})
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    places = [shown.index(f" {title} options ") for title in below]
    assert places == sorted(places)
