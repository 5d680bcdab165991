"""Decoding a real model: as it is and in its ternary form, through transformers and on the native engine, interleaved.

    python bench/decode.py MODEL [--run RUN] [--device cuda] [--tokens 64] [--batch 1] [--gemlite]

MODEL: a checkpoint directory. RUN: a finished run of `trilobit tune` on it; without one MODEL is made ternary untrained,
which costs the same, with the norms and without: what they cost, in bytes and in time. The engine runs one sequence on a CPU.
On CUDA a token is one graph; how fast it is without stands beside. GB/s counts the bytes of all weights once a token, as they
lie in memory (for transformers codes are one byte). --gemlite: with gemlite's linears (A8W158) in place of ours, too, where it
is installed: on CUDA, without a RUN. It first tunes itself, for a minute or more.
"""

import argparse
import copy
import statistics
import time
from unittest.mock import patch

import torch
from peers import reason
from torch import nn
from transformers import PreTrainedModel

from trilobit.infer import hf
from trilobit.infer.compiler import compile, why_not_native
from trilobit.infer.engine import Engine
from trilobit.infer.load import load
from trilobit.infer.stored import freeze
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.measure.speed import weight_bytes as read_bytes
from trilobit.nn.packed import PackedLinear
from trilobit.surgery.ternary import TernarySpec, ternarize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gemlite", action="store_true")
    arguments = parser.parse_args()
    models = {"original, bf16": load(arguments.model, device=arguments.device, dtype=torch.bfloat16).model}
    if arguments.run:
        models["ternary"] = load(arguments.run, device=arguments.device, dtype=torch.bfloat16).model
    else:
        for name, placement in (("ternary, untrained", "every"), ("the same without norms", "none")):
            untrained = load(arguments.model)
            ternarize(untrained.model, TernarySpec(placement=placement))
            models[name] = freeze(untrained.model).to(arguments.device)  # pyright: ignore
    prompt = torch.full((arguments.batch, 8), 7, device=arguments.device)
    engines: dict[str, Engine] = {}
    if arguments.device == "cpu" and arguments.batch == 1 and native.available():
        ternary = {name: model for name, model in models.items() if "bf16" not in name and why_not_native(model) is None}
        engines = {f"{name}, engine": Engine(compile(model), None, []) for name, model in ternary.items()}  # pyright: ignore
    if arguments.gemlite and not arguments.run:
        try:
            other = with_gemlite(copy.deepcopy(models["the same without norms"]))
            tokens_per_second(other, prompt, arguments.tokens)
            models["the same, gemlite's linears"] = other
        except Exception as error:
            print(f"{'gemlite':<40} {reason(error, 'gemlite')}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in [*models, *engines]}
    for _ in range(arguments.rounds + 1):
        for name, model in models.items():
            rates[name].append(tokens_per_second(model, prompt, arguments.tokens))
            if arguments.device != "cpu":
                with patch.object(hf, "obstacle", lambda *_: "as asked"):
                    rates.setdefault(f"{name}, no graph", []).append(tokens_per_second(model, prompt, arguments.tokens))
        for name, engine in engines.items():
            start = time.perf_counter()
            list(engine.stream([7] * 8, arguments.tokens, Sampling(temperature=0)))
            rates[name].append(arguments.tokens / (time.perf_counter() - start))
    for name, values in rates.items():
        size = read_bytes(engines[name]) if name in engines else weight_bytes(models[name.removesuffix(", no graph")])
        rate = statistics.median(values[1:])
        steps = rate / arguments.batch
        print(f"{name:<40}{rate:>10.1f} tokens/s{size / 1e6:>10.1f} MB{steps * size / 1e9:>8.2f} GB/s", flush=True)


def with_gemlite(model: PreTrainedModel) -> PreTrainedModel:
    """Its ternary linears replaced, in place, by gemlite's, which tune themselves for one token and not for the prompt."""
    import gemlite
    from gemlite.helper import A8W158_INT_dynamic

    gemlite.set_autotune({"GEMM": "default", "GEMM_SPLITK": "default"})
    processor = A8W158_INT_dynamic(device=model.device, dtype=model.dtype)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, PackedLinear):
            model.set_submodule(name, processor.from_weights(linear.codes.to(model.dtype), linear.scale, linear.bias))
    return model


def tokens_per_second(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    """Of all rows of `prompt` [B, T] together, prompt and capture included."""
    start = time.perf_counter()
    hf.continue_tokens(model, prompt, tokens, ends=False).cpu()
    return tokens * len(prompt) / (time.perf_counter() - start)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    main()
