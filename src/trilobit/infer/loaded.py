"""A model as the rest of the package takes it, with its tokenizer; and what it may be put on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from trilobit.errors import ModelError
from trilobit.infer.hub import names_a_place, require_on_hub
from trilobit.infer.quiet import clear_errors
from trilobit.surgery.roles import vocabulary_size
from trilobit.surgery.ternary import Plan


@dataclass
class Loaded:
    """A model, its tokenizer, and the plan of its surgery (None: an ordinary model)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    plan: Plan | None
    form: str


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of `source`, without the truncation and padding that some tokenizer.json files carry."""
    if not names_a_place(str(source)):
        require_on_hub(str(source))
    with clear_errors(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if getattr(tokenizer, "is_fast", False):
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_tokenizer(source: str | Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise ModelError if the tokenizer can produce ids that the embedding does not have, or is not a fast one."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json).")
    vocabulary = vocabulary_size(model)
    # Added tokens beyond the embedding are common (Gemma 3, Code Llama) and harmless until a text contains one.
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    used = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    largest = max([*own, *used], default=0)
    if largest >= vocabulary:
        raise ModelError(
            f"the tokenizer of {source} does not match the model's vocabulary: it has an id {largest}, "
            f"but the embedding has {vocabulary} rows."
        )


def pick_device(name: str) -> torch.device:
    """`auto` → cuda where there is one, else cpu. Raises ModelError for a device that is not there, or of another kind."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # mps has no float64, which the scales are computed in; meta no numbers
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"--device {name} cannot be used here: {first}") from error
    return device
