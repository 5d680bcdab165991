"""A model's loss, measured by all ranks, whether each has the model or a part of it; and what models are compared on."""

import math

import torch
from torch import Tensor, nn

from trilobit.config.training import TrainingConfig
from trilobit.listener import SILENT, Listener
from trilobit.measure.perplexity import nats
from trilobit.train.data import Tokens
from trilobit.train.distributed import Team
from trilobit.train.parts import reshard
from trilobit.train.windows import Windows, evaluation_windows

COMPARED_TOKENS = 1024


def shared_nats(
    team: Team, model: nn.Module, windows: Tensor, sequences: int, precision: str = "fp32", listener: Listener = SILENT
) -> tuple[float, int]:
    """measure.perplexity.nats of windows [N, W + 1], the same on every rank, all of which have to call it.

    Each reads its part of the windows; those that are left over, fewer than ranks, are read by all and counted by the first, so
    that all run the same number of forwards.
    """
    each = len(windows) // team.size
    own, rest = windows[team.rank * each : (team.rank + 1) * each], windows[team.size * each :]
    total, count = nats(model, own, sequences, precision, listener) if each else (0.0, 0)
    if len(rest):
        more, tokens = nats(model, rest, sequences, precision)
        total, count = (total + more, count + tokens) if team.first else (total, count)
    reshard(model)
    total, counted = team.sums(total, count)
    return total, int(counted)


def compared_windows(config: TrainingConfig, tokens: Tokens, windows: Windows) -> Tensor:
    """Token windows [N, W + 1] that a written model is compared on with what was trained: COMPARED_TOKENS at least, held out as
    far as there are any, else of the training order."""
    found = evaluation_windows(tokens.heldout, config.sequence_length, max(config.evaluation_tokens, COMPARED_TOKENS))
    if (lacking := COMPARED_TOKENS - len(found) * config.sequence_length) > 0:  # text that was trained on will do
        found = torch.cat([found, windows.samples(0, math.ceil(lacking / config.sequence_length))])
    return found
