"""Names of architectures: those of ours, misspelt ones, and what is somebody else's."""

from unittest.mock import Mock

import pytest

from trilobit.errors import ModelError
from trilobit.infer import hub
from trilobit.train.architecture import read_architecture
from trilobit.train.shape import shape_config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What the hub is asked; it has nothing."""
    ask = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(hub, "HfApi", Mock(return_value=Mock(model_info=ask)))
    return ask


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-9b", "there is no architecture 'llama-9b'; did you mean llama-8b"),
        ("lama-60m", "did you mean llama-60m"),
        ("llama-something-else", "there is no architecture 'llama-something-else'. Ours are llama-3m"),
        ("osp-60m", r"it is a recipe, --recipe osp-60m \(of llama-60m\)"),
    ],
)
def test_what_looks_like_ours_is_not_looked_for(name: str, says: str, asked: Mock) -> None:
    """A misspelt name is refused with the nearest one, and no network is asked (old code: half a minute of it)."""
    with pytest.raises(ModelError, match=says):
        shape_config(name, 512)
    assert not asked.called


def test_of_pretraining_the_large_ones_are_none() -> None:
    """llama-8b is planned and not trained: `pretrain` does not offer it."""
    with pytest.raises(ModelError, match=r"Ours are llama-3m, llama-60m, llama-135m, llama-1\.4b;"):
        read_architecture("llama-8b", 512)


def test_other_names_are_asked_of_the_hub(asked: Mock) -> None:
    """gpt2 has no slash and is no name of ours; a place that is not there is refused without asking."""
    with pytest.raises(ModelError, match="gpt2 is not a directory here, and the hub cannot be reached"):
        read_architecture("gpt2", 512)
    asked.assert_called_once()
    with pytest.raises(ModelError, match=r"there is no \./llama-60m"):
        read_architecture("./llama-60m", 512)
    asked.assert_called_once()


def test_ours_have_the_positions_they_see() -> None:
    """A model that was trained on windows of 48 tokens promises no more: others measure it at what it promises."""
    assert read_architecture("llama-3m", 48).max_position_embeddings == 48
    assert shape_config("llama-1.4b", 512).max_position_embeddings == 512
