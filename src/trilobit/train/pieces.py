"""The rows of each parameter that this rank keeps: what optimizers step and checkpoints hold.

FSDP2 gives rank r of S the rows that torch.chunk does: ⌈R/S⌉ each, the last ones fewer or none. An optimizer is given these
rows as ordinary parameters that share the shard's memory. DTensor's dispatch costs ten times the arithmetic of small
tensors, and the fused optimizers do not take a `found_inf` that is no DTensor beside parameters that are.

Letters: R rows of a parameter (its first dimension), S ranks that share them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of a parameter, `local`, which shares memory with what the model holds of it, `parameter`.

    shape: of the whole parameter. In one process, and under DDP, `local` is the parameter itself.
    """

    name: str
    parameter: nn.Parameter
    local: nn.Parameter
    shape: torch.Size
    start: int
    stop: int


def whole_pieces(model: nn.Module) -> list[Piece]:
    """Every parameter, once, as one piece of all its rows."""
    return [Piece(name, p, p, p.shape, 0, p.shape[0] if p.ndim else 1) for name, p in model.named_parameters()]


def sharded_pieces(model: nn.Module, rank: int, size: int) -> list[Piece]:
    """This rank's rows of every parameter of a model that was sharded over `size` ranks, this one being the `rank`-th."""
    found = []
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        held: Any = parameter.detach()
        local = nn.Parameter(held.to_local(), requires_grad=parameter.requires_grad)
        start = sum(heights(parameter.shape[0], size)[:rank])
        assert local.shape[0] == heights(parameter.shape[0], size)[rank], (name, local.shape, parameter.shape)
        found.append(Piece(name, parameter, local, parameter.shape, start, start + local.shape[0]))  # pyright: ignore[reportArgumentType]
    return found


def heights(rows: int, size: int) -> list[int]:
    """How many of a parameter's rows each of `size` ranks keeps, as torch.chunk cuts them."""
    most = -(-rows // size)
    return [max(0, min(most, rows - rank * most)) for rank in range(size)]
