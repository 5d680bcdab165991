"""What `tune` begins from where ranks share the model: the full-precision checkpoint in parts, and what is made of it.

    checkpoint ──rows──▶ the original in parts: its roles, its loss, the RMS of its activations, its fingerprint
                              │ rows, on the device
                              ├──▶ teacher in parts, fp32 or bf16
                              └──▶ student in parts, after surgery on meta; then the original is dropped

A rank holds its rows of all three for a moment: no more than the rows, gradients and moments of a step.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.infer.loaded import Loaded
from trilobit.infer.opened import NotOpened, Opened, open_pretrained
from trilobit.surgery.single_scale import single_scale
from trilobit.tensors import fingerprint
from trilobit.train.distributed import Team
from trilobit.train.parts import cut
from trilobit.train.pieces import Piece


def open_for_ranks(source: str, team: Team) -> tuple[Opened | None, str]:
    """The checkpoint, opened on every rank; or None and why every rank has to load it whole. What is wrong with it is left to
    whoever loads it."""
    opened, reason = None, ""
    try:
        opened = open_pretrained(source)
    except NotOpened as error:
        reason = str(error)
    except ModelError as error:
        reason = f"it could not be opened: {error}"
    reasons = [said for said in team.assemble(reason) if said]
    return (None, reasons[0]) if reasons else (opened, "")


class Original:
    """A checkpoint in the parts of a mesh. model: it, in eval mode."""

    def __init__(self, opened: Opened, mesh: DeviceMesh, device: torch.device):
        self.opened, self.mesh, self.device = opened, mesh, device
        self.model = opened.structure()
        pieces = cut(self.model, mesh, device, lambda piece: opened.rows(piece.name, piece.start, piece.stop))
        self._own: dict[str, Tensor] = {piece.name: piece.local.detach() for piece in pieces}

    def loaded(self) -> Loaded:
        """As if it had been loaded."""
        return Loaded(self.model, self.opened.tokenizer, None, "full precision")

    def fingerprint(self) -> str:
        """That of the whole checkpoint, which every rank reads for it, a tensor at a time: all have the same then."""
        return fingerprint(self.opened.tensors())

    def teacher(self, precision: str) -> PreTrainedModel:
        """As objective.frozen_copy of the whole model."""
        model = self.opened.structure().requires_grad_(False)
        if precision == "bf16":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        cut(model, self.mesh, self.device, lambda piece: self._own[piece.name])
        return model

    def student(self, structure: PreTrainedModel, held: list[str]) -> PreTrainedModel:
        """`structure`, on meta and after surgery, in parts, with the original's weights; inserted gains are one. held: block
        norms that have become single scales."""

        def rows(piece: Piece) -> Tensor:
            path, _, last = piece.name.rpartition(".")
            if path in held:
                return single_scale(self.model.get_submodule(path))[piece.start : piece.stop]
            if piece.name in self._own:
                return self._own[piece.name]
            if last == "ranges":  # as TernaryLinear.from_linear
                return self._own[f"{path}.weight"].abs().amax(dim=1, keepdim=True)
            assert path.endswith(".rms_norm"), piece.name
            return torch.ones((), device=self.device)

        cut(structure, self.mesh, self.device, rows)
        return structure
