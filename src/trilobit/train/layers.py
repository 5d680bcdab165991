"""A model while it trains: which attention; layers compiled or not, and why; recomputed in the backward or not.

Each layer is compiled by itself: one small graph that all layers share, instead of one large one. What FSDP2 gathers around a
layer stays outside its graph.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, masking_utils

from trilobit.config.training import TrainingConfig
from trilobit.errors import ConfigError
from trilobit.surgery.roles import decoder_layers

RECOMPILE_LIMIT = 32
# 6 · parameters · tokens from which compiling pays. CPU: it takes a minute or two and saves a fifth of some 0.4 TFLOP/s.
# CUDA: not measured yet; the same reasoning at 100 TFLOP/s.
REPAID_FLOPS = {"cpu": 3e14, "cuda": 2e16}


def decide_compile(config: TrainingConfig, model: PreTrainedModel, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and why."""
    if config.compile != "auto":
        return config.compile == "yes", "as asked"
    if obstacle := _compiler_obstacle(device):
        return False, obstacle
    work = 6 * sum(p.numel() for p in model.parameters()) * config.max_tokens
    if work < REPAID_FLOPS[device.type]:
        return False, f"{work:.0e} operations are too few to repay compiling"
    return True, f"{work:.0e} operations repay the minutes it takes (--compile no to go without)"


def _compiler_obstacle(device: torch.device) -> str | None:
    """What inductor lacks here, if anything."""
    if device.type == "cpu":
        return None if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler was found (g++, or CXX)"
    return None if find_spec("triton") else "triton is not installed"


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Have `model` use one of transformers' attention implementations. ConfigError if it cannot."""
    try:
        model.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--attention {implementation} cannot be used here: {error}") from error


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """transformers asks before every forward whether positions start anew within a row, and waits for the device to answer.
    Rows of windows never have more than one sequence: here it is told so."""
    asked = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asked is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


def prepare_layers(model: PreTrainedModel, config: TrainingConfig, compiled: bool) -> None:
    if config.activation_checkpointing:
        # transformers 5 renamed it on the way and warns at the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if compiled:
        if obstacle := _compiler_obstacle(next(model.parameters()).device):
            raise ConfigError(f"this run's layers are to be compiled (--compile), but {obstacle}.")
        # Each state of λ, training and evaluating, has a graph of its own; beyond the limit dynamo quietly stops compiling.
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        torch.compiler.reset()  # graphs of an earlier run in this process count against the limit, too
        for _, layer in decoder_layers(model):  # one small graph for all layers, instead of one large one
            layer.compile()
