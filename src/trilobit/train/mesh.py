"""One model over several ranks: a copy each (DDP), a part each (FSDP2), or copies in parts (HSDP); and one process, unchanged.

FSDP2 (torch's fully_shard, DTensor) keeps a part of every parameter's rows on each rank and gathers a decoder layer's rows
just before the layer runs: inside a forward every parameter is whole, so that a ternary scale is mean|W| over the full logical
matrix without a further word. Outside a forward no rank has more than its rows, from the beginning (parts.py) to the end
(`gathered`). Where memory is plenty they are gathered once a step instead and kept until its last backward, a teacher for good
(in torch's words reshard_after_forward=False). FSDP1 is refused: its flat parameters cut through matrices. Parameters stay fp32
when gathered and autocast rounds activations alone; gathering bf16 would round latents before they are quantised.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trilobit.config.training import Gather, mesh_of
from trilobit.errors import ConfigError
from trilobit.nn.ternary import TernaryLinear
from trilobit.train.distributed import ALONE, Ranks, Team
from trilobit.train.parts import cut_whole, pieces_of, reshard, stay_whole, without_memory
from trilobit.train.pieces import Piece, heights, whole_pieces

T = TypeVar("T")
Read = Callable[[str], Tensor]
"""A whole parameter by its name."""

STATE_BYTES = 16  # of a parameter that trains: latent, gradient and two moments in fp32
SHARE_FOR_STATE = 0.5  # of a device's memory; the rest is for activations
WHOLE_BYTES = 4  # of a parameter that is gathered
SHARE_FOR_WHOLE = 0.125  # of a device's memory: as much as all gathered parameters may take, a teacher's too


@dataclass(frozen=True)
class Arrangement:
    """R copies of a model in S parts each, R · S ranks in all; and why. gathered_once: a step, that is, not for each forward
    and backward of a layer."""

    kind: str  # "one", "ddp", "fsdp" or "hsdp"
    replicas: int
    shards: int
    reason: str
    gathered_once: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether a rank has less than a copy."""
        return self.shards > 1

    def __str__(self) -> str:
        what = {
            "one": "one process",
            "ddp": f"ddp: a copy on each of {self.replicas} ranks",
            "fsdp": f"fsdp: one copy in {self.shards} parts",
            "hsdp": f"hsdp: {self.replicas} copies in {self.shards} parts each",
        }
        return f"{what[self.kind]}{', gathered once a step' if self.gathered_once else ''} ({self.reason})"


def arrange(
    wanted: str,
    parameters: int,
    size: int,
    local_size: int,
    memory: int,
    gather: Gather = "auto",
    optimizer: str = "adamw",
    whole_bytes: int = WHOLE_BYTES,
) -> Arrangement:
    """How `size` ranks, `local_size` of them on each machine, share a model. memory: bytes of a rank's device. whole_bytes: a
    parameter's where rows are gathered once, with its teacher's.

    Raises ConfigError where --mesh does not fit the ranks.
    """
    found = _shared_out(wanted, parameters, size, local_size, memory, optimizer)
    roomy = whole_bytes * parameters <= SHARE_FOR_WHOLE * memory
    return replace(found, gathered_once=found.in_parts and (gather == "step" or (gather == "auto" and roomy)))


def _shared_out(wanted: str, parameters: int, size: int, local_size: int, memory: int, optimizer: str) -> Arrangement:
    """`arrange` without how rows are gathered."""
    kind, replicas, shards = mesh_of(wanted)
    if size == 1:
        if kind != "auto":
            raise ConfigError(f"--mesh {wanted} needs several processes: torchrun --nproc-per-node N -m trilobit …")
        return Arrangement("one", 1, 1, "no launcher started others")
    if kind == "hsdp":
        if replicas * shards != size:
            raise ConfigError(f"--mesh {wanted} is {replicas * shards} ranks, but {size} were started.")
        return Arrangement("hsdp", replicas, shards, "as asked")
    if kind != "auto":
        return Arrangement(kind, size if kind == "ddp" else 1, 1 if kind == "ddp" else size, "as asked")
    need, room = STATE_BYTES * parameters, SHARE_FOR_STATE * memory
    state = f"weights, gradients and moments are {need / 1e9:.3g} GB"
    held = need <= room
    if held and optimizer != "muon":
        return Arrangement("ddp", size, 1, f"{state}, and half of a rank's {memory / 1e9:.3g} GB hold them")
    iteration = f"{state}, which a rank could hold, but the ranks of a machine share Muon's iteration"
    nodes = size // local_size
    if nodes > 1 and local_size > 1 and size % local_size == 0 and need / local_size <= room:
        few = f"{state}: too many for one rank, but one machine's {local_size} hold them"
        return Arrangement("hsdp", nodes, local_size, iteration if held else few)
    many = f"{state}: too many for half of a rank's {memory / 1e9:.3g} GB"
    return Arrangement("fsdp", 1, size, iteration if held else many)


def arrangement_for(
    team: Team,
    wanted: str,
    parameters: int,
    memory: int,
    gather: Gather = "auto",
    optimizer: str = "adamw",
    whole_bytes: int = WHOLE_BYTES,
) -> Arrangement:
    """`arrange`, the same on every rank whatever each has: by the least memory, and by machines only where they are alike."""
    least, most_local, fewest_local = team.agree(-memory, team.local_size, -team.local_size)
    local_size = most_local if most_local == -fewest_local else 1
    return arrange(wanted, parameters, team.size, local_size, -least, gather, optimizer, whole_bytes)


def device_memory(device: torch.device, local_size: int) -> int:
    """Bytes that one of `local_size` ranks on this machine can have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_size


class Spread:
    """A model over the ranks of a team, as the training loop sees it. This one is a model in one process.

    forward: what an objective calls instead of the model. pieces: the rows that this rank steps and saves. structure: the model
    with whole parameters, on meta where there is no rank that has them.
    """

    def __init__(self, model: nn.Module, team: Team = ALONE, arrangement: Arrangement | None = None):
        self.model, self.team = model, team
        self.arrangement = arrangement or Arrangement("one", 1, 1, "")
        self.forward: Callable[..., Any] = model
        self.pieces: list[Piece] = whole_pieces(model)
        self.structure: Any = model

    @property
    def shard_group(self) -> Any:
        """The ranks that share one copy's rows; None where every rank has all of them."""
        return None

    @property
    def copy_group(self) -> Any:
        """The ranks that hold copies of the same rows; None where nobody else has them."""
        return None

    @property
    def writes(self) -> bool:
        """Whether this rank's pieces belong in a checkpoint: each row once."""
        return self.team.first

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged after the last one of a step alone."""
        yield

    def clip(self, most: float) -> Tensor:
        """Scale the gradients down to a global norm of `most`; returns the norm they had. Afterwards `pieces` have them."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if any(gradient.dtype == torch.bfloat16 for gradient in gradients):  # torch would sum them in bf16
            norm = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]).norm()
        else:
            norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return norm

    def rest(self) -> None:
        """After a forward without backward: hold no more than what this rank keeps."""

    def gathered(self, do: Callable[[Read], T]) -> T | None:
        """What `do` makes, on rank 0, of the parameters, which it asks for by name and gets whole, one at a time; None on the
        others. Every rank has to call it. Of a model in parts they are put together on rank 0's CPU, and nowhere else."""
        return do(lambda name: self.model.get_parameter(name).detach()) if self.team.first else None


class Copies(Spread):
    """A copy on each rank (DDP): gradients are averaged while the last backward runs."""

    def __init__(self, model: nn.Module, team: Team, arrangement: Arrangement):
        super().__init__(model, team, arrangement)
        device = next(model.parameters()).device
        devices = [device.index] if device.type == "cuda" else None
        # Learned ranges have no gradient while nothing is quantised yet.
        unused = any(isinstance(m, TernaryLinear) and m.ranges is not None for m in model.modules())
        with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers, which older ones do not know
            warnings.simplefilter("ignore", FutureWarning)
            self.wrapped = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True,
                find_unused_parameters=unused,
            )  # fmt: skip
        self.forward = self.wrapped

    @property
    def copy_group(self) -> Any:
        return dist.group.WORLD

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.wrapped.no_sync():
                yield


class Shards(Spread):
    """Rows of every parameter on each rank (FSDP2), all of them once in each of the mesh's copies."""

    def __init__(self, model: nn.Module, structure: nn.Module, mesh: DeviceMesh, team: Ranks, arrangement: Arrangement):
        super().__init__(model, team, arrangement)
        self.structure, self.ranks = structure, team
        self._group: Any = mesh.get_group("shard")
        self._copies = mesh.get_group("copy") if mesh.ndim > 1 else None
        self.copy_index = mesh.get_local_rank("copy") if mesh.ndim > 1 else 0
        self.pieces = pieces_of(model, mesh)
        if arrangement.gathered_once:
            stay_whole(model)

    @property
    def shard_group(self) -> Any:
        return self._group

    @property
    def copy_group(self) -> Any:
        return self._copies

    @property
    def writes(self) -> bool:
        return self.copy_index == 0

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        self.model.set_reshard_after_backward(last or not self.arrangement.gathered_once)
        yield

    def clip(self, most: float) -> Tensor:
        for piece in self.pieces:
            gradient: Any = piece.parameter.grad
            piece.local.grad = None if gradient is None else gradient.to_local()
            piece.parameter.grad = None
        gradients = [piece.local.grad for piece in self.pieces if piece.local.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.pieces[0].local.device)
        if gradients:
            squares += nn.utils.get_total_norm(gradients).double().square()
        dist.all_reduce(squares, group=self._group)
        norm = squares.sqrt().to(self.pieces[0].local.dtype)
        nn.utils.clip_grads_with_norm_([piece.local for piece in self.pieces], most, norm)
        return norm

    def rest(self) -> None:
        reshard(self.model)

    def gathered(self, do: Callable[[Read], T]) -> T | None:
        self.rest()
        key, count = self.ranks.key("gathered"), 0
        numbers = {piece.name: index for index, piece in enumerate(self.pieces)}

        def ask(number: int) -> None:
            nonlocal count
            self.ranks.store.set(f"{key}/{count}", str(number))
            count += 1

        def read(name: str) -> Tensor:
            ask(numbers[name])
            return self._received(self.pieces[numbers[name]])

        if self.team.first:
            try:
                return do(read)
            finally:
                ask(-1)
        # At the store, however long rank 0 writes between two of them.
        while self.writes and (number := int(self.ranks.wait_calmly(f"{key}/{count}"))) >= 0:
            count += 1
            if self.pieces[number].local.numel():
                dist.send(self.pieces[number].local.detach().cpu().contiguous(), dst=0, group=self.ranks.control)
        return None

    def _received(self, piece: Piece) -> Tensor:
        """On rank 0: a whole parameter, of its own rows and those that the others send."""
        whole = torch.empty(piece.shape, dtype=piece.local.dtype)
        whole[: piece.stop] = piece.local.detach().cpu()
        start = piece.stop
        for index, height in enumerate(heights(piece.shape[0], self._group.size())):
            if index > 0 and height > 0 and whole.numel():
                dist.recv(whole[start : start + height], src=dist.get_global_rank(self._group, index), group=self.ranks.control)
                start += height
        return whole


def make_mesh(arrangement: Arrangement, device_type: str) -> DeviceMesh:
    """The ranks as a row of parts, or as rows of copies."""
    if arrangement.kind == "hsdp":
        return init_device_mesh(device_type, (arrangement.replicas, arrangement.shards), mesh_dim_names=("copy", "shard"))
    return init_device_mesh(device_type, (arrangement.shards,), mesh_dim_names=("shard",))


def spread_over(team: Team, arrangement: Arrangement, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> Spread:
    """A model that every rank has whole, over the ranks, in place; a teacher is cut into parts where its student is."""
    if not isinstance(team, Ranks):
        return Spread(model)
    if arrangement.kind == "ddp":
        return Copies(model, team, arrangement)
    device, structure = next(model.parameters()).device, without_memory(model)
    mesh = make_mesh(arrangement, device.type)
    for each in (model, teacher):
        if each is not None:
            cut_whole(each, mesh, device)
    return Shards(model, structure, mesh, team, arrangement)
