import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trilobit.errors import ModelError, OutputError
from trilobit.train import checkpoint as checkpoint_module
from trilobit.train.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint


class Tied(nn.Module):
    """An embedding that is also the head, a bias, and a gain of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(self.middle(self.embedding(ids)), 0.5) * self.gain)


def make(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = model(torch.randint(0, 7, (5,))).square().mean()  # data and dropout from the global random state
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_a_loaded_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    """Weights, moments, step counts and random state come back exactly: three more steps, with dropout, are the same."""
    model, optimizer = make(0)
    for _ in range(3):
        step(model, optimizer)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(3, 15, 1.5), keep=1)
    for _ in range(3):
        step(model, optimizer)

    other, other_optimizer = make(1)
    progress = load_checkpoint(path, other, other_optimizer)
    assert progress == Progress(3, 15, 1.5)
    for _ in range(3):
        step(other, other_optimizer)
    for (name, expected), found in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found), name
        for field, value in optimizer.state[expected].items():
            assert torch.equal(value, other_optimizer.state[found][field]), (name, field)


def test_odd_values_survive(tmp_path: Path) -> None:
    """Negative zero, the smallest denormal and infinity come back with their bits."""
    model, optimizer = make(0)
    odd = torch.tensor([-0.0, 1e-45, float("inf"), -1e-45])
    with torch.no_grad():
        model.middle.bias.copy_(odd)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(0, 0, 0.0), keep=1)
    other, other_optimizer = make(1)
    load_checkpoint(path, other, other_optimizer)
    assert torch.equal(other.middle.bias.view(torch.int32), odd.view(torch.int32))


def test_a_tied_parameter_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    """The file has the shared matrix once; loading fills it in place, for both its owners."""
    model, optimizer = make(0)
    step(model, optimizer)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 1, 0.0), keep=1)
    tensors = load_file(path / "model.safetensors")
    assert sorted(tensors) == ["embedding.weight", "gain", "middle.bias", "middle.weight"]
    other, other_optimizer = make(1)
    load_checkpoint(path, other, other_optimizer)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    """A checkpoint is four files, none of them a pickle."""
    model, optimizer = make(0)
    step(model, optimizer)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 1, 0.0), keep=1)
    names = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert {file.name for file in path.iterdir()} == names
    for file in path.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        json.loads(file.read_bytes()[8 : 8 + header])


def test_the_newest_are_kept_in_numerical_order(tmp_path: Path) -> None:
    """`keep` checkpoints remain, and step 10 is newer than step 9."""
    model, optimizer = make(0)
    for number in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, Progress(number, number, 0.0), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-11"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-11"]
    save_checkpoint(tmp_path, model, optimizer, Progress(12, 12, 0.0), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-12"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage) -> None:
    """One changed bit, one missing byte or a missing file is an error that names the file; the model is not touched, and the
    checkpoint is not passed over for an older one or for the beginning."""
    model, optimizer = make(0)
    step(model, optimizer)
    for number in (1, 2):
        path = save_checkpoint(tmp_path, model, optimizer, Progress(number, number, 0.0), keep=2)
    damage(path / name)
    assert list_checkpoints(tmp_path)[-1] == path
    other, other_optimizer = make(1)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ModelError, match=rf"{name} is missing or damaged.*Remove .*step-2"):
        load_checkpoint(path, other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory without a manifest, or under another name, is ignored; a failure while writing leaves the old one alone."""
    model, optimizer = make(0)
    save_checkpoint(tmp_path, model, optimizer, Progress(1, 1, 0.0), keep=1)
    for name in ("step-2", ".step-3.partial-1", "step-x", "step-4.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_json", fail)
    with pytest.raises(OutputError, match=r"step-5: No space left on device\. Nothing was left behind"):
        save_checkpoint(tmp_path, model, optimizer, Progress(5, 5, 0.0), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    assert not list((tmp_path / "checkpoints").glob("*step-5*"))


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less than weights and two moments free, nothing is written and the need is said in numbers."""
    model, optimizer = make(0)
    needed = 12 * sum(p.numel() for p in model.parameters())
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        if fits:
            save_checkpoint(tmp_path, model, optimizer, Progress(1, 1, 0.0), keep=1)
        else:
            with pytest.raises(OutputError, match="A checkpoint needs"):
                save_checkpoint(tmp_path, model, optimizer, Progress(1, 1, 0.0), keep=1)
            assert not (tmp_path / "checkpoints").exists()
