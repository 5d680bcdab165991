"""`tune` of a model that is ternary already, by other people's hands: it goes on at λ = 1 as what it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from infer.bitnets import BITNET, write_bitnet
from infer.ggufs import write_gguf
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError
from trilobit.infer.load import load, load_pretrained
from trilobit.nn.ternary import ternary_modules
from trilobit.train.tune import run

# transformers' bitnet classes compile a function, and importing the compiler of torch 2.13 warns of torch's own code
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
AS_IT_IS: dict[str, Any] = {"schedule": "immediate", "distill": "none", "placement": "none"}


def config(folder: Path, model: Path, **settings: Any) -> TuneConfig:
    text = folder / "text.txt"
    text.write_text("Sphinx of black quartz, judge my vow. " * 60)
    defaults: dict[str, Any] = {
        "model": str(model), "data": str(text), "out": str(folder / "run"), "cache_dir": str(folder / "cache"),
        "sequence_length": 16, "sequences": 2, "batch_tokens": 64, "max_tokens": 640, "eval_tokens": 256,
        "precision": "fp32", "lr": 3e-3, "device": "cpu", "store": "fp32",
    }  # fmt: skip
    return TuneConfig(**{**defaults, **settings})


@pytest.mark.parametrize("form", ["bitlinear", "online"])
def test_it_is_trained_on_from_what_it_is(tmp_path: Path, form: str) -> None:
    """The first loss is that of the stored model, training lowers it, and model/ is stock software's again."""
    model = write_bitnet(tmp_path / "theirs", form, "bitnet", **BITNET)
    result = run(config(tmp_path, model, **AS_IT_IS))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {row["lambda"] for row in rows} == {1.0}
    assert result.nats_per_token < result.base_nats_per_token - 0.1
    assert result.form == "autobitlinear"
    modules = dict(ternary_modules(load_pretrained(str(model), trainable=True).model))
    assert result.ternary_parameters == sum(module.weight.numel() for module in modules.values())  # pyright: ignore
    assert load(tmp_path / "run").plan == load(model).plan


def test_what_it_is_has_to_be_said(tmp_path: Path) -> None:
    """Settings that would make another model of it, or another start, are refused with the flags that fit."""
    model = write_bitnet(tmp_path / "theirs", "autobitlinear", norms=True)
    flags = "--schedule immediate --distill none --placement every --activations int8 --scale tensor --cover projections"
    for settings in ({}, {"schedule": "immediate"}, {**AS_IT_IS}, {**AS_IT_IS, "placement": "every", "scale": "row"}):
        with pytest.raises(ConfigError, match=flags):
            run(config(tmp_path, model, **settings))
    fitting = {**AS_IT_IS, "placement": "every"}
    with pytest.raises(ConfigError, match="drop --activation-schedule"):
        run(config(tmp_path, model, **fitting, activation_schedule="global"))
    with pytest.raises(ConfigError, match="drop --dead-zone-bias"):
        run(config(tmp_path, model, **fitting, dead_zone_bias=1e-3))
    assert not (tmp_path / "run").exists()


def test_a_gguf_file_is_trained_on(tmp_path: Path) -> None:
    """Scales of groups and full-precision activations, as the file has them; model/ is an ordinary checkpoint again."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = write_gguf(tmp_path / "theirs.gguf", "qwen3", "q2_0", **sizes).path
    settings = {**AS_IT_IS, "scale": "group-64", "activations": "none"}
    result = run(config(tmp_path, model, **settings))
    assert result.form == "dense"
    assert result.nats_per_token < result.base_nats_per_token - 0.1
    assert load(tmp_path / "run").plan == load(model).plan
    with pytest.raises(ConfigError, match="--activations none --scale group-64"):
        run(config(tmp_path, model, **AS_IT_IS, out=str(tmp_path / "other")))
