"""Checks of exports are processes of their own, forked where the test is not marked `interpreter`."""

import pytest

import forked
from trilobit.export import llama_cpp, verification


@pytest.fixture(autouse=True)
def processes_are_forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("interpreter") is None:
        for module in (verification, llama_cpp):
            forked.stand_in(module, set_attribute=monkeypatch.setattr)
