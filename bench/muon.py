"""One optimizer step on a model's decoder matrices: trilobit's Muon against torch.optim.Muon and fused AdamW.

    python bench/muon.py [out/smollm2-base] [--rounds 9] [--device cuda] [--step-seconds 100 --step-tokens 65536]

Random gradients; steps of the three are interleaved, the ratio is the median over rounds of ours / torch's in the same round.
TFLOP/s counts what five plain iterations would take (4R²C + 2R³ each), for both: doing with fewer is the point. Without a
directory the matrices are those of SmolLM2-135M. Also printed: where kernels/bf16.py has a kernel, its products alone against
torch.bmm; how far each is from the float64 iteration, on gradients of three spectra; and, given the seconds of forward and
backward on --step-tokens (bench/tune_step.py measures a step), what Muon adds to a whole training step.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trilobit.kernels import bf16
from trilobit.train.muon import ITERATION, PIECE_BYTES, Muon, hidden_matrices, orthogonalize

SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30


def matrices(model: str | None) -> list[tuple[int, int]]:
    if model is None:
        return SMOLLM2
    with torch.device("meta"):
        found = hidden_matrices(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))
    return [(p.shape[-2], p.shape[-1]) for p in found for _ in range(p.shape[:-2].numel())]


def operations(rows: int, columns: int) -> int:
    short, long = sorted((rows, columns))
    return len(ITERATION["quintic"]) * (4 * short * short * long + 2 * short**3)


def oracle(matrix: Tensor) -> Tensor:
    """The iteration as it is written, in float64."""
    x = matrix.double()
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    for a, b, c in ITERATION["quintic"]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def spectra(rows: int, columns: int) -> dict[str, Tensor]:
    """Gradients of flat, decaying and steep singular values."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(rows, rows))[0], torch.linalg.qr(torch.randn(columns, rows))[0]
    values = {"decaying": torch.arange(1, rows + 1) ** -0.5, "steep": torch.logspace(0, -4, rows)}
    return {"flat": torch.randn(rows, columns)} | {name: (left * s) @ right.mT for name, s in values.items()}


def torch_update(matrix: Tensor) -> Tensor:
    """What torch.optim.Muon makes of a gradient, read off one step from zero."""
    weight = nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix.clone()
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    return -weight.detach() / (0.2 * max(matrix.shape) ** 0.5)


def errors(rows: int, columns: int) -> str:
    parts = []
    for name, matrix in spectra(rows, columns).items():
        true = oracle(matrix)
        ours, theirs = (
            (torch.linalg.vector_norm(x.double() - true) / torch.linalg.vector_norm(true)).item()
            for x in (orthogonalize(matrix[None])[0], torch_update(matrix))
        )
        parts.append(f"{name} {ours:.4f} / {theirs:.4f}")
    return f"{rows} × {columns}: " + ", ".join(parts)


def seconds_of(multiply: Callable[[], Tensor], times: int = 16) -> float:
    """The shortest of some, torch's threads asleep at first: after an operator they wait actively for the next."""
    time.sleep(0.02)
    found = []
    for _ in range(times):
        start = time.perf_counter()
        multiply()
        found.append(time.perf_counter() - start)
    return min(found)


def products(rows: int, columns: int, rounds: int) -> str:
    """As many X·Xᵀ and P·X as are iterated at once: the kernel's time in torch.bmm's, its rate in full products (2R²C)."""
    count = max(1, PIECE_BYTES * torch.get_num_threads() // (2 * rows * columns))
    x, number = torch.randn(count, rows, columns).bfloat16(), count * 2 * rows * rows * columns
    p = bf16.gram(x)
    cases = {
        "X·Xᵀ": (lambda: bf16.gram(x), lambda: torch.bmm(x, x.mT)),
        "P·X": (lambda: bf16.apply(p, x), lambda: torch.bmm(p, x)),
    }
    parts = []
    for name, (ours, theirs) in cases.items():
        pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)]
        ratio, rate = statistics.median(a / b for a, b in pairs), number / statistics.median(a for a, _ in pairs) / 1e12
        parts.append(
            f"{name} {ratio:.2f} ({rate:.2f} TFLOP/s, torch {number / statistics.median(b for _, b in pairs) / 1e12:.2f})"
        )
    return f"{rows} × {columns}: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step-seconds", type=float)
    parser.add_argument("--step-tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    shapes = matrices(arguments.model)
    generator = torch.Generator(arguments.device).manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=generator, device=arguments.device) * 0.02) for s in shapes]
    gradients = [torch.randn(s, generator=generator, device=arguments.device) * 1e-3 for s in shapes]
    optimizers = {
        "trilobit": Muon([{"params": weights, "muon": True}], 1e-3, (0.9, 0.95), weight_decay=0.01),
        "… iterated in fp32": Muon(
            [{"params": weights, "muon": True}], 1e-3, (0.9, 0.95), weight_decay=0.01, compute=torch.float32
        ),
        "… momentum in int8": Muon([{"params": weights, "muon": True}], 1e-3, (0.9, 0.95), weight_decay=0.01, state="int8"),
        "torch.optim.Muon": torch.optim.Muon(weights, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "AdamW, fused": torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01, fused=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(arguments.rounds + 1):
        for name, optimizer in optimizers.items():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first makes the state
                seconds[name].append(time.perf_counter() - start)
    work = sum(operations(*shape) for shape in shapes)
    print(f"{len(shapes)} matrices, {sum(r * c for r, c in shapes) / 1e6:.0f} M weights, {arguments.rounds} rounds")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["torch.optim.Muon"], strict=True))
        rate = f"{work / statistics.median(times) / 1e12:.2f} TFLOP/s" if "AdamW" not in name else ""
        print(f"{name:<20} {statistics.median(times):8.4f} s   {ratio:5.2f} of torch.optim.Muon   {rate}")
    if arguments.step_seconds:
        ours, adamw = (statistics.median(seconds[name]) for name in ("trilobit", "AdamW, fused"))
        whole = (arguments.step_seconds + ours) / (arguments.step_seconds + adamw)
        print(f"a step of {arguments.step_tokens:,} tokens with Muon: {whole:.3f} of AdamW's")
    if arguments.device == "cpu" and bf16.available():
        print("products alone, time in torch.bmm's:")
        for shape in sorted({tuple(sorted(s)) for s in shapes}):
            print(" ", products(*shape, arguments.rounds))
    print("relative error against the float64 iteration, trilobit / torch.optim.Muon:")
    for shape in sorted({tuple(sorted(s)) for s in shapes}):
        print(" ", errors(*shape))


if __name__ == "__main__":
    main()
