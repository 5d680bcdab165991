from typing import Any

import pytest

from trilobit.config.pretrain import PretrainConfig
from trilobit.config.tune import TuneConfig
from trilobit.recipes import RECIPES

TUNE, PRETRAIN = RECIPES["tune"], RECIPES["pretrain"]


@pytest.mark.parametrize("name", TUNE)
def test_each_recipe_is_a_configuration(name: str) -> None:
    """Each recipe gives settings that TuneConfig knows and accepts, and says in words where they come from."""
    settings = TUNE[name]()
    config = TuneConfig(model="m", data="d", **settings)
    assert {key: getattr(config, key) for key in settings} == settings
    assert TUNE[name].__doc__
    assert config != TuneConfig(model="m", data="d")


@pytest.mark.parametrize("name", PRETRAIN)
def test_each_pretraining_recipe_is_a_configuration(name: str) -> None:
    """The same of PretrainConfig; those that end in a size name an architecture, too."""
    settings = PRETRAIN[name]()
    given: dict[str, Any] = {"architecture": "a", "data": "d", **settings, "max_tokens": 10**9}
    config = PretrainConfig(**given)
    assert {key: getattr(config, key) for key in settings} == settings
    assert PRETRAIN[name].__doc__
    assert ("architecture" in settings) == name.startswith("osp-")


def test_recipes_are_fresh_and_distinct() -> None:
    """A caller may change what it gets, and no two names stand for the same settings."""
    TUNE["paper"]()["placement"] = "none"
    assert TUNE["paper"]()["placement"] == "every"
    assert len({TuneConfig(model="m", data="d", **recipe()) for recipe in TUNE.values()}) == len(TUNE)
    rows = [repr(sorted(recipe().items())) for recipe in PRETRAIN.values()]
    assert len(set(rows)) == len(rows)
