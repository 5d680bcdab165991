"""The README is executed: its commands parse and run, its tree is the tree."""

import json
import re
import shlex
from pathlib import Path

import pytest

from families import build
from measure import bench_files
from trilobit.cli import COMMANDS, main, parse
from trilobit.demo import MODEL
from trilobit.export import llama_cpp
from trilobit.infer.load import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `trilobit …` line in a code block of README and docs, and README's inline ones that name a command."""
    pages = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "LOG")]
    blocks = [block for page in pages for block in re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]
    lines = list(dict.fromkeys(line for block in blocks for line in block.splitlines()))
    inline = re.findall(r"`(trilobit [^`]+)`", README)
    return [line for line in [*lines, *inline] if line.startswith("trilobit ") and "--help" not in line]


def block_with(text: str) -> str:
    return next(block for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) if text in block)


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command line in README and docs is one the command line accepts, flag for flag."""
    words = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    if "--from" in words:
        source = Path(words[words.index("--from") + 1])
        source.parent.mkdir(parents=True)
        source.write_text('{"command": "tune", "config": {"model": "m", "data": "d"}}')
    if words[1] != "demo":
        assert words[1] in COMMANDS
    config, _ = parse(words[1], words[2:])
    assert config is not None


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's commands as it has them, with the embedded model, a small text and few tokens for the hub's."""
    text = "".join((ROOT / "src" / "trilobit" / name).read_text() for name in ("quant.py", "cli.py", "storage.py"))
    (tmp_path / "wiki.test.raw").write_text(text)
    monkeypatch.chdir(tmp_path)
    for line in block_with("HuggingFaceFW/fineweb-edu").splitlines():
        words = shlex.split(line)[1:]
        words = [str(MODEL) if word == "HuggingFaceTB/SmolLM2-135M" else word for word in words]
        words = ["wiki.test.raw" if word.startswith("HuggingFaceFW/") else word for word in words]
        words = [{"100M": "4k", "1B": "4k", "llama-60m": "llama-3m"}.get(word, word) for word in words]
        if words[0] in ("tune", "pretrain"):
            words += ["--batch-tokens", "1k", "--sequences", "4", "--sequence-length", "128", "--cache-dir", "cache"]
        if "--tasks" in words:
            words += ["--limit", "2", "--task-data", str(bench_files.write(tmp_path / "bench"))]
        if words[0] == "chat":  # the embedded model has no chat template
            assert main(words) == 2 and "no chat template" in capsys.readouterr().err
            continue
        assert main([*words, "--json"]) == 0
        out = capsys.readouterr().out
        assert json.loads(out), out
    # After so few tokens argmax is a coin toss between near-equal logits: either form may be chosen.
    assert (tmp_path / "out" / "smollm2" / "model" / "trilobit.json").exists()
    assert (tmp_path / "out" / "outliers" / "index.html").exists()
    assert (tmp_path / "out" / "llama-3m-pretrained" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_the_way_to_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second block, on a small tied Llama in the place of SmolLM2 and with few tokens, ends with a file that was checked.
    (.ci/run executes the first, after `make demo`.)"""
    monkeypatch.chdir(tmp_path)
    tokenizer = load(MODEL).tokenizer
    base = build(
        "llama", tied=True, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, max_position_embeddings=512
    )
    base.save_pretrained("out/smollm2-base")
    tokenizer.save_pretrained("out/smollm2-base")
    first, *lines = block_with("make smollm2").splitlines()
    assert first == "make smollm2"
    for line in lines:
        words = [{"330k": "4k"}.get(word, word) for word in shlex.split(line)[1:]]
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
    assert Path("out/smollm2.gguf").stat().st_size > 10_000
    assert "| llama.cpp |" in Path("out/smollm2.md").read_text()


def test_make_targets_exist() -> None:
    """Each `make` target the README names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([\w-]+)", README))
    assert targets >= {"demo", "test"}
    for target in targets - {"sets", "ternary"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_is_the_tree() -> None:
    """The README lists every file and folder directly under src/trilobit, and nothing else."""
    block = README.split("src/trilobit/\n")[1].split("tests/")[0]
    listed = {line.split()[0].rstrip("/") for line in block.splitlines() if line.strip()}
    package = ROOT / "src" / "trilobit"
    there = {p.name for p in package.iterdir() if p.name not in ("__init__.py", "__pycache__", "assets", "__main__.py")}
    assert listed == there


def test_python_example_is_real() -> None:
    """The Python example compiles and uses only public names and real settings."""
    import trilobit

    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(source, "README.md", "exec")
    for name in re.findall(r"trilobit\.(\w+)", source):
        assert hasattr(trilobit, name), name
    settings = re.findall(r"(\w+)=", source.split("TuneConfig(")[1].split(")\n")[0])
    assert set(settings) <= set(trilobit.TuneConfig.__dataclass_fields__)
