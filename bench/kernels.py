"""The ternary linear against the plain one: is it right on this device, and what does it cost forward and backward?

    python bench/kernels.py [--device cuda] [--tokens 8192] [--precision bf16] [--compile]

Right: codes and scales on the device equal those of a CPU bit for bit, the product at λ = 1 equals quant.integer_linear's,
and output and gradients are compared with float64 (error as a multiple of a plain linear's in the same precision).
Cost: median of 20 forward + backward, against F.linear with a norm in front (what the surgery adds to), interleaved.
Shapes are those of SmolLM2-135M and of a 2 B model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trilobit import quant
from trilobit.kernels.dispatch import int8_choice, integer_linear
from trilobit.kernels.ternary_linear import Rule, ternary_linear
from trilobit.quant import Granularity

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2560, 2560), (6912, 2560), (2560, 6912)]  # outputs × inputs
GRANULARITIES: list[Granularity] = ["tensor", "row", "group-128"]
EPS = 1e-6


def check_codes(device: torch.device) -> int:
    """Number of codes, scales and integer products that differ between the device and a CPU, over all shapes."""
    wrong = 0
    for (outputs, inputs), granularity in ((shape, g) for shape in SHAPES[:3] for g in GRANULARITIES):
        weight, x = torch.randn(outputs, inputs) * 0.02, torch.randn(64, inputs) * 3
        scale = quant.absmean_scale(weight, granularity)
        codes = quant.ternary_codes(weight, scale, granularity)
        levels, token_scale = quant.int8_codes(x)
        y = quant.integer_linear(levels, token_scale, codes, scale, None, granularity)
        there = quant.absmean_scale(weight.to(device), granularity)
        other = quant.ternary_codes(weight.to(device), scale.to(device), granularity)
        other_levels, other_token_scale = quant.int8_codes(x.to(device))
        product = integer_linear(
            levels.to(device), token_scale.to(device), codes.to(device), scale.to(device), None, granularity
        )  # fmt: skip
        pairs = [(scale, there), (codes, other), (levels, other_levels), (token_scale, other_token_scale), (y, product)]
        wrong += sum((a != b.cpu()).sum().item() for a, b in pairs)
    return int(wrong)


def errors(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of output and gradients at λ = 1 against float64, as a multiple of the plain linear's."""
    outputs, inputs = shape
    x, weight, gain = torch.randn(256, inputs), torch.randn(outputs, inputs) * 0.02, torch.rand(inputs) + 0.5
    dy = torch.randn(256, outputs)

    def run(ternary: bool, where: torch.device, working: torch.dtype) -> list[Tensor]:
        leaves = [t.to(where, working).requires_grad_() for t in (x, weight, gain)]
        with torch.autocast(where.type, dtype, enabled=dtype == torch.bfloat16 and working == torch.float32):
            if ternary:
                y = ternary_linear(leaves[0], leaves[1], None, leaves[2], Rule("tensor", True, EPS), 1.0, 1.0)
            else:
                y = F.linear(quant.rms_norm(leaves[0], leaves[2], EPS), leaves[1])
        return [t.double().cpu() for t in (y, *torch.autograd.grad(y, leaves, dy.to(where, y.dtype)))]

    def relative(ternary: bool) -> list[float]:
        truth, got = run(ternary, torch.device("cpu"), torch.float64), run(ternary, device, torch.float32)
        return [((a - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True)]

    return max(ours / theirs for ours, theirs in zip(relative(True), relative(False), strict=True))


def milliseconds(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median time of each call, interleaved."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 3):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if index >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=None, help="default: 8192 on CUDA, 1024 on CPU")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    tokens = arguments.tokens or (8192 if device.type == "cuda" else 1024)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {arguments.precision}, compile {arguments.compile}")
    choice = int8_choice(device.type)
    print(f"int8 product: {choice.name} ({choice.reason})")
    print(f"codes, scales, products that differ from a CPU's: {check_codes(device)}")
    print(f"largest error at λ = 1 / error of a plain linear: {max(errors(shape, device, dtype) for shape in SHAPES[:3]):.2f}")
    print(f"{'outputs × inputs':<18}{'norm + linear, ms':>18}{'λ = 0.5':>10}{'λ = 1':>10}   ratio to norm + linear")
    torch._dynamo.config.recompile_limit = 4 * len(SHAPES)
    for outputs, inputs in SHAPES[: arguments.shapes]:
        x = torch.randn(tokens, inputs, device=device, dtype=dtype).requires_grad_()
        weight = (torch.randn(outputs, inputs, device=device) * 0.02).requires_grad_()
        gain = torch.ones(inputs, device=device).requires_grad_()
        half = torch.full((), 0.5, device=device)
        dy = torch.randn(tokens, outputs, device=device, dtype=dtype)

        def plain(x: Tensor = x, weight: Tensor = weight, gain: Tensor = gain) -> Tensor:
            return F.linear(F.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), EPS), weight)

        def ternary(strength: float | Tensor, x: Tensor = x, weight: Tensor = weight, gain: Tensor = gain) -> Tensor:
            return ternary_linear(x, weight, None, gain, Rule("tensor", True, EPS), strength, strength)

        if arguments.compile:
            plain, ternary = torch.compile(plain, dynamic=False), torch.compile(ternary, dynamic=False)

        def both(forward: Callable[[], Tensor], dy: Tensor = dy, leaves: tuple[Tensor, ...] = (x, weight, gain)) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
                y = forward()
            torch.autograd.grad(y, leaves, dy)

        found = milliseconds(
            {
                "plain": lambda p=plain, b=both: b(p),
                "λ=0.5": lambda t=ternary, b=both, h=half: b(lambda: t(h)),
                "λ=1": lambda t=ternary, b=both: b(lambda: t(1.0)),
            },
            device, arguments.rounds,
        )  # fmt: skip
        a, b, c = found["plain"], found["λ=0.5"], found["λ=1"]
        print(f"{f'{outputs} × {inputs}':<18}{a:>18.3f}{b:>10.3f}{c:>10.3f}   {b / a:.2f}, {c / a:.2f}", flush=True)


if __name__ == "__main__":
    main()
