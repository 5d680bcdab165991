"""The hub, asked one question before anything is fetched: downloads that cannot reach it are tried for half a minute."""

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)  # fmt: skip

from trilobit.errors import ModelError
from trilobit.infer.quiet import clear_errors

LOCAL_PREFIXES = (".", "/", "~", "out/")  # out/ is where runs are written by default: a misspelt one is no hub id
HUB_SECONDS = 10.0


def names_a_place(source: str) -> bool:
    """Whether `source` is on this machine, or could not be a hub id."""
    return Path(source).exists() or source.startswith(LOCAL_PREFIXES) or source.count("/") > 1


def require_on_hub(source: str) -> None:
    """Raise ModelError if the hub has no `source` or cannot be reached, unless there is a copy of its config here."""
    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            with clear_errors(source):
                _ask(source)
    except HFValidationError:  # no name that a repository could have: whoever fetches it says so
        return


def _ask(source: str) -> None:
    try:
        HfApi().model_info(source, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, GatedRepoError, OfflineModeIsEnabled, HFValidationError):
        raise
    except HfHubHTTPError:  # it answers, and may have the files all the same
        return
    except Exception as error:  # of whatever library it asks with
        raise ModelError(f"{source} is not a directory here, and the hub cannot be reached.") from error
