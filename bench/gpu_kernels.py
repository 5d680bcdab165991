"""Each Triton kernel: is it right, and how fast is it beside what torch has for the same?

    python bench/gpu_kernels.py                                     on a GPU: the whole table
    python bench/gpu_kernels.py --peers                             the products of few tokens beside gemlite's, instead
    TRITON_INTERPRET=1 python bench/gpu_kernels.py --device cpu     small shapes in Triton's interpreter: right or not, no times

Right: the bits of quant.py where the kernel is exact (`differs` counts numbers that do not have them), else its error against
float64 as a multiple of the peer's. Fast: the median of calls replayed as a CUDA graph, over operands that together are larger
than the caches, as a rate and as a share of the roof measured in the same run: a copy's bytes a second, torch._int_mm's and a
bf16 product's operations a second at 8192³. Peers are torch's own, and liger-kernel and gemlite where they are installed, with
what they are apart from the same truth. gemlite has a table of its own: it first tunes itself, for a minute or more. `2.00 ×
peer` says that the peer takes twice the time.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import reason
from torch import Tensor, nn

from trilobit import quant
from trilobit.formats import LaneTwoBit
from trilobit.kernels import bf16, dispatch, gpu
from trilobit.quant import Granularity
from trilobit.train.head_loss import head_loss

Call = Callable[[int], object]
EPS = 1e-6
COLD_BYTES = 1 << 28  # what a kernel walks through before it meets the same operand again
GRAPHED, ROUNDS = 20, 15


class Table:
    """Prints rows; on a CPU only whether results are right."""

    def __init__(self, device: torch.device):
        self.device, self.timed = device, device.type == "cuda"
        self.roofs: dict[str, float] = {}

    def measure_roofs(self) -> None:
        size = 8192
        memory = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        codes = torch.ones(size, size, dtype=torch.int8, device=self.device)
        half = codes.bfloat16()
        self.roofs = {
            "GB/s": 2 * memory.numel() / seconds(lambda _: memory.clone()) / 1e9,
            "int8 TOP/s": 2 * size**3 / seconds(lambda _: torch._int_mm(codes, codes.T)) / 1e12,
            "bf16 TFLOP/s": 2 * size**3 / seconds(lambda _: half @ half.T) / 1e12,
        }
        print("roofs: " + ", ".join(f"{value:,.0f} {unit}" for unit, value in self.roofs.items()))

    def row(
        self, name: str, right: str, amount: float, unit: str, ours: Call, peers: dict[str, Call], graphed: bool = True
    ) -> None:
        """amount: giga- or tera-units of work of one call."""
        if not self.timed:
            print(f"{name:<44}{right}", flush=True)
            return
        mine = seconds(ours, graphed)
        against = ", ".join(compared(label, peer, mine, graphed) for label, peer in peers.items())
        rate = amount / mine
        print(
            f"{name:<44}{right:<20}{1e6 * mine:>9.1f} µs {rate:>9,.0f} {unit} ({rate / self.roofs[unit]:.0%})  {against}",
            flush=True,
        )


def seconds(call: Call, graphed: bool = True) -> float:
    """Of one call among several, in a CUDA graph where it can be captured (autograd cannot): the median over replays."""
    for index in range(3):
        call(index)
    torch.cuda.synchronize()

    def several() -> None:
        for index in range(GRAPHED):
            call(index)

    replay = several
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        replay = graph.replay
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / GRAPHED)
    return statistics.median(times)


def compared(label: str, peer: Call, mine: float, graphed: bool) -> str:
    try:
        return f"{seconds(peer, graphed) / mine:.2f} × {label}"
    except Exception as error:  # not a reason to lose the rest of the table
        return f"{label}: {reason(error, label)}"


def differs(*pairs: tuple[Tensor, Tensor]) -> str:
    return f"differs: {sum(int((a != b).sum()) for a, b in pairs)}"


def multiple(ours: Tensor, theirs: Tensor, truth: Tensor) -> str:
    error, baseline = ((found.double() - truth).norm().item() for found in (ours, theirs))
    return f"error {error / max(baseline, 1e-300):.2f} × peer"


def copies(tensor: Tensor, table: Table) -> list[Tensor]:
    """The tensor, so many times that they do not fit a cache."""
    return [tensor.clone() for _ in range(min(64, -(-COLD_BYTES // tensor.nbytes)) if table.timed else 1)]


def norms(table: Table, tokens: int, inputs: int) -> None:
    x, gain = torch.randn(tokens, inputs, device=table.device).bfloat16(), torch.rand(inputs, device=table.device) + 0.5
    xs, shape = copies(x, table), f"{tokens} × {inputs}"
    codes, scale, inverse = gpu.norm_quantize(x, gain, EPS)
    assert inverse is not None
    right = differs(*zip((codes, scale), quant.int8_codes((x.float() * inverse) * gain), strict=True))
    half = gain.bfloat16()
    peers: dict[str, Call] = {
        "F.rms_norm (no int8)": lambda i: F.rms_norm(xs[i % len(xs)], (inputs,), half, EPS),
        "torch, composed": lambda i: quant.int8_codes(quant.rms_norm(xs[i % len(xs)], gain, EPS)),
    }
    ours: Call = lambda i: gpu.norm_quantize(xs[i % len(xs)], gain, EPS)  # noqa: E731
    table.row(f"norm + int8, {shape}", right, 3 * x.numel() / 1e9, "GB/s", ours, peers)

    dnormed = torch.randn_like(x)
    leaves = x.double().requires_grad_(), gain.double().requires_grad_()
    truth = torch.autograd.grad(quant.rms_norm(*leaves, EPS), leaves, dnormed.double())
    leaf, weight = x.clone().requires_grad_(), half.clone().requires_grad_()
    y = F.rms_norm(leaf, (inputs,), weight, EPS)
    theirs = torch.autograd.grad(y, (leaf, weight), dnormed, retain_graph=True)
    found = gpu.norm_backward(x, inverse, gain, dnormed, None)
    peers = {"F.rms_norm": lambda _: torch.autograd.grad(y, (leaf, weight), dnormed, retain_graph=True)}
    ours = lambda i: gpu.norm_backward(xs[i % len(xs)], inverse, gain, dnormed, None)  # noqa: E731
    right = multiple(found[0], theirs[0], truth[0])
    table.row(f"norm backward, {shape}", right, 6 * x.numel() / 1e9, "GB/s", ours, peers, graphed=False)


def training(table: Table, tokens: int, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, device=table.device) * 0.02
    scale, shape = quant.absmean_scale(weight), f"{tokens} × {outputs} × {inputs}"
    codes = gpu.ternarize(weight, scale, 0)
    weights = copies(weight, table)
    table.row(
        f"ternary codes, {outputs} × {inputs}", differs((codes, quant.ternary_codes(weight, scale))), 5 * weight.numel() / 1e9,
        "GB/s", lambda i: gpu.ternarize(weights[i % len(weights)], scale, 0),
        {"torch": lambda i: quant.ternary_codes(weights[i % len(weights)], scale)},
    )  # fmt: skip
    x, half = quant.int8_codes(torch.randn(tokens, inputs, device=table.device)), weight.bfloat16()
    dense = x[0].bfloat16()
    for granularity in ("tensor", "row", "group-128"):
        found, operands = product_check(weight, x, granularity)
        group = quant.group_size(granularity) or 0
        peers: dict[str, Call] = {
            "bf16": lambda _: dense @ half.T,
            "torch._int_mm alone": lambda _, c=operands[2]: dispatch.int8_matmul(x[0], c),
        }
        ours: Call = lambda _, o=operands, g=group: gpu.int8_linear(*o, None, g, torch.bfloat16)  # noqa: E731
        amount = 2 * tokens * outputs * inputs / 1e12
        table.row(f"int8 product, {granularity}, {shape}", found, amount, "int8 TOP/s", ours, peers)


def product_check(
    weight: Tensor, x: tuple[Tensor, Tensor], granularity: Granularity
) -> tuple[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    scale = quant.absmean_scale(weight, granularity)
    operands = *x, quant.ternary_codes(weight, scale, granularity), scale
    found = gpu.int8_linear(*operands, None, quant.group_size(granularity) or 0, torch.float32)
    return differs((found, quant.integer_linear(*operands, None, granularity))), operands


def inference(table: Table, tokens: int, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, device=table.device) * 0.02
    halves, shape = copies(weight.bfloat16(), table), f"{tokens} × {outputs} × {inputs}"
    x = quant.int8_codes(torch.randn(tokens, inputs, device=table.device))
    dense = x[0].bfloat16()
    for granularity in ("tensor", "group-128"):
        _, operands = product_check(weight, x, granularity)
        packed, group = LaneTwoBit.pack(operands[2]), quant.group_size(granularity) or 0
        found = gpu.packed_linear(*x, packed, operands[3], None, group, torch.float32)
        right = differs((found, quant.integer_linear(*operands, None, granularity)))
        lanes, int8s = copies(packed, table), copies(operands[2], table)
        peers: dict[str, Call] = {
            "bf16": lambda i: dense @ halves[i % len(halves)].T,
            "int8 codes": lambda i, o=operands, w=int8s, g=group: gpu.int8_linear(
                *x, w[i % len(w)], o[3], None, g, torch.bfloat16
            ),
        }
        ours: Call = lambda i, o=operands, w=lanes, g=group: gpu.packed_linear(  # noqa: E731
            *x, w[i % len(w)], o[3], None, g, torch.bfloat16
        )
        few = tokens <= gpu.FEW
        amount = packed.nbytes / 1e9 if few else 2 * tokens * outputs * inputs / 1e12
        table.row(f"two-bit, {granularity}, {shape}", right, amount, "GB/s" if few else "int8 TOP/s", ours, peers)


def siblings(table: Table, tokens: int, sizes: tuple[int, ...], inputs: int) -> None:
    """Linears that read the same input, each with a norm of its own, in two launches; the peer is one after the other."""
    x = torch.randn(tokens, inputs, device=table.device).bfloat16()
    gains = torch.rand(len(sizes), inputs, device=table.device) + 0.5
    packed = LaneTwoBit.pack(torch.randint(-1, 2, (sum(sizes), inputs), device=table.device, dtype=torch.int8))
    scale = torch.rand(sum(sizes), 1, device=table.device)
    everything = copies(packed, table)

    def together(i: int) -> Tensor:
        return gpu.merged_linear(x, gains, EPS, everything[i % len(everything)], scale, None, 0, sizes)

    def apart(i: int) -> Tensor:
        parts, scales, found = everything[i % len(everything)].split(sizes), scale.split(sizes), []
        for part, own, gain in zip(parts, scales, gains, strict=True):
            codes, x_scale, _ = gpu.norm_quantize(x, gain, EPS)
            found.append(gpu.packed_linear(codes, x_scale, part, own, None, 0, x.dtype))
        return torch.cat(found, dim=1)

    shape = f"{tokens} × {' + '.join(map(str, sizes))} × {inputs}"
    right, peers = differs((together(0), apart(0))), {"one by one": apart}
    table.row(f"siblings, {shape}", right, packed.nbytes / 1e9, "GB/s", together, peers)


def muon(table: Table, number: int, rows: int, columns: int) -> None:
    x = torch.randn(number, rows, columns, device=table.device).bfloat16() / columns**0.5
    shape = f"{number} of {rows} × {columns}"
    truth, theirs = x.double() @ x.double().mT, torch.bmm(x, x.mT)
    peers: dict[str, Call] = {"torch.bmm": lambda _: torch.bmm(x, x.mT)}
    amount = 2 * number * rows * rows * columns / 1e12
    right = multiple(bf16.gram(x), theirs, truth)
    table.row(f"X·Xᵀ (as a full product), {shape}", right, amount, "bf16 TFLOP/s", lambda _: bf16.gram(x), peers)
    a = bf16.gram(x)
    truth, theirs = a.double() @ a.double() + a.double(), torch.baddbmm(a, a, a)
    peers = {"torch.baddbmm": lambda _: torch.baddbmm(a, a, a)}
    right, amount = multiple(bf16.commuting(a, a, of_a=1.0), theirs, truth), 2 * number * rows**3 / 1e12
    ours: Call = lambda _: bf16.commuting(a, a, of_a=1.0)  # noqa: E731
    table.row(f"A·A + A (as a full product), {shape[: shape.rindex(' ×')]}²", right, amount, "bf16 TFLOP/s", ours, peers)


def loss(table: Table, tokens: int, width: int, vocabulary: int) -> None:
    """Time of loss and gradients, and the most memory that either takes, in MB."""
    hidden = torch.randn(1, tokens, width, device=table.device, dtype=torch.bfloat16).requires_grad_()
    head = (torch.randn(vocabulary, width, device=table.device) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (1, tokens), device=table.device)

    def late() -> list[Tensor]:
        with torch.autocast(table.device.type, torch.bfloat16):
            total = head_loss(hidden, head, targets, None, 0.0, 1.0).total
        return [total, *torch.autograd.grad(total, (hidden, head))]

    def early() -> list[Tensor]:
        with torch.autocast(table.device.type, torch.bfloat16):
            logits = F.linear(hidden, head)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return [total, *torch.autograd.grad(total, (hidden, head))]

    def liger() -> list[Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        with torch.autocast(table.device.type, torch.bfloat16):
            total = LigerFusedLinearCrossEntropyLoss()(head, hidden.flatten(0, 1), targets.flatten())
        return [total, *torch.autograd.grad(total, (hidden, head))]

    def gap(found: list[Tensor]) -> str:
        return f"apart by {max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)):.1e}"

    def cost(call: Callable[[], object]) -> str:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            call()
        end.record()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - before) / 1e6
        return f"{start.elapsed_time(end) / 5:.2f} ms, {memory:,.0f} MB"

    expected = early()
    line = f"{f'head + loss, {tokens} × {width} × {vocabulary}':<44}{gap(late()):<20}"
    if table.timed:
        line += f" ours {cost(late)}, torch {cost(early)},"
    try:
        line += f" liger-kernel {gap(liger())}" + (f", {cost(liger)}" if table.timed else "")
    except Exception as error:
        line += f" liger-kernel: {reason(error, 'liger_kernel')}"
    print(line, flush=True)


def beside_gemlite(table: Table, tokens: int, outputs: int, inputs: int) -> None:
    """The two-bit product beside gemlite's of ternary weights (A8W158), of int8 codes, and with the quantiser in front of both.

    One scale a matrix: gemlite's groups take no int8 activations. Of codes it leaves out the product with the token's scale.
    """
    x, shape = torch.randn(tokens, inputs, device=table.device).bfloat16(), f"{tokens} × {outputs} × {inputs}"
    codes, x_scale = quant.int8_codes(x)
    weight = torch.randn(outputs, inputs, device=table.device) * 0.02
    _, (*_, ternary, scale) = product_check(weight, (codes, x_scale), "tensor")
    truth = quant.integer_linear(codes, x_scale, ternary, scale, None, "tensor")
    lanes = copies(LaneTwoBit.pack(ternary), table)

    def ours(i: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return gpu.packed_linear(codes, x_scale, lanes[i % len(lanes)], scale, None, 0, dtype)

    def ours_quantizing(i: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        own, own_scale, _ = gpu.norm_quantize(x, None, EPS)
        return gpu.packed_linear(own, own_scale, lanes[i % len(lanes)], scale, None, 0, dtype)

    def theirs() -> nn.Module:
        from gemlite import DType, GemLiteLinear

        layer = GemLiteLinear(2, inputs, inputs, outputs, input_dtype=DType.INT8, output_dtype=DType.BF16)
        return layer.pack((ternary + 1).to(torch.uint8), scale.expand(outputs, 1), zeros=1)

    def theirs_quantizing() -> nn.Module:
        from gemlite.helper import A8W158_INT_dynamic

        return A8W158_INT_dynamic(device=table.device, dtype=torch.bfloat16).from_weights(ternary.bfloat16(), scale)

    forms = ("two-bit", ours, theirs, codes), ("int8 + two-bit", ours_quantizing, theirs_quantizing, x)
    for name, mine, make, given in forms:
        right, peers = differs((mine(0, torch.float32), truth)), {}
        try:
            layers = [make() for _ in lanes]
            found = layers[0](given) * (x_scale if given is codes else 1)
            right += f", gemlite apart by {((found - truth).norm() / truth.norm()).item():.1e}"
            peers["gemlite"] = lambda i, layers=layers, given=given: layers[i % len(layers)](given)
        except Exception as error:
            right += f", gemlite: {reason(error, 'gemlite')}"
        table.row(f"{name}, {shape}", right, lanes[0].nbytes / 1e9, "GB/s", mine, peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peers", action="store_true", help="the products of few tokens beside gemlite's, and nothing else")
    arguments = parser.parse_args()
    table = Table(torch.device(arguments.device))
    torch.manual_seed(0)
    if table.timed:
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        table.measure_roofs()
    else:
        gpu.DEVICES = (table.device.type,)
    if arguments.peers:
        for sizes in ((1, 6912, 2560), (1, 2560, 6912), (4, 6912, 2560)) if table.timed else ((1, 64, 320),):
            beside_gemlite(table, *sizes)
    elif table.timed:
        norms(table, 8192, 2048)
        norms(table, 8192, 6912)
        for outputs, inputs in ((2560, 2560), (6912, 2560), (2560, 6912)):
            training(table, 8192, outputs, inputs)
        for tokens in (1, 4, 16, 512, 2048):
            inference(table, tokens, 6912, 2560)
        for sizes in ((2560, 640, 640), (6912, 6912)):
            siblings(table, 1, sizes, 2560)
        muon(table, 24, 2048, 2048)
        muon(table, 24, 2048, 5632)
        loss(table, 8192, 2048, 128_256)
    else:  # one tile or two of everything
        norms(table, 9, 300)
        training(table, 40, 37, 300)
        for tokens in (1, 5, 40):
            inference(table, tokens, 37, 300)
        siblings(table, 1, (16, 32, 5), 300)
        muon(table, 2, 40, 70)
        loss(table, 50, 16, 999)


if __name__ == "__main__":
    main()
