"""What making a model ternary costs per training step, against plain fine-tuning and transformers' AutoBitLinear.

    python bench/tune_step.py out/smollm2-base [--precision bf16 fp32] [--rounds 7] [--compile]

λ rows are the whole of trilobit's step, its loss included; plain and the peer have torch's cross-entropy, as the loss of
transformers has. One run, one table: forward + backward + clip + AdamW on batch 4 × 256, steps of the variants
interleaved, medians; the ratio is the median over rounds of variant / plain in the same round. Peak memory is that of a
process of its own per variant (two steps), above the memory of the process before the model was loaded. TFLOP/s counts
6 · parameters · tokens of the matrices, against the bf16 or fp32 matrix product of this machine in the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from trilobit.config.tune import TuneConfig
from trilobit.surgery.roles import decoder_layers, vocabulary_size
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize
from trilobit.train.distill import cross_entropy, mixed_loss
from trilobit.train.loop import autocast, make_optimizer

BATCH, LENGTH = 4, 256
VARIANTS = ("plain", "plain eager", "λ=0.5", "λ=1", "autobitlinear")


def make(variant: str, path: str, compiled: bool) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if variant.startswith("λ"):
        ternarize(model, TernarySpec(placement="every", activations="int8"))
        layers = len(decoder_layers(model))
        strength = float(variant.removeprefix("λ="))
        set_strengths(model, [strength] * layers, [strength] * layers)
    elif variant == "autobitlinear":
        for name, linear in list(model.named_modules()):
            if type(linear) is nn.Linear and name != "lm_head":
                bias = linear.bias is not None
                peer = AutoBitLinear(linear.in_features, linear.out_features, bias, online_quant=True, use_rms_norm=True)
                peer.load_state_dict(linear.state_dict(), strict=False)
                model.set_submodule(name, peer)
    if compiled and variant != "plain eager":
        for _, layer in decoder_layers(model):
            layer.compile()
    return model.train()


def stepper(model: nn.Module, precision: str, ours: bool) -> Callable[[], None]:
    config = TuneConfig(model="", data="")
    optimizer = make_optimizer(model, 1e-5, config)
    vocabulary = vocabulary_size(model)
    windows = torch.randint(0, vocabulary, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with autocast(precision, torch.device("cpu")):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
            loss = mixed_loss(logits, windows[:, 1:], None, 0.0, 1.0).total if ours else cross_entropy(logits, windows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory(variant: str, path: str, precision: str, compiled: bool) -> None:
    before = high_water()
    step = stepper(make(variant, path, compiled), precision, variant.startswith("λ"))
    step()
    step()
    print(json.dumps(high_water() - before))


def high_water() -> int:
    """Largest resident size so far, in bytes (Linux). getrusage would count the parent's, from before exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def matrix_roof(precision: str) -> float:
    """TFLOP/s of a 1024 × 1536 × 576 product, the best of 20."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 576 * 1536 / min(times) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.variants is None:  # without --compile the two plain ones are the same
        arguments.variants = [v for v in VARIANTS if arguments.compile or v != "plain eager"]
    if arguments.memory_of:
        peak_memory(arguments.memory_of[0], arguments.model, arguments.memory_of[1], arguments.compile)
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, batch {BATCH} × {LENGTH}, compile {arguments.compile}")
    print(f"{'':<6}{'variant':<15}{'s/step':>8}{'tokens/s':>10}{'ratio':>8}{'TFLOP/s':>9}{'of roof':>9}{'GB':>7}{'ratio':>7}")
    for precision in arguments.precision:
        steps = {
            v: stepper(make(v, arguments.model, arguments.compile), precision, v.startswith("λ")) for v in arguments.variants
        }
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {variant: [] for variant in steps}
        for _ in range(arguments.rounds):
            for variant, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[variant].append(time.perf_counter() - start)
        del steps
        roof = matrix_roof(precision)
        memory: dict[str, int] = {}
        for variant in [] if arguments.no_memory else arguments.variants:
            command = [sys.executable, __file__, arguments.model, "--memory-of", variant, precision]
            command += ["--compile"] if arguments.compile else []
            memory[variant] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        matrices = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(arguments.model).parameters() if p.ndim > 1)
        for variant, times in seconds.items():
            median = statistics.median(times)
            ratio = statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
            flops = 6 * matrices * BATCH * LENGTH / median / 1e12
            peak = memory.get(variant, 0)
            relative = peak / memory["plain"] if memory else 0.0
            print(
                f"{precision:<6}{variant:<15}{median:>8.2f}{BATCH * LENGTH / median:>10.0f}{ratio:>8.3f}{flops:>9.3f}"
                f"{flops / roof:>9.0%}{peak / 1e9:>7.2f}{relative:>7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
