"""`trilobit generate`: continue a prompt, streaming."""

from dataclasses import dataclass

from trilobit.config.generate import GenerateConfig
from trilobit.infer.writer import open_writer, sampling_of
from trilobit.listener import SILENT, Listener


@dataclass(frozen=True)
class GenerateResult:
    """The prompt's continuation; seconds without those of the prompt where the native engine ran it."""

    text: str
    tokens: int
    seconds: float
    tokens_per_second: float
    model: str
    engine: str

    def summary(self) -> str:
        """Nothing: the text has been streamed already."""
        return ""


def run(config: GenerateConfig, listener: Listener = SILENT) -> GenerateResult:
    """`trilobit generate`."""
    writer = open_writer(config, None, listener)
    ids = writer.start(config.prompt)
    most = writer.room(len(ids), config.max_tokens)
    written = writer.write(ids, most, sampling_of(config), config.seed, listener.stream)
    listener.stream("\n")
    timing = written.timing
    listener.note(f"{timing.tokens} tokens, {timing.tokens_per_second:.1f} tokens/s")
    text = str(writer.tokenizer.decode(written.ids, skip_special_tokens=True))
    return GenerateResult(text, timing.tokens, timing.seconds, timing.tokens_per_second, str(config.model), writer.name)
