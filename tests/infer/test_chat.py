"""`trilobit chat`: the conversation that the template sees, turn by turn."""

import io
from pathlib import Path
from typing import Any

import pytest

from infer.checkpoints import byte_tokenizer, save
from infer.natives import native_directory
from infer.test_generate import Heard
from trilobit.config.chat import ChatConfig
from trilobit.errors import ConfigError
from trilobit.infer import chat
from trilobit.infer.chat import Conversation, run
from trilobit.infer.writer import open_writer
from trilobit.kernels import native

needs_library = pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("ordinary") / "model", tokenizer=tokenizer())


@pytest.fixture(params=["native", "transformers"])
def model(request: pytest.FixtureRequest, ordinary: Path, tmp_path: Path) -> Path:
    """A native directory and an ordinary checkpoint, of 64 positions."""
    if request.param == "transformers":
        return ordinary
    if not native.available():
        pytest.skip("no native library")
    return native_directory(tmp_path / "model", tokenizer=tokenizer())


def config(model: Path, **settings: Any) -> ChatConfig:
    return ChatConfig(model=str(model), device="cpu", **{"max_tokens": 5, "context": 64, **settings})


def test_turns_and_replies_are_kept(model: Path) -> None:
    """The conversation holds every turn and its reply in order, the replies are what was streamed, and tokens are counted."""
    heard = Heard()
    result = run(config(model, system="S"), heard, ["hi\n", "  you  \n", "\n"])
    roles = [m["role"] for m in result.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in result.messages][::2][:1] == ["S"]
    assert [m["content"] for m in result.messages if m["role"] == "user"] == ["hi", "you"]
    replies = [m["content"] for m in result.messages if m["role"] == "assistant"]
    assert "".join(heard.pieces) == "".join(reply + "\n" for reply in replies)
    assert result.turns == 2
    assert 2 <= result.tokens <= 10
    assert result.tokens_per_second > 0
    assert result.summary() == ""
    turns = [note for note in heard.notes if "tokens read" in note]
    assert len(turns) == 2
    assert f"[{len('s:S|u:hi|a:')} tokens read" in turns[0]


def test_reset_and_exit(model: Path) -> None:
    """/reset forgets all but the system message, /exit and /quit end the conversation and what follows is not read; none of
    them is a turn."""
    heard = Heard()
    result = run(config(model, system="S"), heard, ["one", "/reset", "two", "/exit", "three"])
    assert [m["content"] for m in result.messages if m["role"] != "assistant"] == ["S", "two"]
    assert result.turns == 2
    assert "Forgotten." in heard.notes
    assert run(config(model), Heard(), ["/quit", "x"]).turns == 0
    assert run(config(model), Heard(), []).tokens_per_second == 0


def test_unknown_commands_are_no_turns(model: Path) -> None:
    """A misspelt command is answered with the commands there are; a path is a turn."""
    heard = Heard()
    result = run(config(model), heard, ["/help", "/etc/hosts"])
    assert [m["content"] for m in result.messages if m["role"] != "assistant"] == ["/etc/hosts"]
    assert any("There is no /help. /reset" in note for note in heard.notes)


@needs_library
def test_a_conversation_goes_on_from_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later turn costs its own tokens, the template's and the reply's last one, not the whole conversation again."""
    folder = native_directory(tmp_path / "model", tokenizer=tokenizer(), stops=None, max_position_embeddings=600)
    writers = []

    def opening(*arguments: Any) -> Any:
        writers.append(open_writer(*arguments))
        return writers[-1]

    monkeypatch.setattr(chat, "open_writer", opening)
    monkeypatch.setattr("trilobit.kernels.engine.Sampler.__call__", lambda self, logits, history=(): 70)  # one byte a token
    heard = Heard()
    run(config(folder, context=600), heard, ["a" * 100, "b" * 10, "c"])
    assert [int(n.split()[0][1:]) for n in heard.notes if "tokens read" in n] == [105, 17, 8]
    assert writers[0].engine.capacity == 600


def test_the_oldest_turns_make_room(ordinary: Path) -> None:
    """A conversation that outgrows its room loses its oldest turns with their replies until half of the room is free, the
    system message never; a turn that does not fit alone is refused, and the conversation stays as it was (old code: its turns
    were gone)."""
    talk = Conversation(open_writer(config(ordinary)), "S", 64)

    def text() -> str:
        return "".join(f"{m['role'][0]}:{m['content']}|" for m in talk.messages)

    def exchange(index: int) -> str:
        return f"u:q{index}|a:A{index}|"

    for index in range(5):  # of 60 tokens that fit, 51 at the fifth turn
        assert len(talk.ask(f"q{index}", 4)) == len("s:S|" + 10 * "x" * index + "u:q0|a:")
        assert talk.left_out == 0
        talk.answer(f"A{index}")
    assert text() == "s:S|" + "".join(map(exchange, range(5)))
    assert len(talk.ask("q5", 4)) == 21
    assert text() == "s:S|" + exchange(4) + "u:q5|"
    assert talk.left_out == 8
    talk.answer("A5")
    before = text()
    with pytest.raises(ConfigError, match="this turn has 61 tokens; with --max-tokens 4 at most 60 fit"):
        talk.ask("x" * 52, 4)
    assert text() == before
    assert len(talk.ask("y" * 51, 4)) == 60
    assert text() == f"s:S|u:{'y' * 51}|"
    talk.ask("z", 4)  # a turn that was not answered makes room alone
    assert text() == "s:S|u:z|"
    talk.reset()
    assert text() == "s:S|"


def test_a_turn_that_is_too_long_is_said_and_passed_over(model: Path) -> None:
    """The listener hears that a turn does not fit, and the conversation goes on."""
    heard = Heard()
    result = run(config(model), heard, ["x" * 60, "hi"])
    assert result.turns == 1
    assert any("this turn has 65 tokens; with --max-tokens 5 at most 59 fit" in note for note in heard.notes)
    assert result.messages[0]["content"] == "hi"


def test_the_models_positions_are_the_most_that_fits(ordinary: Path) -> None:
    """--context beyond the model's positions means the positions; --max-tokens that leave no room there are refused (old
    code: every turn was, with a negative number)."""
    assert Conversation(open_writer(config(ordinary)), None, 10**6).context == 64
    with pytest.raises(ConfigError, match="the model has 64 positions: --max-tokens 64 leaves no room for a turn"):
        run(config(ordinary, max_tokens=64, context=100), Heard(), ["hi"])


def test_a_model_without_a_template_is_no_chat_model(tmp_path: Path) -> None:
    """No chat template: an error that names the other command; a template that refuses a conversation says why."""
    plain = save(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"no chat template: it is no chat model\. Use `trilobit generate`"):
        run(config(plain), Heard(), ["hi"])
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}x"
    strict = save(tmp_path / "strict", tokenizer=tokenizer(template))
    heard = Heard()
    assert run(config(strict, system="S"), heard, ["hi"]).turns == 0
    assert "the model's chat template refuses this conversation: no system messages" in heard.notes
    assert run(config(strict), Heard(), ["hi"]).turns == 1


def test_equal_seeds_give_equal_conversations(model: Path) -> None:
    """Turns are sampled from the seed, each from another stream."""
    lines = ["hi", "hi", "more"]
    first, again, other = (
        run(config(model, seed=seed, temperature=1.0, top_p=1.0), Heard(), lines).messages for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_reply_can_be_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a reply: what there is of it is kept as the reply, and the conversation goes on."""

    class Impatient(Heard):
        def stream(self, text: str) -> None:
            super().stream(text)
            if len(self.pieces) == 2:
                raise KeyboardInterrupt

    heard = Impatient()
    lines = ["hi", "you"]
    settings = config(model, temperature=1.0, seed=3, max_tokens=12)
    whole = run(settings, Heard(), lines).messages
    result = run(settings, heard, lines)
    assert result.turns == 2
    assert [m["role"] for m in result.messages] == ["user", "assistant"] * 2
    first = result.messages[1]["content"]
    assert whole[1]["content"].startswith(first.rstrip("\ufffd"))
    assert len(first) < len(whole[1]["content"])


def test_turns_come_from_standard_input(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lines, standard input is read to its end, with a prompt on a terminal only; Ctrl-C at the prompt ends it."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Interrupted(Terminal):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    heard = Heard()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nyou"))
    assert run(config(ordinary), heard).turns == 2
    assert "> " not in heard.pieces
    monkeypatch.setattr("sys.stdin", Terminal("hi\n"))
    assert run(config(ordinary), heard).turns == 1
    assert heard.pieces.count("> ") == 2
    monkeypatch.setattr("sys.stdin", Interrupted())
    assert run(config(ordinary), heard).turns == 0
