"""transformers and the hub as they should speak: silent when all is well, one clear ModelError when it is not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import tqdm.std
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)  # fmt: skip
from safetensors import SafetensorError

from trilobit.errors import ModelError, TrilobitError


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise, which is nearly every kind there is, into a ModelError that says what to do."""
    try:
        yield
    except TrilobitError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]  # transformers wraps the hub's errors in an OSError
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)

        def is_a(*kinds: type[BaseException]) -> bool:
            return any(isinstance(link, kinds) for link in chain)

        if is_a(GatedRepoError):
            message = f"{source} is gated: accept its licence on its page, then `hf auth login`."
        elif is_a(RepositoryNotFoundError):
            message = f"{source} is neither a directory here nor a model on the hub. If it is private: `hf auth login`."
        elif is_a(LocalEntryNotFoundError, OfflineModeIsEnabled):
            message = f"{source} is not a directory here, and the hub cannot be reached."
        elif is_a(SafetensorError):
            message = f"the weights of {source} are damaged or truncated: {error}"
        else:
            message = f"{source} could not be loaded: {' '.join(str(error).split()) or type(error).__name__}"
        raise ModelError(message) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers prints load reports and progress bars that our own checks make redundant."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def no_bars() -> Iterator[None]:
    """Within, no library draws a progress bar of its own between the lines of a command, whatever it asks tqdm for; but for
    the hub, whose downloads take long and have no other sign of life."""
    own = tqdm.std.tqdm.__init__

    @wraps(own)
    def silent(bar: Any, *arguments: Any, **options: Any) -> None:
        of_hub = type(bar).__module__.startswith("huggingface_hub")
        own(bar, *arguments, **(options if of_hub else options | {"disable": True}))

    tqdm.std.tqdm.__init__ = silent  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__ = own
