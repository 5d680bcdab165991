"""AdamW on fp32 latents whose moments, and gradients, may take half of their bytes or fewer, or the host's memory.

    fp32   torch's fused AdamW, untouched
    bf16   both moments rounded to bf16 after each step. At β₂ = 0.95 a step brings a moment a twentieth nearer to where it
           goes, so that rounding stops it 4 to 8 % short at worst; at 0.999 it would not move at all
    int8   the same here; Muon's momentum in blocks of 256 with one scale each (muon.py), which suits no second moment:
           those span decades within a block (arXiv 2110.02861)

The step itself is torch's fused one whatever is stored and wherever, on fp32 copies of a few parameters at a time.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

State = Literal["fp32", "bf16", "int8"]
COPY_BYTES = {True: 1 << 22, False: 1 << 26}
"""Of parameters whose moments are widened or brought at once. CPU: what stays in its caches; elsewhere: few launches."""
BLOCK = 256
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """Fused AdamW. state: how moments are kept between steps; offload: in the host's memory, wherever parameters are.
    Gradients of any dtype."""

    kept: ClassVar[tuple[str, ...]] = MOMENTS
    """Names of the state that `offload` moves."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float = 0.0,
        state: State = "fp32", offload: bool = False,
    ):  # fmt: skip
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.moments_in: State = state
        self.offload = offload

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        narrow = self.moments_in != "fp32" or any(gradient.dtype == torch.bfloat16 for gradient in gradients)
        if not narrow and not self.offload:
            super().step()
            return
        for group in self.param_groups:
            for parameters in _pieces([p for p in group["params"] if p.grad is not None]):
                self._step(group, parameters)

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                dtype = parameter.dtype if self.moments_in == "fp32" else torch.bfloat16
                for name in MOMENTS:
                    state[name] = self.keep(torch.zeros_like(parameter, dtype=dtype))
        states = [self.state[parameter] for parameter in parameters]
        first, second = ([self.bring(s[name], p) for s, p in zip(states, parameters, strict=True)] for name in MOMENTS)
        adamw(
            [p.detach() for p in parameters], [p.grad.to(p.dtype) for p in parameters if p.grad is not None], first, second, [],
            [s["step"] for s in states], fused=True, grad_scale=None, found_inf=getattr(self, "found_inf", None), amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        for state, *moments in zip(states, first, second, strict=True):
            for name, moment in zip(MOMENTS, moments, strict=True):
                state[name].copy_(moment, non_blocking=True)  # of fp32 that stays here: itself

    def settle(self) -> None:
        """Wait until moments that were sent to the host's memory have come there: before anybody reads them."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()

    def keep(self, moment: Tensor) -> Tensor:
        """A moment where it is kept: page-locked memory of the host where that is asked for, else as it is."""
        if not self.offload or moment.device.type == "cpu":
            return moment
        return torch.empty_like(moment, device="cpu", pin_memory=True).copy_(moment)

    def bring(self, kept: Tensor, parameter: Tensor) -> Tensor:
        """A moment where and as its parameter's step needs it; a copy of what is kept elsewhere. Copies there and back take
        their turn in the device's stream: nothing waits for them here (`settle` does)."""
        return kept.to(parameter.device, parameter.dtype, non_blocking=True, copy=self.offload)


def _pieces(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, as many at a time as COPY_BYTES hold, one at least."""
    piece, size = [], 0
    for parameter in parameters:
        if piece and size + 4 * parameter.numel() > COPY_BYTES[parameter.device.type == "cpu"]:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += 4 * parameter.numel()
    if piece:
        yield piece


def to_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """[…, C] → int8 codes […, C] and scales […, ⌈C/256⌉] of `values`' dtype: the nearest of 255 even levels up to the largest
    of a block of a row."""
    *rows, columns = values.shape
    blocks = -(-columns // BLOCK)
    padded = nn.functional.pad(values, (0, blocks * BLOCK - columns)).view(*rows, blocks, BLOCK)
    scales = padded.abs().amax(-1) / 127
    codes = (padded / scales.clamp(min=torch.finfo(values.dtype).tiny)[..., None]).round_().to(torch.int8)
    return codes.view(*rows, blocks * BLOCK)[..., :columns].contiguous(), scales


def from_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """[…, C] in the scales' dtype: what `to_blocks` stored."""
    return codes * scales.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]
