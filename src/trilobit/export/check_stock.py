"""transformers' reading of what was written, as a ternary model of its own classes or as an ordinary one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from trilobit.errors import VerificationError
from trilobit.export.check import ERRORS, MOST_BF16_KL, Check, Prompt, Row, activations, replaced
from trilobit.export.exact import is_comparable, require_exact
from trilobit.export.source import Source
from trilobit.export.verify import MAX_PERPLEXITY_CHANGE, MIN_TOP1, compare, load_stock, noise_floor
from trilobit.infer.loaded import Loaded
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.storage import read_json

ROUNDED_WINDOWS = 8


def check_stock(loaded: Loaded, artefact: Path, windows: Tensor) -> Check:
    """transformers' reading: of the model where its ternary classes hold it, else of it without quantised activations."""
    other = load_stock(artefact)
    prompt = Prompt(loaded, windows)
    theirs = prompt.continued_by(other)
    quantization = read_json(artefact / "config.json").get("quantization_config")
    if quantization is not None:
        agreement = compare(loaded.model, other, windows)
        agreement = agreement.require("transformers' reading", cache(lambda: noise_floor(loaded.model, windows)))
        limits = "same argmax at 98.5 % and perplexity within 0.1 %, or no further off than the model's own last bits take it"
        source = Source(loaded.model, loaded.plan)
        if is_comparable(source, quantization):
            require_exact(source, other)
            moved = source.plan is not None and source.plan.spec.placement == "output"
            exactly = "bit for bit" + (" (gains that had moved into linears: within two roundings)" if moved else "")
            limits += f"; all codes, scales and gains that it has loaded are the model's, {exactly}"
        rows = [Row("transformers", "the model", agreement)]
        return Check(rows, limits, prompt.text, prompt.continued_by(loaded.model), theirs)
    with activations(loaded.model, False):
        agreement = compare(loaded.model, other, windows)
        ours = prompt.continued_by(loaded.model)
        with _bf16_weights(loaded.model):
            exactly = compare(loaded.model, other, windows[:ROUNDED_WINDOWS])
    change = abs(math.log(agreement.perplexity_ratio))
    same = exactly.top1 >= MIN_TOP1 and agreement.kl <= MOST_BF16_KL
    if not same or change > MAX_PERPLEXITY_CHANGE + ERRORS * agreement.nats_error:
        raise VerificationError(
            f"transformers reads another model: KL {agreement.kl:.5f}, perplexity × {agreement.perplexity_ratio:.4f}, and the "
            f"argmax of the model rounded to bf16 at {exactly.top1:.2%} of the positions. It was not left behind."
        )
    against = "the model" if loaded.plan is None else "the model, activations not quantised"
    limits = f"what rounding to bf16 may do: KL {MOST_BF16_KL}, perplexity within 0.1 % and three standard errors; and the "
    limits += f"argmax of the model so rounded at {MIN_TOP1:.1%}"
    rows = [Row("transformers", against, agreement), Row("transformers", f"{against}, rounded to bf16", exactly)]
    return Check(rows, limits, prompt.text, ours, theirs)


@contextmanager
def _bf16_weights(model: torch.nn.Module) -> Iterator[None]:
    """The model with its matrices, and the scales of ternary ones, rounded to bf16 while the block runs."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    tensors = [p for p in model.parameters() if p.ndim >= 2] + [module.scale for module in packed]
    with replaced([(tensor, tensor.data.bfloat16().to(tensor.dtype)) for tensor in tensors]):
        yield
