"""A writer that gets the model wrong is found out by the check of every export and leaves nothing (gguf: test_gguf.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from export.checks import check_here
from export.ggufs import stored
from infer.checkpoints import byte_model, byte_tokenizer
from trilobit.config.export import ExportConfig
from trilobit.errors import VerificationError
from trilobit.export import convert, foreign, verification
from trilobit.export.hf import write_latent
from trilobit.export.source import Source
from trilobit.kernels import native
from trilobit.surgery.ternary import ternarize

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # transformers' bitnet classes
SPECS: dict[str, dict[str, Any]] = {"native": {}, "hf": {"placement": "every"}, "bf16": {"placement": "none"}}
FAULTS = ("scale inverted", "rows permuted", "norm dropped", "gain forgotten")


def byte_latent(folder: Path) -> Path:
    """A model that the engine reads within its limits, whose inserted gains look trained."""
    model = byte_model(max_position_embeddings=128)
    plan = ternarize(model).plan
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path in plan.linears:
            gain = model.get_parameter(f"{path}.rms_norm.weight")
            gain.copy_(torch.rand(gain.shape, generator=generator) + 0.5)
    write_latent(model, plan, byte_tokenizer(), folder)
    return folder


def faulty(source: Source, fault: str) -> Source:
    """`source`, read wrongly: all scales inverted (and back in the range of the others), the rows of one matrix in another
    order, the gains of all inserted norms at one (without any, the last norm's), the gain of one block norm at one."""
    packed, gain, kept = source.packed, source.gain, source.kept
    normed = any(linear.normed for linear in source.plan.linears.values())  # pyright: ignore[reportOptionalMemberAccess]
    norms = {"gain forgotten": "model.layers.0.input_layernorm.weight"}
    if not normed:
        norms["norm dropped"] = "model.norm.weight"

    def wrong_packed(path: str) -> Any:
        right: Any = packed(path)
        if fault == "scale inverted":
            right.scale = 0.001 / right.scale
        elif fault == "rows permuted" and path == "model.layers.1.mlp.down_proj":
            right.codes = right.codes.roll(1, dims=0)
        return right

    def wrong_gain(path: str) -> torch.Tensor:
        return torch.ones_like(gain(path)) if fault == "norm dropped" else gain(path)

    def wrong_kept(name: str) -> torch.Tensor:
        return torch.ones_like(kept(name)) if name == norms.get(fault) else kept(name)

    source.packed, source.gain, source.kept = wrong_packed, wrong_gain, wrong_kept
    return source


@pytest.mark.parametrize("to", SPECS)
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_planted_faults_are_caught(fault: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale inverted, rows permuted, norm dropped, gain forgotten: a VerificationError and no directory. Without a fault the
    same model is written."""
    if to == "native" and not native.available():
        pytest.skip("no C++ compiler has built the kernels")
    monkeypatch.setattr(convert, "verify", check_here)
    monkeypatch.setattr(verification, "PROBE_WINDOWS", dict.fromkeys(verification.PROBE_WINDOWS, 8))
    monkeypatch.setattr(convert, "open_source", lambda *a, **b: faulty(foreign.open_source(*a, **b), fault))
    place = byte_latent(tmp_path / "model") if to == "native" else stored(tmp_path / "model", **SPECS[to])
    config = ExportConfig(model=str(place), out=str(tmp_path / "out"), to=to)  # pyright: ignore[reportArgumentType]
    if fault == "none":
        check = convert.run(config).check
        assert check.prompt and check.ours and check.theirs
        return
    with pytest.raises(VerificationError, match="not left behind"):
        convert.run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
