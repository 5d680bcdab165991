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
from trilobit.infer.engine import Engine, Timing
from trilobit.infer.writer import NativeWriter, Writer, open_writer
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.listener import SILENT, Listener

PROMPT = 512  # tokens, where the model has room for them
ROOF_BYTES = 256 << 20
CACHED_BYTES = 64 << 20  # weights of fewer bytes may come from the processor's caches, and memory is no limit
ATTEMPTS = 4


@dataclass(frozen=True)
class BenchResult:
    """Medians. Bandwidths in bytes a second: of the weights while decoding, and the roof of the same rounds (native engine;
    None where the weights fit into the processor's caches)."""

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
        if self.weight_bytes is not None:
            lines.append(f"weights  {self.weight_bytes / 1e6:>10,.1f} MB a token")
        if self.bandwidth is not None and self.bandwidth_roof is not None:
            lines[-1] += (
                f": {self.bandwidth / 1e9:.1f} GB/s, {self.bandwidth_fraction:.0%} of the {self.bandwidth_roof / 1e9:.1f} GB/s "
                "at which this memory can be read"
            )
        return "\n".join(lines)


def read_rate(area: torch.Tensor, threads: int | None = None) -> float:
    """Bytes a second at which `area` is read, the best of some attempts with each number of threads (default: up to one a
    core): after a stall the pool works alone for a while."""
    best = 0.0
    for count in range(1, (threads or torch.get_num_threads()) + 1):
        for _ in range(ATTEMPTS):
            start = time.perf_counter()
            native.read(area, threads=count)
            best = max(best, area.nbytes / (time.perf_counter() - start))
    return best


def weight_bytes(engine: Engine) -> int:
    """Bytes that decoding reads for every token: all tensors but a table of embeddings that is not the head as well."""
    tensors = engine.graph.tensors
    tied = "head.codes" not in tensors
    return sum(t.nbytes for name, t in tensors.items() if not name.startswith("embedding") or (tied and name != "embedding"))


def run(config: BenchConfig, listener: Listener = SILENT) -> BenchResult:
    """`trilobit bench`. Raises ConfigError where prompt and tokens are more than the model's positions, or too few to time."""
    if config.tokens < 2:
        raise ConfigError("--tokens must be at least 2: the first one belongs to the prompt.")
    writer = open_writer(config, (config.prompt_tokens or PROMPT) + config.tokens, listener)
    length = config.prompt_tokens or min(PROMPT, writer.positions - config.tokens)
    if length < 1 or length + config.tokens > writer.positions:
        raise ConfigError(f"--prompt-tokens and --tokens are more than the model's {writer.positions} positions.")
    prompt = [(7 * i + 3) % (writer.tokenizer.vocab_size - 1) + 1 for i in range(length)]
    engine = writer.engine if isinstance(writer, NativeWriter) else None
    area = native.huge_pages(ROOF_BYTES).fill_(1) if engine else None
    prompts: list[float] = []
    decoded: list[float] = []
    roofs: list[float] = []
    for done in range(config.rounds + 1):  # the first one warms up
        if engine is not None:
            engine.cached.clear()
            roofs.append(read_rate(area, config.threads))  # pyright: ignore[reportArgumentType]
        reading, writing = _seconds(writer, prompt, config.tokens)
        prompts.append(reading)
        decoded.append(writing)
        listener.progress("Measuring rounds", done, config.rounds, 1.0)
    reading, writing = statistics.median(prompts[1:]), statistics.median(decoded[1:])
    if writing <= 0:
        raise ConfigError(f"--tokens {config.tokens} are too few to be timed after {length}: take more.")
    rate = (config.tokens - 1) / writing
    result = BenchResult(str(config.model), writer.name, length, length / reading, config.tokens, rate)
    if engine is None:
        return result
    size = weight_bytes(engine)
    if size < CACHED_BYTES:
        return replace(result, weight_bytes=size)
    roof = statistics.median(roofs[1:])
    return replace(
        result, weight_bytes=size, bandwidth=size * rate, bandwidth_roof=roof, bandwidth_fraction=size * rate / roof
    )  # fmt: skip


def _seconds(writer: Writer, prompt: list[int], tokens: int) -> tuple[float, float]:
    """To read a prompt and choose the first token, and to write the others, whatever they are."""

    def write(count: int) -> Timing:
        return writer.write(prompt, count, Sampling(temperature=0), 0, lambda _: None, ends=False).timing

    if isinstance(writer, NativeWriter):
        timing = write(tokens)
        return timing.prompt_seconds, timing.seconds
    first = write(1).seconds
    return first, write(tokens).seconds - first
