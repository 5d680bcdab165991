"""FSDP2's two collectives on CPUs, by gloo's sends and its all-to-all.

Gloo's own all-gather goes round a ring, its reduce-scatter is an all-reduce of which a part is kept. Between ranks of one
machine these take 0.4 to 0.6 and 0.5 to 0.9 of their time (bench/gloo.py).

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
    """Every rank's part [n] at every rank [S·n]. Stands in for torch's all_gather_into_tensor. (An all-to-all would want each
    part S times over.)"""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        assert not async_op
        rank, parts = group.rank(), output_tensor.view(group.size(), -1)
        others = [other for other in range(group.size()) if other != rank and input_tensor.numel()]
        works = [dist.irecv(parts[other], group=group, group_src=other) for other in others]
        works += [dist.isend(input_tensor, group=group, group_dst=other) for other in others]
        if parts[rank].data_ptr() != input_tensor.data_ptr():  # FSDP2 gives a view of where it belongs
            parts[rank].copy_(input_tensor)
        for work in works:
            if work is not None:
                work.wait()


class ScatterSums(_Allocates):
    """Of every rank's [S·n], its part of their sum, or mean, at each [n]. Stands in for torch's reduce_scatter_tensor."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        assert not async_op and op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), (async_op, op)
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor.view(-1))
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
