"""Which rotations a protocol gets: exact in every family that takes them, refused elsewhere, learned ones kept on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, VOCABULARY, build, logits, tokens
from trilobit.errors import ModelError, OutputError, UnsupportedError
from trilobit.fourbit import rotation
from trilobit.fourbit.fake import prepare
from trilobit.fourbit.protocol import PRESETS
from trilobit.fourbit.rotation import MATRIX, learned_rotation
from trilobit.listener import Listener

GAINS_BEHIND = {"gemma3_text", "olmo2"}
SHORT = {"learning_steps": 3, "learning_batch": 2}


class Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int, seconds: float) -> None:
        assert what == "Learning the rotation, tokens" and done <= total
        self.steps.append(done)


def windows(seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in GAINS_BEHIND])
@pytest.mark.parametrize("rotate", ["quarot", "spinquant"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_precision_logits_stay(family: str, rotate: Any, tied: bool) -> None:
    """With every rotation of either column and no quantisation the logits are the original's to 1e-4, tied and untied."""
    protocol = replace(PRESETS["quarot"].with_bits("16-16-16").rotated(rotate), **SHORT)
    model, heard = build(family, tied=tied), Heard()
    before = logits(model, tokens(length=12))
    prepared = prepare(model, protocol, windows(), None, heard)
    with prepared.computing(protocol):
        after = logits(model, tokens(length=12))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert not torch.equal(after, before)
    said = " ".join(heard.notes)
    assert all(part in said for part in ("residual stream of 32", "values:", "across heads", "MLP output"))


@pytest.mark.parametrize("family", sorted(GAINS_BEHIND))
@pytest.mark.parametrize("rotate", ["quarot", "spinquant"])
def test_gains_behind_the_block_are_refused(family: str, rotate: Any) -> None:
    """Gemma 3 and OLMo 2 cannot be turned: an error, and the model is left as it was; ffn alone they take."""
    protocol = replace(PRESETS["osp"].rotated(rotate), **SHORT)
    model = build(family)
    before = logits(model, tokens())
    with pytest.raises(ModelError):
        prepare(model, protocol, windows())
    assert torch.equal(logits(model, tokens()), before)
    prepare(model, PRESETS["osp"].rotated("ffn"))


def test_a_layer_norm_is_refused_under_quarot() -> None:
    """StableLM has LayerNorm, whose mean does not commute with a rotation: refused, by name of what it is."""
    model = build("stablelm")
    with pytest.raises(ModelError, match="LayerNorm"):
        prepare(model, PRESETS["osp"].rotated("quarot"))


def test_a_width_out_of_reach_is_refused() -> None:
    """An MLP of 46, which is no multiple of four: the width is named and `none` offered, and nothing is changed."""
    model = build("llama", intermediate_size=46)
    before = logits(model, tokens())
    with pytest.raises(UnsupportedError, match=r"width 46 .*--rotate none"):
        prepare(model, PRESETS["osp"].rotated("ffn"))
    assert torch.equal(logits(model, tokens()), before)


def test_heads_without_a_matrix_are_said() -> None:
    """Nine heads have no Hadamard matrix: the run goes on without it and says so."""
    heard = Heard()
    model = build("llama", hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4)
    prepare(model, PRESETS["quarot"], None, None, heard)
    assert any("no Hadamard matrix of 9 heads" in note for note in heard.notes)


def test_a_learned_rotation_is_learned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it is read back, bit by bit; other text, weights or budget are learned anew."""
    protocol = replace(PRESETS["spinquant"], **SHORT)
    heard = Heard()
    first, seconds = learned_rotation(build("llama"), protocol, windows(), tmp_path, heard)
    assert seconds == 0
    assert heard.steps == [24, 48, 72]
    assert torch.allclose(first.matrix @ first.matrix.T, torch.eye(32, dtype=torch.float64), atol=1e-9)
    with monkeypatch.context() as patched:
        patched.setattr(rotation, "learn", None)
        again, seconds = learned_rotation(build("llama"), protocol, windows(), tmp_path, heard)
        assert torch.equal(again.matrix, first.matrix) and replace(again, matrix=first.matrix) == first and seconds > 0
    for model, changed, text in (
        (build("llama", seed=1), protocol, windows()), (build("llama"), replace(protocol, learning_steps=4), windows()),
        (build("llama"), protocol, windows(4)),
    ):  # fmt: skip
        assert not torch.equal(learned_rotation(model, changed, text, tmp_path, heard)[0].matrix, first.matrix)
    assert len(list(tmp_path.glob("rotation-*/" + MATRIX))) == 4


def test_a_damaged_rotation_is_refused(tmp_path: Path) -> None:
    """A kept rotation whose bytes changed is named, not used."""
    protocol = replace(PRESETS["spinquant"], **SHORT)
    learned_rotation(build("llama"), protocol, windows(), tmp_path, Heard())
    (kept,) = tmp_path.glob("rotation-*/" + MATRIX)
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(OutputError, match="does not match"):
        learned_rotation(build("llama"), protocol, windows(), tmp_path, Heard())
