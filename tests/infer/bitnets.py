"""Small checkpoints in transformers' `bitnet` format, written with its own packing and quantiser, and its reading of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from families import build
from infer.checkpoints import BYTES, byte_tokenizer

FORMS = ("bitlinear", "autobitlinear", "online")
BITNET = {"tied": True, "hidden_act": "relu2"}  # the class of BitNet-b1.58-2B-4T


def stored(name: str, weight: Tensor, form: str, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a quantised linear."""
    from transformers.integrations.bitnet import WeightQuant, pack_weights

    if form == "online":
        tensors = {"weight": weight, "bias": bias}
    else:
        with torch.compiler.set_stance("force_eager"):
            quantized = WeightQuant.apply(weight)
        assert isinstance(quantized, Tensor)
        scale = quantized.abs().max().reshape(1)
        inverted = form == "bitlinear"
        tensors = {
            "weight": pack_weights(quantized.sign()),
            "weight_scale": scale.reciprocal() if inverted else scale,
            "bias": bias if bias is None or inverted else bias / scale,
        }
    return {f"{name}.{key}": value for key, value in tensors.items() if value is not None}


def write_bitnet(
    folder: Path, form: str, family: str = "llama", *, norms: bool = False, skip: list[str] | None = None,
    dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0, **settings: Any,
) -> Path:  # fmt: skip
    """A random model of `family` as a `bitnet` checkpoint. skip: modules_to_not_convert."""
    options = {"vocab_size": BYTES, "num_hidden_layers": 2, "max_position_embeddings": 128, **settings}
    model = build(family, tied=tied, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: p.detach().to(dtype).clone() for n, p in model.named_parameters()}
    left = ["lm_head"] if skip is None else skip
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in tensors and should_convert_module(name, left):
            weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
            tensors |= stored(name, weight.float(), form, bias)
            if norms:
                tensors[f"{name}.rms_norm.weight"] = torch.rand(module.in_features, generator=generator) + 0.5
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    quantization: dict[str, Any] = {"quant_method": "bitnet", "use_rms_norm": norms, "rms_norm_eps": 1e-5}
    quantization["linear_class"] = "autobitlinear" if form == "online" else form
    quantization["quantization_mode"] = "online" if form == "online" else "offline"
    if skip is not None:
        quantization["modules_to_not_convert"] = skip
    config = {**model.config.to_dict(), "quantization_config": quantization, "architectures": [type(model).__name__]}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    return folder


def stock(folder: Path) -> PreTrainedModel:
    """transformers' reading, in fp32. (It leaves some tensors of a bf16 checkpoint bf16.)"""
    with torch.compiler.set_stance("force_eager"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.eval()


def windows(count: int = 16, length: int = 64) -> Tensor:
    return torch.randint(3, BYTES, (count, length + 1), generator=torch.Generator().manual_seed(5))
