"""A model in parts without having been whole: cut while its parameters are on meta, then each rank fills its own rows.

    modules on meta ──▶ fully_shard ──▶ rows of this rank, empty, on its device ──▶ filled, a parameter at a time

Outside the step a device never has more than its rows, and, in a forward, one decoder layer's whole parameters (or those
outside the layers), unless it is told to keep what it has gathered (`stay_whole`). Buffers are whole on every rank, as they are
small.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from trilobit.surgery.roles import decoder_layers
from trilobit.train.gloo import GatherParts, ScatterSums
from trilobit.train.pieces import Piece, sharded_pieces

Rows = Callable[[Piece], Tensor]
"""This rank's rows of a parameter, in any dtype, on any device."""


@torch.no_grad()
def cut(model: nn.Module, mesh: DeviceMesh, device: torch.device, rows: Rows) -> list[Piece]:
    """Cut a model on meta into the parts of `mesh`, in place, and fill this rank's. Returns what it keeps."""
    assert all(parameter.is_meta for parameter in model.parameters())
    shard(model, mesh)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    pieces = pieces_of(model, mesh)
    for piece in pieces:
        piece.local.copy_(rows(piece))
    return pieces


def cut_whole(model: nn.Module, mesh: DeviceMesh, device: torch.device, own: Mapping[str, Tensor] | None = None) -> list[Piece]:
    """`cut` of a model that this rank has whole, in place; its memory is freed a parameter at a time. own: this rank's rows of
    those parameters that are on meta already."""
    own = own or {}
    real = {name: parameter.detach() for name, parameter in model.named_parameters() if name not in own}
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = on_meta[id(parameter)]

    def rows(piece: Piece) -> Tensor:
        return own[piece.name] if piece.name in own else real.pop(piece.name)[piece.start : piece.stop]

    return cut(model, mesh, device, rows)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every decoder layer by itself, and what is outside them (embeddings, last norm, head) together."""
    gather, scatter_sums = GatherParts(), ScatterSums()
    for _, layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)  # pyright: ignore[reportArgumentType]
                module.set_custom_reduce_scatter(scatter_sums)  # pyright: ignore[reportArgumentType]


def pieces_of(model: nn.Module, mesh: DeviceMesh) -> list[Piece]:
    """The rows that this rank keeps of a model in the parts of `mesh`."""
    group: Any = mesh.get_group("shard")
    return sharded_pieces(model, group.rank(), group.size())


def without_memory(model: nn.Module) -> Any:
    """A copy whose parameters are on meta, ties kept."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def stay_whole(model: nn.Module) -> None:
    """From now on a forward leaves what it has gathered in place, until a backward or `reshard` lets go of it. Of a model
    that is not in parts, nothing."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False)


def reshard(model: nn.Module) -> None:
    """After a forward without backward: hold no more than this rank's rows. Of a model that is not in parts, nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
