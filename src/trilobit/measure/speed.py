"""`trilobit bench`: tokens per second of a prompt and of decoding, and how far that is from what memory allows.

Decoding reads every weight for every token: bytes of weights × tokens/s, over the rate at which memory is read by a loop that
does nothing else (measured in the same round), is the fraction of the possible speed.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from trilobit.config.bench import BenchConfig
from trilobit.errors import ConfigError
from trilobit.infer.engine import Engine
from trilobit.infer.writer import NativeWriter, open_writer
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.listener import SILENT, Listener

ROOF_BYTES = 256 << 20


@dataclass(frozen=True)
class BenchResult:
    """Medians. bandwidth in bytes a second: of the weights while decoding, and the roof of the same rounds (native engine)."""

    model: str
    engine: str
    prompt_tokens: int
    prompt_tokens_per_second: float
    tokens: int
    tokens_per_second: float
    weight_bytes: int | None = None
    bandwidth: float | None = None
    bandwidth_roof: float | None = None
    bandwidth_fraction: float | None = None

    def summary(self) -> str:
        """For people."""
        lines = [
            f"prompt   {self.prompt_tokens_per_second:>10,.1f} tokens/s ({self.prompt_tokens} tokens)",
            f"decoding {self.tokens_per_second:>10,.1f} tokens/s ({self.tokens} tokens after it)",
        ]
        if self.bandwidth is not None and self.bandwidth_roof is not None and self.weight_bytes is not None:
            lines.append(
                f"weights  {self.weight_bytes / 1e6:>10,.1f} MB a token: {self.bandwidth / 1e9:.1f} GB/s, "
                f"{self.bandwidth_fraction:.0%} of the {self.bandwidth_roof / 1e9:.1f} GB/s at which this memory can be read"
            )
        return "\n".join(lines)


def read_rate(area: torch.Tensor, threads: int | None = None) -> float:
    """Bytes a second at which `area` is read: the best number of threads up to `threads` (default: one a core)."""
    best = 0.0
    for count in range(1, (threads or torch.get_num_threads()) + 1):
        start = time.perf_counter()
        native.read(area, threads=count)
        best = max(best, area.nbytes / (time.perf_counter() - start))
    return best


def weight_bytes(engine: Engine) -> int:
    """Bytes that decoding reads for every token: all tensors but a table of embeddings."""
    return sum(tensor.nbytes for name, tensor in engine.graph.tensors.items() if name != "embedding")


def run(config: BenchConfig, listener: Listener = SILENT) -> BenchResult:
    """`trilobit bench`. Raises ConfigError where prompt and tokens are more than the model's positions."""
    room = config.prompt_tokens + config.tokens + 1
    writer = open_writer(config, room, listener)
    if room > writer.positions:
        raise ConfigError(f"--prompt-tokens and --tokens are more than the model's {writer.positions} positions.")
    prompt = [(7 * i + 3) % (writer.tokenizer.vocab_size - 1) + 1 for i in range(config.prompt_tokens)]
    prompts: list[float] = []
    decoded: list[float] = []
    roofs: list[float] = []
    engine = writer.engine if isinstance(writer, NativeWriter) else None
    area = native.huge_pages(ROOF_BYTES).fill_(1) if engine else None
    for done in range(config.rounds + 1):  # the first one warms up
        if engine is not None:
            engine.stops = frozenset()
            engine.cached.clear()
            roofs.append(read_rate(area, config.threads))  # pyright: ignore[reportArgumentType]
        start = time.perf_counter()
        first = writer.write(prompt, 1, Sampling(temperature=0), 0, lambda _: None).timing
        seconds = first.prompt_seconds or time.perf_counter() - start
        prompts.append(config.prompt_tokens / seconds)
        rest = writer.write(prompt, config.tokens, Sampling(temperature=0), 0, lambda _: None).timing
        decoded.append(rest.tokens / max(1e-9, rest.seconds - (0 if engine else seconds)))
        listener.progress("Measuring rounds", done, config.rounds, 1.0)
    rate = statistics.median(decoded[1:])
    result = BenchResult(
        str(config.model), writer.what, config.prompt_tokens, statistics.median(prompts[1:]), config.tokens, rate
    )  # fmt: skip
    if engine is None:
        return result
    size, roof = weight_bytes(engine), statistics.median(roofs[1:])
    fraction = statistics.median(size * r / limit for r, limit in zip(decoded[1:], roofs[1:], strict=True))
    return replace(
        result, weight_bytes=size, bandwidth=size * rate, bandwidth_roof=roof, bandwidth_fraction=fraction
    )  # fmt: skip
