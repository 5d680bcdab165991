"""What a model's loss is, measured by all ranks together, whether each has the model or a part of it."""

from torch import Tensor, nn

from trilobit.listener import SILENT, Listener
from trilobit.measure.perplexity import nats
from trilobit.train.distributed import Team
from trilobit.train.parts import reshard


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
