"""FSDP2's two collectives on CPUs, by sends and receives.

Gloo's own all-gather goes round a ring, its reduce-scatter is an all-reduce of which a part is kept. Sent to whom they are for,
parts take a third to two thirds of that time between ranks of one machine (docs/LOG.md).

Letters: S ranks of the group, n numbers of one rank's part.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Allocates:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GatherParts(_Allocates):
    """Every rank's part [n] at every rank [S·n]. Stands in for torch's all_gather_into_tensor."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        assert not async_op
        size, rank = group.size(), group.rank()
        parts = output_tensor.view(size, -1)
        _exchange([input_tensor] * size, list(parts), group)
        if parts[rank].data_ptr() != input_tensor.data_ptr():  # FSDP2 gives a view of where it belongs
            parts[rank].copy_(input_tensor.view(-1))


class ScatterSums(_Allocates):
    """Of every rank's [S·n], its part of their sum, or mean, at each [n]. Stands in for torch's reduce_scatter_tensor."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        assert not async_op and op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), (async_op, op)
        mine = input_tensor.view(group.size(), -1)
        received = torch.empty_like(mine)
        received[group.rank()] = mine[group.rank()]
        _exchange(list(mine), list(received), group)
        torch.sum(received, dim=0, out=output_tensor.view(-1))
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


def _exchange(send: list[Tensor], receive: list[Tensor], group: Any) -> None:
    """The i-th to rank i of the group, and its into the i-th, of all ranks but this one."""
    others = [rank for rank in range(group.size()) if rank != group.rank() and send[rank].numel()]
    works = [dist.irecv(receive[other], group=group, group_src=other) for other in others]
    works += [dist.isend(send[other], group=group, group_dst=other) for other in others]
    for work in works:
        if work is not None:
            work.wait()
