"""What making a model ternary costs per training step, against plain fine-tuning, AutoBitLinear and onebitllms.

    python bench/tune_step.py out/smollm2-base [--precision bf16 fp32] [--rounds 7] [--compile] [--device cuda --batch 32]

λ rows are the whole of trilobit's step, its loss included; plain and the peers have torch's cross-entropy, as the loss of
transformers has. Peers: transformers' AutoBitLinear, with the norm that it can have, and onebitllms' BitNetLinear, which has
none and runs on CUDA only, where it is installed; a peer that cannot run says why. One run, one table: forward + backward +
clip + AdamW on batch 4 × 256, steps of the variants interleaved, medians; the ratio is the median over rounds of variant /
plain in the same round, and `2.00 × peer` that of peer / variant: the peer takes twice the time. Peak memory is that of a
process of its own per variant (two steps), above the memory of the process before the model was loaded (on CUDA: what
the allocator handed out at most). TFLOP/s counts 6 · parameters · tokens of the matrices, against the bf16 or fp32 matrix
product of this machine in the same run. With --compile, "plain" is compiled too; "plain eager" is there to compare with.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import reason
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from trilobit.config.tune import TuneConfig
from trilobit.surgery.roles import decoder_layers, vocabulary_size
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize
from trilobit.train.distill import cross_entropy
from trilobit.train.head_loss import LateHead
from trilobit.train.loop import autocast, make_optimizer
from trilobit.train.objective import NextToken

LENGTH = 256
PEERS = ("autobitlinear", "onebitllms")
VARIANTS = ("plain", "plain eager", "λ=0.5", "λ=1", *PEERS)


@dataclass(frozen=True)
class Setting:
    """What all variants of a table share."""

    path: str
    compiled: bool
    device: torch.device
    batch: int

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make(variant: str, setting: Setting) -> nn.Module:
    path, compiled = setting.path, setting.compiled
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
    elif variant == "onebitllms":
        from onebitllms import replace_linear_with_bitnet_linear

        model = replace_linear_with_bitnet_linear(model)
    if compiled and variant != "plain eager":
        for _, layer in decoder_layers(model):
            layer.compile()
    return model.to(setting.device).train()


def stepper(variant: str, precision: str, setting: Setting) -> Callable[[], None]:
    model, ours = make(variant, setting), variant.startswith("λ")
    config = TuneConfig(model="", data="")
    optimizer = make_optimizer(model, 1e-5, config)
    vocabulary = vocabulary_size(model)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, vocabulary, (setting.batch, LENGTH + 1), generator=generator).to(setting.device)
    objective = NextToken(model, LateHead(model))

    def step() -> None:
        with autocast(precision, setting.device):
            if ours:
                loss = objective(windows).total
            else:
                loss = cross_entropy(model(input_ids=windows[:, :-1], use_cache=False).logits, windows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        setting.wait()

    return step


def peak_memory(variant: str, precision: str, setting: Setting) -> None:
    before = high_water()
    step = stepper(variant, precision, setting)
    step()
    step()
    on_card = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else 0
    print(json.dumps(on_card or high_water() - before))


def memory_elsewhere(variant: str, precision: str, setting: Setting) -> int | str:
    """peak_memory in a process of its own; of a peer that cannot run: why."""
    command = [sys.executable, __file__, setting.path, "--memory-of", variant, precision]
    command += ["--device", str(setting.device), "--batch", str(setting.batch), *["--compile"] * setting.compiled]
    done = subprocess.run(command, capture_output=True, text=True, check=variant not in PEERS)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else f"its process ended with {done.returncode}"


def high_water() -> int:
    """Largest resident size so far, in bytes (Linux). getrusage would count the parent's, from before exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def matrix_roof(precision: str, setting: Setting) -> float:
    """TFLOP/s of a matrix product, the best of 20: on a CPU with the shapes of SmolLM2's MLP, on a GPU a large one."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows, inner, columns = (1024, 576, 1536) if setting.device.type == "cpu" else (8192, 8192, 8192)
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    a, b = a.to(setting.device), b.to(setting.device)
    times = []
    for _ in range(20):
        setting.wait()
        start = time.perf_counter()
        a @ b
        setting.wait()
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(times) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.variants is None:  # without --compile the two plain ones are the same
        arguments.variants = [v for v in VARIANTS if arguments.compile or v != "plain eager"]
    setting = Setting(arguments.model, arguments.compile, torch.device(arguments.device), arguments.batch)
    torch._dynamo.config.recompile_limit = 32  # six variants, one forward
    if arguments.memory_of:
        try:
            peak_memory(*arguments.memory_of, setting)
        except Exception as error:
            if arguments.memory_of[0] not in PEERS:
                raise
            print(json.dumps(reason(error, arguments.memory_of[0])))
        return
    on = torch.cuda.get_device_name() if setting.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {on}, batch {setting.batch} × {LENGTH}, compile {setting.compiled}")
    print(f"{'':<6}{'variant':<15}{'s/step':>8}{'tokens/s':>10}{'ratio':>8}{'TFLOP/s':>9}{'of roof':>9}{'GB':>7}{'ratio':>7}")
    for precision in arguments.precision:
        memory: dict[str, int | str] = {}
        for variant in [] if arguments.no_memory else arguments.variants:
            memory[variant] = memory_elsewhere(variant, precision, setting)
        failed = {variant: why for variant, why in memory.items() if isinstance(why, str)}
        steps: dict[str, Callable[[], None]] = {}
        for variant in arguments.variants:
            try:
                if variant not in failed:
                    steps[variant] = stepper(variant, precision, setting)
                    steps[variant]()
                    steps[variant]()
            except Exception as error:
                if variant not in PEERS:
                    raise
                steps.pop(variant, None)
                failed[variant] = reason(error, variant)
        seconds: dict[str, list[float]] = {variant: [] for variant in steps}
        for _ in range(arguments.rounds):
            for variant, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[variant].append(time.perf_counter() - start)
        del steps
        roof = matrix_roof(precision, setting)
        matrices = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(arguments.model).parameters() if p.ndim > 1)
        for variant, times in seconds.items():
            median = statistics.median(times)
            ratio = median_ratio(times, seconds["plain"])
            tokens = setting.batch * LENGTH
            flops = 6 * matrices * tokens / median / 1e12
            peak = memory.get(variant, 0)
            relative = peak / memory["plain"] if memory else 0.0
            peers = [peer for peer in PEERS if variant.startswith("λ") and peer in seconds]
            against = ", ".join(f"{median_ratio(seconds[peer], times):.2f} × {peer}" for peer in peers)
            print(
                f"{precision:<6}{variant:<15}{median:>8.3f}{tokens / median:>10.0f}{ratio:>8.3f}{flops:>9.3f}"
                f"{flops / roof:>9.0%}{peak / 1e9:>7.2f}{relative:>7.3f}  {against}".rstrip(),
                flush=True,
            )
        for variant, why in failed.items():
            print(f"{precision:<6}{variant:<15} {why}", flush=True)


if __name__ == "__main__":
    main()
