"""Muon where every rank keeps some rows of each matrix: momentum stays cut, the iteration sees whole matrices, once each.

    1  momentum and the update, row by row, where the rows are
    2  all-to-all: the rows of matrix i of one shape go to its owner, rank (i + k) mod S, k counting on from shape to shape
    3  the owner iterates its matrices as one batch
    4  all-to-all: rows return, in the iteration's dtype; each rank moves its own

An iteration of part of the rows would be another matrix's: singular values are of the whole. Two exchanges of a matrix' bytes
over S, instead of a gather of all of it to everyone and S equal iterations; `gathered` does that, and is the oracle. Copies
(HSDP) each do the same work. NorMuon's rows are local, the length that it keeps is not: one number a matrix is added up.

The scheme of one owner a matrix follows Liu et al. (arXiv 2502.16982, distributed Muon), with all-to-all instead of gathers.

Letters: N matrices of one shape, R rows, C columns, S ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trilobit.kernels.bf16 import alone, runs_on
from trilobit.train.muon import CHUNK_BYTES, EPS, ROW_MOMENTUM, Muon, orthogonalize, step_scale
from trilobit.train.pieces import Piece, heights

Iterate = Callable[[Tensor], Tensor]
"""[N, R, C] → the same shape in the compute dtype."""
Exchange = Callable[[list[Tensor], torch.Size, int, Any, Iterate], list[Tensor]]
"""(this rank's rows of N matrices, their whole shape, owner of the first, group, iterate) → this rank's rows of each result."""


def owned(rows: list[Tensor], shape: torch.Size, first: int, group: Any, iterate: Iterate) -> list[Tensor]:
    """Each matrix whole at one rank: matrix i at rank (first + i) mod S."""
    size, rank, number = group.size(), group.rank(), len(rows)
    high, columns = heights(shape[0], size), shape[1]
    of = [[i for i in range(number) if (first + i) % size == owner] for owner in range(size)]
    mine = len(of[rank])
    send = torch.cat([rows[i].reshape(-1) for indices in of for i in indices])
    sent = [len(indices) * high[rank] * columns for indices in of]
    received = [mine * height * columns for height in high]
    buffer = send.new_empty(sum(received))
    dist.all_to_all_single(buffer, send, received, sent, group=group)
    parts = [part.view(mine, height, columns) for part, height in zip(buffer.split(received), high, strict=True)]
    done = iterate(torch.cat(parts, dim=1))
    back = torch.cat([part.reshape(-1) for part in done.split(high, dim=1)])
    home = back.new_empty(sum(sent))
    dist.all_to_all_single(home, back, sent, received, group=group)
    results = list(rows)
    for indices, part in zip(of, home.split(sent), strict=True):
        for index, result in zip(indices, part.view(len(indices), high[rank], columns), strict=True):
            results[index] = result
    return results


def gathered(rows: list[Tensor], shape: torch.Size, first: int, group: Any, iterate: Iterate) -> list[Tensor]:
    """Every matrix whole at every rank: the plain way, which `owned` is tested against."""
    size, rank = group.size(), group.rank()
    high = heights(shape[0], size)
    padded = torch.stack([nn.functional.pad(part, (0, 0, 0, high[0] - len(part))) for part in rows])
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    done = iterate(torch.cat([part[:, :height] for part, height in zip(parts, high, strict=True)], dim=1))
    return list(done.split(high, dim=1)[rank])


class ShardedMuon(Muon):
    """Muon for rows of matrices, and AdamW for rows of everything else. `iterated` counts the matrices of the last step that
    this rank iterated; over the ranks of a group they add up to all of them.

    pieces: what the groups' parameters are rows of. group: the ranks that share one copy; control: a gloo group of them or
    more, over which they agree on which matrices have a gradient anywhere. A rank without one takes part with zeros.
    """

    exchange: Exchange = staticmethod(owned)

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], pieces: list[Piece], group: Any,
        control: Any, **options: Any,
    ):  # fmt: skip
        self._shapes = {id(piece.local): piece.shape for piece in pieces}
        self._group, self._control = group, control
        super().__init__(groups, lr, betas, **options)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._shapes[id(parameter)]

    def _step_matrices(self, group: dict[str, Any]) -> None:
        there = torch.tensor([parameter.grad is not None for parameter in group["params"]], dtype=torch.uint8)
        dist.all_reduce(there, dist.ReduceOp.MAX, group=self._control)
        shapes: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter, some in zip(group["params"], there.tolist(), strict=True):
            if some:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                shapes[self._shape(parameter)].append((parameter, gradient))
        first, size = 0, self._group.size()
        for shape, found in shapes.items():
            chunk = size * max(1, CHUNK_BYTES[found[0][0].device.type == "cpu"] // (4 * shape.numel()))
            for start in range(0, len(found), chunk):
                self._step_rows(group, found[start : start + chunk], shape, first)
            first += len(found)

    def _step_rows(
        self, group: dict[str, Any], found: list[tuple[nn.Parameter, Tensor]], shape: torch.Size, first: int
    ) -> None:
        """One step of matrices of one shape."""
        updates = []
        for parameter, gradient in found:
            updates.append(torch.empty_like(parameter))
            self._accelerate(parameter, gradient, updates[-1])
        with alone() if runs_on(self.compute, found[0][0].device) else nullcontext():
            results = self.exchange(updates, shape, first, self._group, self._iterate)
        if self.normuon:
            moments = [self._row_moment(parameter) for parameter, _ in found]
            results = self._normalize(results, moments, shape)
        length = group["lr"] * step_scale(shape, self.scale)
        for (parameter, _), update in zip(found, results, strict=True):
            self._move(group, parameter, update, length)

    def _iterate(self, matrices: Tensor) -> Tensor:
        self.iterated += len(matrices)
        return orthogonalize(matrices, self.coefficients, self.compute)

    def _normalize(self, updates: list[Tensor], moments: list[Tensor], shape: torch.Size) -> list[Tensor]:
        """muon.normalize_rows on rows, with the length of the whole."""
        found = []
        for update, moment in zip(updates, moments, strict=True):
            update = update.to(moment.dtype)
            moment.lerp_(update.square().mean(dim=1, keepdim=True), 1 - ROW_MOMENTUM)
            found.append(update / (moment.sqrt() + EPS))
        squares = torch.stack([update.double().square().sum() for update in found])
        dist.all_reduce(squares, group=self._group)
        factors = min(shape) ** 0.5 / (squares.sqrt() + EPS)
        return [update * factor.to(update.dtype) for update, factor in zip(found, factors, strict=True)]
