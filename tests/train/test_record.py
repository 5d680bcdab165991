"""run.json: what is asked of the system when it is written."""

import subprocess
from typing import Any

import pytest

from trilobit.train import record


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 5)])
def test_a_git_that_does_not_answer_is_no_revision(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without git, or with one that hangs, the revision is None and the run goes on (old code: a traceback after 5 s)."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert record._git_revision() is None
