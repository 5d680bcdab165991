import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from infer.checkpoints import save
from train import commands
from train.ranks import free_port, launch
from trilobit.config.pretrain import PretrainConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError, OutputError
from trilobit.infer.load import load
from trilobit.train import heartbeat, tune
from trilobit.train.heartbeat import Heartbeat
from trilobit.train.run import _record, require_several
from trilobit.train.track import PACKAGES

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
WORDS = ["a", "the", "cat", "dog", "bird", "sees", "finds", "small", "large", "old", "red", "house", "tree", "and", "not"]
STEP = 4 * 16
assert PACKAGES  # imported before any rank is forked


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that both commands share, with a text."""
    folder = tmp_path_factory.mktemp("base")
    chosen = random.Random(0)
    lines = [json.dumps({"text": " ".join(chosen.choices(WORDS, k=12))}) for _ in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return {
        "data": str(folder / "text.jsonl"), "cache_dir": str(folder / "cache"), "sequence_length": 16, "sequences": 1,
        "batch_tokens": STEP, "max_tokens": 6 * STEP, "eval_tokens": 5 * 16, "eval_every": 3 * STEP,
        "checkpoint_every": 3 * STEP, "precision": "fp32", "lr": 3e-3, "device": "cpu",
    }  # fmt: skip


def tuned(base: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    model = folder / "model"
    if not model.exists():
        save(model)
    return {**base, "model": str(model), "store": "fp32", **changes}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_commands_on_two_ranks(base: dict[str, Any], tmp_path: Path) -> None:
    """`tune` with a teacher under FSDP2, activations recomputed, and `pretrain` under DDP leave on two ranks what they leave on
    one: losses, held-out losses, kurtosis and flips, one log, one model that loads; both ranks have the result, one speaks."""
    one = tune.run(TuneConfig(**tuned(base, tmp_path, out=str(tmp_path / "one"))))
    both = {
        "tuned": tuned(base, tmp_path, out=str(tmp_path / "two"), mesh="fsdp", activation_checkpointing=True),
        "pretrained": {
            **base, "architecture": str(tmp_path / "model"), "tokenizer": str(tmp_path / "model"),
            "out": str(tmp_path / "made"), "mesh": "ddp",
        },
    }  # fmt: skip
    first, second = launch(commands.commands, 2, tmp_path, **both)
    for a, b in zip(first, second, strict=True):
        assert a["result"] == b["result"] and b["notes"] == []
    assert any("mesh fsdp: one copy in 2 parts, gathered once a step (as asked)" in note for note in first[0]["notes"])
    result = first[0]["result"]
    assert result["nats_per_token"] == pytest.approx(one.nats_per_token, rel=1e-3)
    assert (result["heldout_tokens"], result["parameters"]) == (one.heldout_tokens, one.parameters)
    ours, theirs = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "divergence", "gradient_norm", "heldout_nats", "lambda", "lr"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=2e-3), (name, a["step"])
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["result"] == result
    assert load(tmp_path / "two").model.config.hidden_size == 32
    latent = load_file(tmp_path / "two" / "latent" / "model.safetensors")
    assert sum(tensor.numel() for tensor in latent.values()) == one.parameters
    made = rows(tmp_path / "made")
    assert len(made) == 6 and math.isfinite(made[-1]["excess_kurtosis"])
    assert (tmp_path / "made" / "model" / "model.safetensors").exists()


def test_what_ranks_agree_on(tmp_path: Path) -> None:
    """Rank 0's value, an error of one rank, largest numbers, sums and means are the same on all; a machine's first rank goes
    before the others."""
    answers = launch(commands.agreements, 3, tmp_path)
    for rank, answer in enumerate(answers):
        assert answer["shared"] == {"rank": 0, "none": None}
        mine = "ConfigError: this cannot be."
        assert answer["shared-error"] == (mine if rank == 0 else "RankError: rank 0 stopped: this cannot be.")
        assert answer["together"] == (mine if rank == 2 else "RankError: rank 2 stopped: this cannot be.")
        assert answer["node-error"] == (mine if rank == 0 else "RankError: rank 0 stopped: this cannot be.")
        assert answer["agree"] == [2, 3] and answer["sums"] == [3.0, 1.5]
        assert answer["means"] == [2.0, "torch.float32", 2.0]
    assert answers[0]["node"] <= min(answers[1]["node"], answers[2]["node"])


def test_runs_that_follow_each_other(tmp_path: Path) -> None:
    """Processes that have ended one run begin the next without hearing what was said in the first."""
    assert launch(commands.twice, 2, tmp_path) == [[1, 2], [1, 2]]


class Shelf:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def test_a_silent_rank_is_named_to_all() -> None:
    """Of three ranks the third never beats: the second, which watches it, and the first both end with its name; one that says
    goodbye is no loss, and one that leaves with an error is one at once."""
    store, heard = Shelf(), {0: [], 1: []}
    beats = [Heartbeat(store, rank, 3, print, lost=heard[rank].append, beat=0.02, silence=0.3) for rank in (0, 1)]
    wait_for(lambda: heard[0] and heard[1])
    assert all("rank 2 has given no sign of life" in reasons[0] for reasons in heard.values())
    for beat in beats:
        beat.close()
    store, said = Shelf(), []
    one, other = (Heartbeat(store, rank, 2, print, lost=said.append, beat=0.02, silence=0.3) for rank in (0, 1))
    other.close()
    time.sleep(0.6)
    assert not said
    other = Heartbeat(store, 1, 2, print, lost=said.append, beat=0.02, silence=0.3)
    other.close("the disk is full")
    wait_for(lambda: said)
    assert said == ["rank 1 left: the disk is full"]
    one.close()
    assert heartbeat.SILENCE + 3 * heartbeat.BEAT <= 60


def test_a_store_that_does_not_answer_is_missed() -> None:
    """A call to the store that never returns, as when the machine that keeps it is cut off, ends the rank all the same."""
    hangs, said = threading.Event(), []

    class Silent(Shelf):
        def check(self, keys: list[str]) -> bool:
            return not hangs.wait(60)

    beat = Heartbeat(Silent(), 1, 2, print, lost=said.append, beat=0.02, silence=0.2)
    wait_for(lambda: said)
    assert "the store that all ranks share has not answered" in said[0]
    hangs.set()
    beat.close()


def test_signals_and_refusals_before_the_first_step(tmp_path: Path) -> None:
    """A signal to either of two ranks before training stops both alike; ranks with unlike memory choose one mesh."""
    first, second = launch(commands.early, 2, tmp_path)
    assert first["stopped"] == second["stopped"] == [15, 15]
    assert first["arranged"] == second["arranged"]


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_restart_continues_its_own_run(base: dict[str, Any], tmp_path: Path) -> None:
    """What torchrun starts again goes on with the run.json that the same launch wrote, without --resume; another launch's is
    refused as ever, and a first start too."""
    config = PretrainConfig(**base, architecture="llama-3m", train_tokenizer=300)
    out = tmp_path / "run"
    out.mkdir()
    decided = ("data_key", "data_sha256", "base", "compiled", "lr")
    record = {"config": asdict(config), "launch": "abc", **dict.fromkeys(decided, "")}
    (out / "run.json").write_text(json.dumps(record))
    assert _record(out, config, frozenset(), "abc") == record
    for other in ("another", None):
        with pytest.raises(OutputError, match="exists already"):
            _record(out, config, frozenset(), other)
    assert _record(tmp_path / "new", config, frozenset(), None) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "self"}, "--data self"),
        ({"gradients": "bf16"}, "--gradients bf16"),
        ({"schedule": "immediate", "reconstruct_tokens": 64}, "--reconstruct-tokens"),
        ({"schedule": "sensitivity"}, "the schedule sensitivity"),
        ({"activation_schedule": "sensitivity"}, "the schedule sensitivity"),
        ({"distill_attention": 1.0}, "--distill-attention"),
    ],
)
def test_what_is_for_one_process_is_refused(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    """What has not been made to work on several ranks is a ConfigError there that names it."""
    config = TuneConfig(**{**base, "model": "m", **changes})
    with pytest.raises(ConfigError, match=f"{named} is for one process"):
        require_several(config)
    require_several(TuneConfig(**{**base, "model": "m"}))


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(base: dict[str, Any], tmp_path: Path) -> None:
    """`torchrun --max-restarts 1 -m trilobit pretrain` whose second rank is killed in the middle ends with a model all the
    same, its log without gaps."""
    killer = tmp_path / "killer"
    killer.mkdir()
    (killer / "sitecustomize.py").write_text(KILLER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m",
        "trilobit", "pretrain", "llama-3m", "--train-tokenizer", "300", "--mesh", "fsdp", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    for name, value in base.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {"PYTHONPATH": f"{killer}:{Path(tune.__file__).parents[2]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr, done.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "result" in json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.slow
def test_two_machines_restart_together(base: dict[str, Any], tmp_path: Path) -> None:
    """Two agents, as on two machines, each with a count of restarts of its own: a rank of the second is killed, both start
    again, agree on one attempt, and go on from the checkpoint of the same launch."""
    killer = tmp_path / "killer"
    killer.mkdir()
    (killer / "sitecustomize.py").write_text(KILLER)
    arguments = ["-m", "trilobit", "pretrain", "llama-3m", "--train-tokenizer", "300", "--mesh", "fsdp"]
    arguments += ["--out", str(tmp_path / "run")]
    for name, value in base.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    environment = {
        "PYTHONPATH": f"{killer}:{Path(tune.__file__).parents[2]}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    logs = [(tmp_path / f"agent-{index}.log").open("w") for index in range(2)]
    agents = [
        subprocess.Popen([*launcher, *arguments], env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
        for log in logs
    ]
    try:
        codes = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent, log in zip(agents, logs, strict=True):
            agent.kill()
            log.close()
    said = "".join((tmp_path / f"agent-{index}.log").read_text() for index in range(2))
    assert codes == [0, 0], said[-3000:]
    assert "exitcode: -9" in said, said[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


KILLER = """
import os, threading, time
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    def watch():
        import glob
        while True:
            here = [a for a in __import__("sys").argv if a.endswith("run")]
            if here and glob.glob(here[0] + "/checkpoints/step-3/manifest.json"):
                os.kill(os.getpid(), 9)
            time.sleep(0.005)
    threading.Thread(target=watch, daemon=True).start()
"""
