"""run.json: what made a run, written when it begins and read when it is resumed."""

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from trilobit import __version__
from trilobit.config.training import TrainingConfig
from trilobit.errors import ConfigError, OutputError
from trilobit.infer.hub import names_a_place
from trilobit.storage import read_json
from trilobit.train.data import Tokens

FREE_TO_CHANGE = frozenset(
    {"resume", "track", "keep_checkpoints", "checkpoint_every", "out", "cache_dir", "model_format", "store"}
    | {"mesh", "gather", "offload"}
)

DECIDED = frozenset({"config", "data_key", "data_sha256", "base", "compiled", "lr"})


def new_record(
    command: str, config: TrainingConfig, tokens: Tokens, base: str, compiled: bool, **decided: Any
) -> dict[str, Any]:  # fmt: skip
    """run.json of a run that begins. base: the fingerprint of the weights it starts from. decided: what else is kept."""
    return {
        "command": command,
        "config": asdict(config),
        "base_place": base_place(getattr(config, "model", None)),
        **run_facts(),
        "data": tokens.description,
        "data_key": tokens.key,
        "data_sha256": tokens.sha256,
        "base": base,
        "compiled": compiled,
        **decided,
    }


def base_place(model: str | None) -> str | None:
    """Where a --model lies, "directory" or "hub", as seen from where the run began: elsewhere a relative directory looks like a
    repository. None for a model that begins at random."""
    if model is None:
        return None
    return "directory" if names_a_place(model) else "hub"


def run_facts() -> dict[str, Any]:
    """How, when and by what a run was started."""
    return {
        "argv": sys.argv[1:],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "trilobit": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "git": _git_revision(),
    }  # fmt: skip


def record_to_resume(out: Path, config: TrainingConfig, decided: frozenset[str] = frozenset()) -> dict[str, Any]:
    """run.json of the run to continue. Raises OutputError if there is none, ConfigError if the settings differ."""
    if not os.path.exists(out / "run.json"):  # unlike Path.exists, False for what may not be looked at
        raise OutputError(f"there is no run to resume in {out}: it has no run.json.")
    record = read_json(out / "run.json")
    if missing := sorted((DECIDED | decided) - record.keys()):
        raise OutputError(f"{out / 'run.json'} was not written by this version: it lacks {', '.join(missing)}.")
    undecided = {"precision"} if config.precision == "auto" and "precision" in record["config"] else set[str]()
    require_same_settings(asdict(config), record["config"], FREE_TO_CHANGE | undecided)
    return record


def require_same_settings(now: dict[str, Any], then: dict[str, Any], free: frozenset[str]) -> None:
    """Raise ConfigError that names each setting, but for those in `free`, that a resumed run would change."""
    changed = [
        f"--{name.replace('_', '-')} was {then.get(name)}, is {now[name]}"
        for name in now
        if name not in free and now[name] != then.get(name)
    ]
    if changed:
        raise ConfigError("--resume continues a run with the settings it has: " + "; ".join(changed) + ".")


def _git_revision() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
