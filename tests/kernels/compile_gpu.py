"""Compile every Triton kernel for real processors, on a machine that has none: `python compile_gpu.py [--few] [sm_90 …]`.

Triton's own compiler and the ptxas in its package go all the way to machine code; only running it takes a GPU. The launchers
are called with CPU tensors, and `launch` is replaced by a compilation with the same arguments. Prints a line a kernel: shared
memory in bytes, registers, what of them is kept on the stack, and which instructions it has. TRITON_INTERPRET must be off.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from trilobit.kernels import triton_few, triton_linear, triton_norm, triton_symmetric

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32",
}  # fmt: skip


def compile_for(target: Any, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The kernel as a launch with these arguments on this processor would compile it."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(arguments) :]:
        signature[name], constants[name] = "constexpr", options.pop(name)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def calls(few: bool) -> None:
    """Each launcher with what a model gives it; unless `few`, odd shapes, every granule, few tokens and many too."""
    shapes = [(2560, torch.bfloat16), (576, torch.float32), (301, torch.bfloat16), (8192, torch.bfloat16)]
    for inputs, dtype in shapes[: 1 if few else None]:
        x = torch.zeros(64, inputs, dtype=dtype)
        for gain in (None, torch.ones(inputs), torch.ones(1)):
            _, scale, inverse = triton_norm.norm_quantize(x, gain, 1e-6)
            if gain is not None:
                triton_norm.norm_backward(x, inverse, gain, x, scale[:1] if inputs > 576 else None)
    products = [(512, 2560, 2560), (1, 2560, 2560), (4, 576, 1536), (512, 576, 576), (16, 301, 333), (64, 301, 333)]
    for tokens, outputs, inputs in products[: 2 if few else None]:
        codes, scale = torch.zeros(tokens, inputs, dtype=torch.int8), torch.ones(tokens, 1)
        weight = torch.zeros(outputs, inputs)
        packed = torch.zeros(outputs, -(-inputs // 16) * 4, dtype=torch.uint8)
        granules = {(1, 0): 1, (outputs, 0): 1, (outputs, 64): -(-inputs // 64), (outputs, 128): -(-inputs // 128)}
        for (rows, group), groups in list(granules.items())[: 1 if few else None]:
            weight_scale = torch.ones(rows, groups)
            triton_linear.ternarize(weight, weight_scale, group)
            for bias, dtype in ((None, torch.bfloat16), (torch.ones(outputs), torch.float32))[: 1 if few else None]:
                if tokens <= 16:
                    triton_few.linear(codes, scale, packed, weight_scale, bias, group, dtype)
                else:
                    triton_linear.linear(codes, scale, weight.to(torch.int8), weight_scale, bias, group, dtype, packed=False)
                    triton_linear.linear(codes, scale, packed, weight_scale, bias, group, dtype, packed=True)
    x, sizes = torch.zeros(1, 2560, dtype=torch.bfloat16), (2560, 640, 640)
    for gains in (torch.ones(3, 2560), torch.ones(3, 1))[: 1 if few else None]:  # siblings with norms of their own
        codes, scale, _ = triton_norm.norm_quantize_each(x, gains, 1e-6)
        packed = torch.zeros(sum(sizes), 640, dtype=torch.uint8)
        triton_few.linear_each(codes, scale, packed, torch.ones(sum(sizes), 1), None, 0, (2560, 3200), torch.bfloat16)
    for rows, columns in ((2048, 2048), (576, 1536), (37, 37))[: 1 if few else None]:
        x = torch.zeros(2, rows, columns, dtype=torch.bfloat16)
        triton_symmetric.symmetric(x, x, diagonal=0.5)
        triton_symmetric.symmetric(x.mT.contiguous().mT, x.mT.contiguous().mT)
        if rows == columns:
            triton_symmetric.symmetric(x, x, 0.7, 0.1, 0.2)


def resources(code: bytes) -> str:
    """Registers of a thread and bytes of its stack, as cuobjdump's resource usage has it; empty where that tool is missing."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    return " ".join(re.findall(r"(?:REG|STACK|LOCAL):\d+", said))


def main() -> None:
    seen: set[str] = set()
    arguments = sys.argv[1:]
    few = "--few" in arguments
    for processor in [a for a in arguments if a.startswith("sm_")] or ["sm_80", "sm_90"]:
        target = GPUTarget("cuda", int(processor.removeprefix("sm_")), 32)

        def launch(kernel: Any, grid: Any, *arguments: Any, exact: bool = False, target: Any = target, **options: Any) -> None:
            made = compile_for(target, kernel, arguments, {**options, "enable_fp_fusion": not exact})
            if made.hash not in seen:
                seen.add(made.hash)
                text = made.asm["ptx"]
                found = [name for name in ("dp4a", "wgmma", "mma.sync", "fma.rn.f32") if name in text]
                print(target.arch, kernel.__name__, f"shared {made.metadata.shared}", resources(made.asm["cubin"]), *found)

        for module in (triton_few, triton_linear, triton_norm, triton_symmetric):
            module.launch = launch  # pyright: ignore[reportAttributeAccessIssue]
        calls(few)


if __name__ == "__main__":
    main()
