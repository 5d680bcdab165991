"""`trilobit chat`: a conversation in the model's chat template, streamed, from lines of standard input.

The whole conversation is put through the template at every turn; the engine keeps what it has read (infer/engine.py), so that
a turn costs its own tokens. When it outgrows --context, the oldest turns after the system message are left out,
and half of it is free again. Ctrl-C ends a reply, not the conversation.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from trilobit.config.chat import ChatConfig
from trilobit.errors import ConfigError
from trilobit.infer.writer import Interrupted, Writer, open_writer, sampling_of
from trilobit.listener import SILENT, Listener

Message = dict[str, str]
COMMANDS = "/reset forgets the conversation, /exit ends it."
A_COMMAND = re.compile(r"/[a-z]+")  # a path or a sentence that begins with a slash is a turn like any other


@dataclass(frozen=True)
class ChatResult:
    """A conversation, as the messages of the chat template, and its speed."""

    messages: list[Message]
    turns: int
    tokens: int
    tokens_per_second: float
    model: str

    def summary(self) -> str:
        """Nothing: the conversation has been streamed already."""
        return ""


class Conversation:
    """Messages in a chat template, as many of them as fit."""

    def __init__(self, writer: Writer, system: str | None, context: int):
        if getattr(writer.tokenizer, "chat_template", None) is None:
            raise ConfigError("this model's tokenizer has no chat template: it is no chat model. Use `trilobit generate`.")
        self.writer = writer
        self.context = min(context, writer.positions)
        self.first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.first)
        self.left_out = 0  # messages that the last turn found no room for

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self.first)

    def ask(self, text: str, room: int) -> list[int]:
        """Add a user's turn and return the prompt's ids, with `room` tokens left for a reply. Raises ConfigError if even
        this turn alone does not fit."""
        messages = [*self.messages, {"role": "user", "content": text}]
        oldest, most = len(self.first), self.context - room
        if len(self._ids(messages)) > most:  # down to half of it: so the next turns find what comes before them in the cache
            while len(messages) > oldest + 1 and len(self._ids(messages)) > most // 2:
                del messages[oldest : oldest + (2 if messages[oldest + 1]["role"] == "assistant" else 1)]
        ids = self._ids(messages)
        if len(ids) > most:
            raise ConfigError(f"this turn has {len(ids)} tokens; with --max-tokens {room} at most {most} fit.")
        self.left_out = len(self.messages) + 1 - len(messages)
        self.messages = messages
        return ids

    def answer(self, text: str) -> None:
        """Add the reply."""
        self.messages.append({"role": "assistant", "content": text})

    def _ids(self, messages: list[Message]) -> list[int]:
        try:
            encoded: Any = self.writer.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
        return list(encoded["input_ids"])


def run(config: ChatConfig, listener: Listener = SILENT, lines: Iterable[str] | None = None) -> ChatResult:
    """`trilobit chat`. lines: the user's turns, by default standard input with a prompt on a terminal."""
    writer = open_writer(config, config.context, listener)
    conversation = Conversation(writer, config.system, config.context)
    if conversation.context <= config.max_tokens:
        raise ConfigError(
            f"the model has {writer.positions} positions: --max-tokens {config.max_tokens} leaves no room for a turn."
        )
    listener.note(f"A line is a turn. {COMMANDS}")
    turns, tokens, seconds = 0, 0, 0.0
    for line in _typed(listener) if lines is None else lines:
        text = line.strip()
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
            listener.note("Forgotten.")
            continue
        if A_COMMAND.fullmatch(text):
            listener.note(f"There is no {text}. {COMMANDS}")
            continue
        if not text:
            continue
        try:
            ids = conversation.ask(text, config.max_tokens)
        except ConfigError as error:
            listener.note(str(error))
            continue
        if conversation.left_out:
            listener.note(f"({conversation.left_out} older messages left out: --context {conversation.context})")
        try:
            written = writer.write(ids, config.max_tokens, sampling_of(config), config.seed + turns, listener.stream)
        except Interrupted as stopped:
            written = stopped.written
        listener.stream("\n")
        conversation.answer(str(writer.tokenizer.decode(written.ids, skip_special_tokens=True)))
        timing = written.timing
        turns, tokens, seconds = turns + 1, tokens + timing.tokens, seconds + timing.seconds
        listener.note(f"[{timing.prompt_tokens} tokens read, {timing.tokens} written, {timing.tokens_per_second:.1f} tokens/s]")
    return ChatResult(conversation.messages, turns, tokens, tokens / seconds if seconds else 0.0, str(config.model))


def _typed(listener: Listener) -> Iterable[str]:
    """Lines of standard input until its end."""
    asks = sys.stdin.isatty()
    while True:
        try:
            if asks:
                listener.stream("> ")
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        yield line
