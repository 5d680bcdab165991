"""Muon: momentum, orthogonalised. For the matrices inside the decoder layers; everything else takes AdamW's step.

    B ← μ·B + g        u = g + μ·B                                                     Nesterov, μ = 0.95
    O = iterate(u)     the nearest semi-orthogonal matrix, by five odd polynomials of u / ‖u‖: X ← aX + (bA + cA²)X, A = XXᵀ
    W ← (1 − η·wd)·W − η·s·O        s = 0.2·√max(R, C): steps as long as AdamW's at the same η (`rms`, arXiv 2502.16982),
                                    or √max(1, R/C): steps of one spectral norm (`spectral`, Jordan's own)

NorMuon (arXiv 2510.05491) divides each row of O by the root of its running mean square, and gives the whole its length back.

The constants of outlier-safe pre-training (arXiv 2506.19697) are the defaults: quintic coefficients (Keller Jordan's), five
iterations in bf16. `polar-express` has a polynomial of its own for each iteration (arXiv 2505.16932), which brings the
singular values nearer to one. The iteration is over the whole logical matrix. Matrices of one shape are iterated as one
batched product, those of experts [E, R, C] among them. Of tall ones A = XᵀX, and X ← X·(a + bA + cA²). Products that are
symmetric, all but those with X on one side only, cost half where kernels/bf16.py has a kernel for them. Momentum may be kept
in bf16, or in int8 by blocks of 256, which an orthogonalised update bears even with evenly spaced levels (arXiv 2509.23106).

Letters: N matrices of one shape, R rows, C columns.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from trilobit.errors import ConfigError
from trilobit.kernels.bf16 import alone, apply, apply_right, commuting, gram, runs_on, threads
from trilobit.nn.outlier_safe import EmbeddingProjection
from trilobit.surgery.roles import decoder_layers
from trilobit.train.adamw import AdamW, State, from_blocks, to_blocks

Coefficients = Literal["quintic", "polar-express"]
Scale = Literal["rms", "spectral"]

MOMENTUM = 0.95
RMS = 0.2  # of AdamW's steps
EPS = 1e-8
ROW_MOMENTUM = 0.95
BLOCKS = ("momentum", "momentum_scale")  # how momentum is kept in int8
ITERATION: dict[Coefficients, list[tuple[float, float, float]]] = {
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar-express": [
        (8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ],
}  # fmt: skip
MARGIN: dict[Coefficients, float] = {"quintic": 1.0, "polar-express": 1.02}
"""The norm is overestimated by this factor: polar-express's first polynomial diverges just above one."""
GROUPS = (3, 2)
"""Of wide matrices, this many polynomials at a time are multiplied out on A, which is small, before X is touched."""
WIDE, WORTHWHILE = 2, 256
"""What counts as wide: at least twice as many columns as rows, and rows enough that products are what takes the time."""
CHUNK_BYTES = {True: 1 << 23, False: 1 << 28}
"""Of fp32 updates that are iterated at once. CPU: what stays in its caches; elsewhere: few launches, little memory."""
PIECE_BYTES = 1 << 20
"""For each thread, of the bf16 matrices that our kernel iterates at once: what stays in the caches, with all that is made of
them."""


def orthogonalize(matrices: Tensor, coefficients: Coefficients = "quintic", compute: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, R, C] → the same shape, in `compute`: each matrix with its singular values brought near one.

    Singular values from 0.01 of the Frobenius norm on end between 0.68 and 1.14 (quintic), 0.85 and 1.15 (polar-express).
    Zero stays zero.
    """
    x = matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = torch.mul(x, 1 / (norm * MARGIN[coefficients] + EPS), out=torch.empty_like(x, dtype=compute))
    if not runs_on(compute, x.device) or x.numel() == 0:
        return _iterate(x, coefficients)
    size = max(1, PIECE_BYTES * threads() // (2 * x.shape[-2] * x.shape[-1]))
    return torch.cat([_iterate(piece, coefficients) for piece in x.split(size)])


def _iterate(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Of normalised matrices [N, R, C]."""
    tall = x.shape[-2] > x.shape[-1]
    rows, columns = sorted(x.shape[-2:])
    # The mean of A's diagonal, known: what is taken from it before it is rounded, and carried along as a number.
    shift = 1 / (max(rows, 1) * MARGIN[coefficients] ** 2)
    remaining = iter(ITERATION[coefficients])
    grouped = coefficients == "quintic" and columns >= WIDE * rows >= WIDE * WORTHWHILE
    for steps in GROUPS if grouped else (1,) * len(ITERATION[coefficients]):
        rest = gram(x.mT if tall else x, -shift)  # A = shift + rest, as wide as the shorter side
        product, diagonal = rest, 0.0  # of the polynomials so far: diagonal + product
        for index in range(steps):
            a, b, c = next(remaining)
            lone = a + b * shift + c * shift**2
            polynomial = commuting(rest, rest, c, b + 2 * c * shift)  # a + bA + cA² = lone + polynomial
            if index == 0:
                product, diagonal = polynomial, lone
            else:
                product = commuting(product, polynomial, of_a=lone, of_b=diagonal)
                diagonal *= lone
            if index + 1 < steps:  # A ← A · (lone + polynomial)²: all of these commute
                square = commuting(polynomial, polynomial, of_a=2 * lone)
                rest = commuting(rest, square, of_a=lone**2, of_b=shift)
            shift *= lone**2
        x = apply_right(x, product, diagonal) if tall else apply(product, x, diagonal)
    return x


def step_scale(shape: torch.Size, scale: Scale) -> float:
    """s of the update of an [R, C] matrix."""
    return RMS * max(shape) ** 0.5 if scale == "rms" else max(1, shape[0] / max(1, shape[1])) ** 0.5


def normalize_rows(update: Tensor, moment: Tensor) -> Tensor:
    """NorMuon: each row of `update` […, R, C] over the root of its running mean square `moment` […, R, 1] (updated in place),
    at the Frobenius norm that √(R·C) unit entries would have in an orthogonal matrix, √min(R, C)."""
    update = update.to(moment.dtype)
    moment.lerp_(update.square().mean(dim=-1, keepdim=True), 1 - ROW_MOMENTUM)
    update = update / (moment.sqrt() + EPS)
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    return update * (min(update.shape[-2:]) ** 0.5 / (norm + EPS))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for, by type: inside the decoder layers the weights of linears (transformers' Conv1D is one) and the
    matrices of experts [E, R, C]; embedding projections. Not embeddings, head, gains, biases or convolutions, nor routers
    that are no linears.

    Raises ConfigError for one that is empty.
    """
    named: dict[str, Any] = {}
    for path, layer in decoder_layers(model):
        for name, module in layer.named_modules(prefix=path):
            if isinstance(module, nn.Linear | Conv1D):
                named[f"{name}.weight"] = module.weight
            elif not isinstance(module, _ConvNd):
                named |= {f"{name}.{own}": p for own, p in module.named_parameters(recurse=False) if _of_experts(p)}
    named |= {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, EmbeddingProjection)}
    chosen = {id(p): (name, p) for name, p in named.items() if isinstance(p, nn.Parameter) and p.requires_grad}
    for name, parameter in chosen.values():
        if not parameter.numel():
            raise ConfigError(f"{name} is {tuple(parameter.shape)}: there is nothing in it that Muon could make orthogonal.")
    return [parameter for _, parameter in chosen.values()]


def has_conv1d(model: nn.Module) -> bool:
    """Whether matrices are stored with a column for each output, as transformers' Conv1D has them."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _of_experts(parameter: Tensor) -> bool:
    return parameter.ndim == 3 and 1 not in parameter.shape[-2:]


def routing(model: nn.Module, matrices: list[nn.Parameter]) -> str:
    """In words: what Muon trains, and by name every matrix that it leaves to AdamW. matrices: Muon's."""
    ours = {id(p) for p in matrices}
    rest: dict[str, int] = defaultdict(int)
    vectors = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            vectors += parameter.ndim < 2
            rest[re.sub(r"\.\d+\.", ".*.", name)] += parameter.ndim >= 2
    left = [name + (f" ({number})" if number > 1 else "") for name, number in rest.items() if number]
    number = sum(p.shape[:-2].numel() for p in matrices)
    share = sum(p.numel() for p in matrices) / sum(p.numel() for p in model.parameters())
    return (
        f"Muon trains {number} matrices of {len({p.shape[-2:] for p in matrices})} shapes, {share:.0%} of the parameters; "
        f"AdamW {', '.join([*left, f'{vectors} vectors and scalars'])}"
    )


class Muon(AdamW):
    """Muon for the parameters of groups that say `muon`, AdamW (fused) for the others. One rate serves both.

    groups: as for torch's optimizers; at least one must say `"muon": True` and hold a matrix, or matrices [E, R, C]. `iterated`
    counts the matrices of the last step; a step that has none of them to move raises RuntimeError. A `found_inf` of one (as a
    GradScaler sets it) holds the weights back, on the device; momentum is what the gradients made of it. Raises ConfigError
    for other shapes, and for none.
    """

    kept = (*AdamW.kept, *BLOCKS)

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float = 0.0,
        coefficients: Coefficients = "quintic", scale: Scale = "rms", normuon: bool = False,
        compute: torch.dtype = torch.bfloat16, state: State = "fp32", offload: bool = False,
    ):  # fmt: skip
        super().__init__([{"muon": False, **group} for group in groups], lr, betas, weight_decay, state, offload)
        self.coefficients: Coefficients = coefficients
        self.scale: Scale = scale
        self.normuon, self.compute = normuon, compute
        self.iterated = self._moved = 0
        shapes = [self._shape(p) for group in self.param_groups if group["muon"] for p in group["params"]]
        if not shapes:
            raise ConfigError("no parameter was given to Muon: it wants at least one matrix.")
        if odd := [tuple(shape) for shape in shapes if len(shape) not in (2, 3) or not shape.numel()]:
            raise ConfigError(f"Muon takes matrices [R, C] or [E, R, C], none of which may be empty; {odd[0]} is none.")

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole logical matrix."""
        return parameter.shape

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        self.iterated = self._moved = 0
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        if not self._moved:
            raise RuntimeError("no matrix of Muon's has a gradient: nothing was made orthogonal in this step.")
        super().step()  # of what still has a gradient

    def _step_matrices(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple[torch.Size, torch.device], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes[parameter.shape, parameter.device].append((parameter, parameter.grad))
        for (shape, device), found in shapes.items():
            size = max(1, CHUNK_BYTES[device.type == "cpu"] // (4 * shape.numel()))
            workspace = found[0][0].new_empty(min(size, len(found)), *shape)  # fresh memory costs more than what is done in it
            with alone() if runs_on(self.compute, device) else nullcontext():
                for start in range(0, len(found), size):
                    self._step_chunk(group, found[start : start + size], workspace)

    def _step_chunk(self, group: dict[str, Any], found: list[tuple[nn.Parameter, Tensor]], workspace: Tensor) -> None:
        """One step of matrices of one shape. workspace: as many of them, overwritten."""
        updates = workspace[: len(found)]
        for (parameter, gradient), update in zip(found, updates, strict=True):
            self._accelerate(parameter, gradient, update)
        matrices = updates.flatten(0, -3)
        self.iterated += len(matrices)
        updates = orthogonalize(matrices, self.coefficients, self.compute).view(updates.shape)
        length = group["lr"] * step_scale(workspace.shape[-2:], self.scale)
        for (parameter, _), update in zip(found, updates, strict=True):
            if self.normuon:
                update = normalize_rows(update, self._row_moment(parameter))
            self._move(group, parameter, update, length)

    def _accelerate(self, parameter: nn.Parameter, gradient: Tensor, out: Tensor) -> None:
        """Momentum, and into `out` what is to be orthogonalised."""
        state = self.state[parameter]
        if self.moments_in == "int8":
            if not state:
                state |= dict(zip(BLOCKS, map(self.keep, to_blocks(torch.zeros_like(parameter))), strict=True))
            codes, scales = (state[name].to(parameter.device, non_blocking=True) for name in BLOCKS)
            momentum = from_blocks(codes, scales).mul_(MOMENTUM).add_(gradient)
            for name, kept in zip(BLOCKS, to_blocks(momentum), strict=True):
                state[name].copy_(kept, non_blocking=True)
        else:
            if not state:
                dtype = torch.bfloat16 if self.moments_in == "bf16" else parameter.dtype
                state["momentum"] = self.keep(torch.zeros_like(parameter, dtype=dtype))
            momentum = self.bring(state["momentum"], parameter).mul_(MOMENTUM).add_(gradient)
            state["momentum"].copy_(momentum, non_blocking=True)  # of fp32 that stays here: itself
        torch.add(gradient, momentum, alpha=MOMENTUM, out=out)

    def _row_moment(self, parameter: nn.Parameter) -> Tensor:
        if "row_moment" not in self.state[parameter]:
            self.state[parameter]["row_moment"] = torch.zeros_like(parameter[..., :1])
        return self.state[parameter]["row_moment"]

    def _move(self, group: dict[str, Any], parameter: nn.Parameter, update: Tensor, length: float) -> None:
        """Weight decay and the step, unless a found_inf holds it back; the gradient is done with."""
        self._moved += 1
        keep = 1 - group["lr"] * group["weight_decay"]
        bad = getattr(self, "found_inf", None)
        if bad is not None and bad.device.type != "cpu":  # decided there: reading it here would wait
            new = torch.mul(parameter, keep).sub_(update.to(parameter.dtype), alpha=length)
            parameter.copy_(torch.where(bad > 0, parameter, new))
        elif bad is None or not bool(bad > 0):
            parameter.mul_(keep).sub_(update, alpha=length)
        parameter.grad = None
