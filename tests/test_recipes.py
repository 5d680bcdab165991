import pytest

from trilobit.config.tune import TuneConfig
from trilobit.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_a_configuration(name: str) -> None:
    """Each recipe gives settings that TuneConfig knows and accepts, and says in words where they come from."""
    settings = RECIPES[name]()
    config = TuneConfig(model="m", data="d", **settings)
    assert {key: getattr(config, key) for key in settings} == settings
    assert RECIPES[name].__doc__
    assert config != TuneConfig(model="m", data="d")


def test_recipes_are_fresh_and_distinct() -> None:
    """A caller may change what it gets, and no two names stand for the same settings."""
    RECIPES["paper"]()["placement"] = "none"
    assert RECIPES["paper"]()["placement"] == "every"
    assert len({TuneConfig(model="m", data="d", **recipe()) for recipe in RECIPES.values()}) == len(RECIPES)
