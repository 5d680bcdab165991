"""`trilobit doctor`: what computes here, why, how fast memory is, and what would be faster."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trilobit import __version__
from trilobit.config.doctor import DoctorConfig
from trilobit.infer.loaded import pick_device
from trilobit.kernels import build, native
from trilobit.kernels.frozen_linear import layout
from trilobit.listener import SILENT, Listener
from trilobit.measure.speed import read_rate
from trilobit.train.precision import decide_precision

if TYPE_CHECKING:
    from trilobit.train.plan import Plan

ROOF_BYTES = 512 << 20
TERNARY_2B = 0.52e9  # bytes a token of a model of two billion parameters, head included


@dataclass(frozen=True)
class DoctorResult:
    """What was found. threads: torch's, and the engine's by default; cores: that this process may use; bandwidth: bytes a
    second that memory gives to reads; precision: of training by default, and why; advice: what would be faster."""

    version: str
    processor: str
    threads: int
    cores: int
    torch: str
    cuda: str | None
    kernels: str
    reason: str
    instruction_sets: list[str]
    layout: str | None
    bandwidth: float | None
    precision: str
    advice: list[str]

    def summary(self) -> str:
        """For people."""
        lines = [
            f"trilobit     {self.version}, torch {self.torch}",
            f"processor    {self.processor}, {counted(self.threads, 'thread')} on {counted(self.cores, 'core')}",
            f"GPU          {self.cuda or 'none that torch can use'}",
            f"kernels      {self.kernels}: {self.reason}",
        ]
        if self.bandwidth is not None:
            others = ", ".join(name for name in self.instruction_sets if name != self.kernels) or "nothing else"
            lines += [
                f"also here    {others} (--instructions)",
                f"layout       {self.layout}",
                f"memory       {self.bandwidth / 1e9:.1f} GB/s just now, enough for about "
                f"{self.bandwidth / TERNARY_2B:.0f} tokens/s of a ternary model of 2 B parameters",
            ]
        lines.append(f"training     {self.precision} (--precision)")
        lines += [f"faster       {line}" for line in self.advice] or ["faster       nothing that can be done here"]
        return "\n".join(lines)


def processor_name() -> str:
    """The processor's name, as the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    named = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def counted(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def usable_cores() -> int:
    """Cores that this process may run on. The hardware threads of one are one."""
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    files = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in processors]
    return len({file.read_text("utf-8") if file.exists() else str(file) for file in files})


def thread_advice(threads: int, cores: int) -> list[str]:
    """What to do where torch has fewer threads than cores."""
    if threads >= cores:
        return []
    limit = os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS is {limit}: unset it" if limit else f"set OMP_NUM_THREADS={cores}"
    return [f"all cores: {counted(threads, 'thread')} of {cores} {'is' if threads == 1 else 'are'} used ({why})"]


def advice(sets: list[str], bandwidth: float | None) -> list[str]:
    """What would make ternary models faster than they are here."""
    if not sets:
        what = "reinstall where there is a C++ compiler" if not build.SOURCES.is_dir() else "python -m trilobit.kernels.build"
        return [f"native kernels: {native.choice().reason}; {what}"]
    found: list[str] = []
    if build.machine() == "x86_64" and "avx512vbmi" not in sets:
        found.append("a processor with AVX-512 VBMI reads 1.6 bits a weight instead of 2 at the same speed")
    if sets == ["scalar"]:
        found.append("this processor has none of the instruction sets that the kernels are written for")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[never]" in huge.read_text("utf-8"):
        found.append("huge pages are switched off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    return found


def run(config: DoctorConfig, listener: Listener = SILENT) -> "DoctorResult | Plan":
    """`trilobit doctor`. With --plan, raises ConfigError where the model cannot fit."""
    if config.plan is not None:
        from trilobit.train.plan import Load, plan, require_fitting
        from trilobit.train.shape import read_shape

        load = Load(
            config.sequence_length, config.sequences, config.accumulation, config.optimizer, config.recompute, config.teacher,
            config.optimizer_state, config.gradients, config.offload,
        )  # fmt: skip
        shape = read_shape(config.plan, config.sequence_length)
        found = plan(config.plan, shape, config.gpus, load, round(config.gpu_memory * 1e9), config.mesh, gather=config.gather)
        require_fitting(found)
        return found
    sets, choice, bandwidth = native.instruction_sets(), native.choice(), None
    if sets:
        area = native.huge_pages(ROOF_BYTES).fill_(1)
        bandwidth = max(read_rate(area, config.threads) for _ in range(3))
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    precision = ": ".join(decide_precision(pick_device("auto")))
    threads, cores = torch.get_num_threads(), usable_cores()
    return DoctorResult(
        __version__, processor_name(), threads, cores, torch.__version__, cuda, choice.name, choice.reason, sets,
        layout("tensor") if sets else None, bandwidth, precision, thread_advice(threads, cores) + advice(sets, bandwidth),
    )  # fmt: skip
