"""Who reads and who writes the residual stream of a decoder, and where its values are: found by watching, then proven.

Roles (roles.py) say which linears read the stream through which norm, and which write to it. The proof is a forward in which
hooks turn everything that is written, turn back what norms read, turn what they return and turn back what the readers
read: if the logits stay, every part of the model but these hooks commutes with an orthogonal turn of the stream, and the
turns may be moved into the weights (rotate.py). Gains behind the block, layer scales, a gate that reads a norm as well:
whatever depends on single channels moves the logits, and the model is refused with its weights untouched. The proof runs in
fp32 whatever the model's dtype: in bf16 an outlier that is turned is rounded in every channel, which would have to be forgiven.

The first position attends to itself alone, so there each head of what the attention's last linear reads *is* the value of
a key-value head: blocks of linears' outputs that agree with it are the values, fused projections included. Hooks that
turn them and turn them back prove it in the same way.

Letters: D width of the stream, O outputs, K inputs, W head dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.surgery.outlier_safe import NormRule, embedding_scale, probe_norm
from trilobit.surgery.roles import PROBE_TOKENS, Roles, Site, evaluating, find_roles, is_norm, vocabulary_size

NOTICED = 1e-3  # of the logits' length: what a turn that does not commute moves them by, at the least
ELSEWHERE = "Use `--rotate ffn` or `--rotate none`, which leave the residual stream alone."


@dataclass(frozen=True)
class Stream:
    """Who touches the residual stream. readers: path of a linear → path of its norm, the head included."""

    width: int
    roles: Roles
    norms: dict[str, NormRule]
    readers: dict[str, str]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class ValueHeads:
    """Where a layer's values come from: rows `start` to `start + width` of `linear`, for each start, are one head, and
    `output` reads mixtures of these heads over positions."""

    linear: str
    starts: tuple[int, ...]
    output: str
    width: int


def find_stream(model: PreTrainedModel) -> Stream:
    """Who reads and writes the residual stream of `model`, proven by a turned forward; the model is left as it was.

    Raises ModelError, saying which module it is and what to do, where a turn of the stream would change the logits.
    """
    roles = find_roles(model)
    embedding = model.get_submodule(roles.embedding)
    assert isinstance(embedding, nn.Embedding), type(embedding)
    embedding_scale(embedding)
    readers, writers = {}, []
    for site in roles.sites:
        linear: Any = model.get_submodule(site.path)
        if site.role != "input":
            writers.append(site.path)
        elif site.norm is None:
            raise ModelError(
                f"{site.path} reads the residual stream without a norm in front of it (as where norms come after the block, "
                f"in OLMo 2): the gains then act on what is added to the stream, which cannot be turned. {ELSEWHERE}"
            )
        else:
            readers[site.path] = site.norm
        width = linear.in_features if site.role == "input" else linear.out_features
        if width != embedding.embedding_dim:
            raise ModelError(
                f"{site.path} does not read or write the residual stream of {embedding.embedding_dim} but {width} channels "
                f"in between (as latent attention does), which a fused rotation does not know. {ELSEWHERE}"
            )
    readers[roles.head] = _final_norm(model, roles, writers)
    norms = {}
    for path in dict.fromkeys(readers.values()):
        norm = model.get_submodule(path)
        rule = probe_norm(norm)
        if rule is None:
            raise ModelError(
                f"{path} is a {type(norm).__name__}, which is not an RMSNorm with a gain alone (LayerNorm subtracts the mean, "
                f"and adds a bias), so a turn of the residual stream does not commute with it. {ELSEWHERE}"
            )
        norms[path] = rule
    stream = Stream(embedding.embedding_dim, roles, norms, readers, tuple(writers))
    _require_partition(model, stream)
    moved = _moved(model, partial(_turned_stream, model, stream))
    if moved > NOTICED:
        raise ModelError(
            f"the logits of {type(model).__name__} move by {moved:.2g} of their length when its residual stream is turned and "
            f"turned back, so something in it depends on single channels (a gain behind the block?). {ELSEWHERE}"
        )
    return stream


def find_values(model: PreTrainedModel, roles: Roles, width: int) -> tuple[list[ValueHeads], str]:
    """Where the values of each layer are, heads of `width` channels; ([], why) if that is not the same clear picture in all.

    The first position attends to itself alone, so there each head of what the attention's last linear reads *is* the value
    of some key-value head: blocks of linears' outputs that agree with it are found by comparing. Then values that are turned
    there and turned back before that linear have to leave the logits alone.
    """
    seen = _first_position(model, roles)
    found = []
    for output in (site for site in roles.sites if site.role == "attention-output"):
        read = seen[output.path][0]
        candidates = [site for site in roles.sites if site.role == "input" and site.layer == output.layer]
        heads = _match(read, [(site.path, seen[site.path][1]) for site in candidates], width)
        if isinstance(heads, str):
            return [], f"left alone: {output.path} {heads}"
        found.append(ValueHeads(heads[0], heads[1], output.path, width))
    if len({len(layer.starts) for layer in found}) != 1 or len(found) != len(roles.layers):
        return [], "left alone: the layers differ in their attention"
    if _moved(model, partial(_turned_values, model, found)) > NOTICED:
        return [], "left alone: what attention does with values does not commute with turning each head"
    return found, ""


def _match(read: Tensor, outputs: list[tuple[str, Tensor]], width: int) -> tuple[str, tuple[int, ...]] | str:
    """The linear and the rows whose blocks of `width` make up `read`, or why there is none."""
    if len(read) % width:
        return f"reads {len(read)} channels, which are no heads of {width}"
    blocks = read.view(-1, width)
    matched: dict[str, set[int]] = {}
    for block in blocks:
        for path, output in outputs:
            if len(output) % width == 0:
                distance = (output.view(-1, width) - block).norm(dim=-1)
                if distance.min() <= 1e-2 * block.norm():
                    matched.setdefault(path, set()).add(int(distance.argmin()))
                    break
        else:
            return "reads more than a mixture of values (a gate, a sink?)"
    if len(matched) != 1:
        return "reads the values of several linears"
    ((path, indices),) = matched.items()
    return path, tuple(index * width for index in sorted(indices))


def _require_partition(model: PreTrainedModel, stream: Stream) -> None:
    """Every matrix of `model` is the embedding, the head, a reader or a writer, each a tensor of its own."""
    paths = [stream.roles.embedding, *stream.readers, *stream.writers]
    touched = [id(model.get_parameter(f"{path}.weight")) for path in paths]
    if len(set(touched)) != len(touched) - stream.roles.tied:
        raise ModelError(f"{type(model).__name__} shares weights between layers, which would be turned twice. {ELSEWHERE}")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in touched:
            raise ModelError(f"{name} {tuple(parameter.shape)} neither reads nor writes the residual stream. {ELSEWHERE}")


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary_size(model), (1, PROBE_TOKENS), generator=generator).to(model.device)


def _final_norm(model: PreTrainedModel, roles: Roles, writers: list[str]) -> str:
    """Path of the norm that the head reads. Raises ModelError if there is none, or if a norm follows a writer directly."""
    paths = {module: name for name, module in model.named_modules()}
    written: list[Tensor] = []
    normed: list[tuple[str, Tensor, Tensor]] = []
    read: list[Tensor] = []

    def after_norm(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(output, Tensor):
            normed.append((paths[module], inputs[0], output))

    def after_writer(module: nn.Module, inputs: Any, output: Any) -> None:
        written.append(output)

    with evaluating(model), _hooked() as hook:
        hook(model.get_submodule(roles.head).register_forward_pre_hook(lambda m, inputs: read.append(inputs[0])))
        for path in writers:
            hook(model.get_submodule(path).register_forward_hook(after_writer))
        for module in paths:
            if is_norm(module):
                hook(module.register_forward_hook(after_norm))
        model(input_ids=_probe_tokens(model), use_cache=False)
    behind = next((path for path, x, _ in normed if any(x is output for output in written)), None)
    if behind is not None:
        raise ModelError(
            f"{behind} is a norm behind the block (as in Gemma 3 and OLMo 2): its gains act on single channels of what is "
            f"added to the residual stream, so the stream cannot be turned. {ELSEWHERE}"
        )
    final = [path for path, _, output in normed if output.shape == read[0].shape and torch.equal(output, read[0])]
    if not final:
        raise ModelError(
            f"{roles.head} does not read a norm's output, so the final gains cannot be folded into it. {ELSEWHERE}"
        )
    return final[-1]


def _first_position(model: PreTrainedModel, roles: Roles) -> dict[str, tuple[Tensor, Tensor]]:
    """What each decoder linear reads and returns at the first position: [K], [O] fp32."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def after(site: Site, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = (value.reshape(PROBE_TOKENS, -1)[0].float() for value in (inputs[0], output))
        seen[site.path] = x, y

    with _exact(model), evaluating(model), _hooked() as hook:
        for site in roles.sites:
            hook(model.get_submodule(site.path).register_forward_hook(partial(after, site)))
        model(input_ids=_probe_tokens(model), use_cache=False)
    return seen


@contextmanager
def _exact(model: PreTrainedModel) -> Iterator[None]:
    """Within, parameters and buffers of fewer bits are fp32; afterwards they are, bit by bit, what they were."""
    low = [(x, x.dtype) for x in (*model.parameters(), *model.buffers()) if x.dtype in (torch.bfloat16, torch.float16)]
    try:
        for x, _ in low:
            x.data = x.data.float()
        yield
    finally:
        for x, dtype in low:
            x.data = x.data.to(dtype)


def _moved(model: PreTrainedModel, turned: Any) -> float:
    """How far the logits move inside `turned()`, relative to their length: the median over positions."""
    tokens = _probe_tokens(model)
    with _exact(model), evaluating(model):
        before = model(input_ids=tokens, use_cache=False).logits.double()
        with turned():
            after = model(input_ids=tokens, use_cache=False).logits.double()
    moved = ((after - before).norm(dim=-1) / before.norm(dim=-1)).median().item()
    return moved if moved == moved else torch.inf


@contextmanager
def _turned_stream(model: PreTrainedModel, stream: Stream) -> Iterator[None]:
    """Hooks turn the embedding, what writers write and what norms return; and turn back what norms and readers read."""

    def after(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        return _turn(output)

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return _turn_back(inputs[0]), *inputs[1:]

    with _hooked() as hook:
        for path in (stream.roles.embedding, *stream.writers, *stream.norms):
            hook(model.get_submodule(path).register_forward_hook(after))
        for path in (*stream.readers, *stream.norms):
            hook(model.get_submodule(path).register_forward_pre_hook(before))
        yield


@contextmanager
def _turned_values(model: PreTrainedModel, layers: list[ValueHeads]) -> Iterator[None]:
    """Hooks turn each head's values where they come from, and turn back each head of what reads their mixtures."""

    def after(layer: ValueHeads, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for start in layer.starts:
            rows = slice(start, start + layer.width)
            output[..., rows] = _turn(output[..., rows])
        return output

    def before(layer: ValueHeads, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return _turn_back(x.unflatten(-1, (-1, layer.width))).reshape(x.shape), *inputs[1:]

    with _hooked() as hook:
        for layer in layers:
            hook(model.get_submodule(layer.linear).register_forward_hook(partial(after, layer)))
            hook(model.get_submodule(layer.output).register_forward_pre_hook(partial(before, layer)))
        yield


@contextmanager
def _hooked() -> Iterator[Callable[[Any], None]]:
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def _signs(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[-1], device=x.device) % 3 == 0, -1.0, 1.0).to(x)


def _turn(x: Tensor) -> Tensor:
    """A turn that moves every channel and mixes it with another one: signs, one place on, and 45° between the halves.

    Of an odd number of channels the last is only moved.
    """
    half = x.shape[-1] // 2
    first, second, odd = (x * _signs(x)).roll(1, -1).split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([(first - second) * 0.5**0.5, (first + second) * 0.5**0.5, odd], -1)


def _turn_back(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second, odd = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([(first + second) * 0.5**0.5, (second - first) * 0.5**0.5, odd], -1).roll(-1, -1) * _signs(x)
