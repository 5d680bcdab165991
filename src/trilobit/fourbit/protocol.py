"""A protocol: everything that a number at 4 bits hinges on, pinned, printed and hashed.

Published numbers of one method differ by hidden knobs: QuaRot clips activations at 0.9 of their range and SpinQuant at 1,
one rounds weights to −8 … 7 over the row's best clip and the next over its whole range. Two results compare only if their
protocols have the same sha256. Three presets; what they say is what the authors' code does (docs/fourbit.md has the table):

    osp         outlier-safe pre-training (arXiv 2506.19697), whose code is SpinQuant's
    quarot      QuaRot (arXiv 2404.00456): symmetric activations, clips of 0.9 and 0.95, a Hadamard across heads
    spinquant   SpinQuant (arXiv 2405.16406): no clips, a learned residual rotation
"""

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from trilobit.config.quantize import WIDTHS, Method, Rotation, format_bits, parse_bits
from trilobit.errors import ConfigError
from trilobit.storage import read_json

Range = Literal["inputs", "outputs", "keys", "values", "weights"]
ROTATIONS = (
    "residual_rotation", "value_hadamard", "head_hadamard", "ffn_hadamard", "rotation_seed", "learning_steps", "learning_batch",
    "learning_rate", "learning_activation_bits", "learning_cache_bits", "learning_through_ranges",
)  # fmt: skip
"""Knobs that a prepared model follows from, whatever its bits."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every knob of a fake-quantised evaluation. All values are JSON. Raises ConfigError for values that a knob cannot have."""

    name: str
    """A label. It is part of the hash."""
    weight_bits: int = 4
    """Of the decoder's linears: 2 to 8, or 16 for none."""
    activation_bits: int = 4
    """Of what they read."""
    key_bits: int = 4
    """Of keys, after RoPE and normalisation."""
    value_bits: int = 4
    """Of values."""
    full_precision: Literal["embedding, head, norms, biases, residual stream, queries, softmax"] = (
        "embedding, head, norms, biases, residual stream, queries, softmax"
    )
    """What is never quantised."""
    arithmetic: Literal["fp32"] = "fp32"
    """Of scales, rounding and the search for clips, whatever the model's dtype."""
    weight_symmetric: bool = True
    """True: levels −2^(b−1) … 2^(b−1) − 1, scale max|w|/(2^(b−1) − 1). False: 2^b levels from the least to the largest."""
    weight_group: int | None = None
    """Inputs that share a scale; None: a whole row (output channel)."""
    weight_clip: Literal["mse", "none"] = "mse"
    """mse: of the ranges p · max, the one with the least Σ|error|^norm. none: p = 1."""
    clip_grid: int = 100
    """p = 1 − i/grid."""
    clip_shrink: float = 0.8
    """i < ⌊shrink · grid⌋: the least p is 1 − shrink + 1/grid."""
    clip_norm: float = 2.4
    """The power of the error."""
    activation_symmetric: bool = False
    """As weight_symmetric."""
    activation_clip: float = 1.0
    """The range of each token is multiplied by it."""
    output_group: Literal["head", "token"] = "head"
    """What shares a scale at the attention's last linear: a head's channels, or all of a token's."""
    cache_symmetric: bool = False
    """Of keys and values, as weight_symmetric."""
    cache_clip: float = 1.0
    """Of keys and values, each token and head apart."""
    ranges_with_zero: tuple[Range, ...] = ("inputs", "keys", "weights")
    """Which asymmetric ranges are widened to hold zero. outputs: what the attention's last linear reads, by head."""
    residual_rotation: Literal["none", "hadamard", "learned"] = "none"
    """Fused into the weights: signs and a Hadamard, or learned from there on the Stiefel manifold."""
    value_hadamard: bool = False
    """Values rotated within each head, fused."""
    head_hadamard: bool = False
    """What the attention's last linear reads rotated across heads, online, where a matrix of that order exists."""
    ffn_hadamard: bool = False
    """What the MLP's last linear reads, online."""
    query_key_hadamard: Literal["none", "quantized"] = "quantized"
    """Queries and keys after RoPE, online. quantized: where keys have fewer than 16 bits."""
    rotation_seed: int = 0
    """Of the signs."""
    method: Method = "rtn"
    """Of the weights."""
    gptq_damping: float = 0.01
    """Of the mean of the diagonal; ten times as much wherever the factorisation fails."""
    gptq_block: int = 128
    """Columns between lazy updates: changes rounding errors alone."""
    gptq_act_order: bool = False
    """Columns by falling diagonal instead of their own order."""
    gptq_order: Literal["by input, on inputs of quantised predecessors"] = "by input, on inputs of quantised predecessors"
    """q/k/v, output, gate/up, down; layer by layer; activations and cache at 16 bits meanwhile."""
    learning_steps: int = 100
    """Of the learned rotation."""
    learning_batch: int = 8
    """Calibration sequences in each step."""
    learning_rate: float = 1.5
    """Of the learned rotation, falling to 0 along a cosine."""
    learning_activation_bits: int = 4
    """Of what linears read while the rotation is learned, whatever they read later. Weights: rounded if `method` is rtn."""
    learning_cache_bits: int = 4
    """Of keys and values while the rotation is learned, whatever the cache has later; 16: in full."""
    learning_through_ranges: bool = False
    """Whether the size of rounding errors has a gradient while the rotation is learned, or their direction alone."""
    calibration_samples: int = 128
    """Sequences for GPTQ; the learned rotation draws from the same."""
    calibration_length: int = 2048
    """Tokens of each."""
    calibration_data: str | None = None
    """The text, as on the command line. Not part of the hash: `calibration_sha256` is."""
    calibration_sha256: str | None = None
    """Of the token ids that were drawn, whatever the path of their text; null until they are."""
    calibration_draw: Literal["samples of the first 8 × samples windows, at random"] = (
        "samples of the first 8 × samples windows, at random"
    )
    """How sequences are chosen."""
    calibration_seed: int = 0
    """Of the choice."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))
        bits = "weight_bits", "activation_bits", "key_bits", "value_bits", "learning_activation_bits", "learning_cache_bits"
        for name in bits:
            if getattr(self, name) not in WIDTHS:
                raise ConfigError(f"{name} is {getattr(self, name)}: from 2 to 8, or 16.")
        for name in ("activation_clip", "cache_clip"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1.")
        for name in ("clip_grid", "gptq_block", "learning_steps", "learning_batch", "calibration_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.weight_group is not None and self.weight_group < 1:
            raise ConfigError(f"weight_group is {self.weight_group}; it must be at least 1, or null for whole rows.")
        if not 0 <= self.clip_shrink < 1 or self.clip_norm <= 0 or self.gptq_damping <= 0 or self.calibration_length < 2:
            raise ConfigError(
                "clip_shrink must be from 0 to below 1, clip_norm and gptq_damping above 0, calibration_length at least 2."
            )
        if self.learning_activation_bits == 16:
            raise ConfigError("learning_activation_bits is 16: without quantisation there is nothing to learn.")
        if self.value_hadamard and self.residual_rotation == "none":
            raise ConfigError("value_hadamard is fused together with a residual_rotation, and there is none.")
        if self.gptq_act_order and self.weight_group is not None:
            raise ConfigError("gptq_act_order with weight_group would group columns that are not neighbours. Choose one.")

    @property
    def bits(self) -> str:
        """W-A-KV, or W-A-K-V."""
        return format_bits(self.weight_bits, self.activation_bits, self.key_bits, self.value_bits)

    @property
    def calibrates(self) -> bool:
        """Whether text is needed to make the weights."""
        return (self.method == "gptq" and self.weight_bits < 16) or self.residual_rotation == "learned"

    @property
    def text(self) -> str:
        """A line for each knob."""
        values = asdict(self)
        width = max(map(len, values))
        return "\n".join(f"{name:<{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())

    @property
    def sha256(self) -> str:
        """Of the sorted JSON of all knobs but the path of the calibration text."""
        values = asdict(self)
        del values["calibration_data"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def with_bits(self, bits: str) -> "Protocol":
        """The same at other bits, `W-A-KV` or `W-A-K-V`."""
        weights, activations, keys, values = parse_bits(bits)
        return replace(self, weight_bits=weights, activation_bits=activations, key_bits=keys, value_bits=values)

    def rotated(self, rotation: Rotation) -> "Protocol":
        """The same with the rotations that --rotate names. `quarot` keeps the preset's choice across heads."""
        turned = rotation in ("quarot", "spinquant")
        learned: Any = {"none": "none", "ffn": "none", "quarot": "hadamard", "spinquant": "learned"}[rotation]
        return replace(
            self, residual_rotation=learned, value_hadamard=turned, ffn_hadamard=rotation != "none",
            head_hadamard=self.head_hadamard and turned,
        )  # fmt: skip

    @property
    def weights_alone(self) -> "Protocol":
        """The same at 16 bits but for the weights: equal ones make equal weights."""
        return replace(self, activation_bits=16, key_bits=16, value_bits=16)

    def changed(self, other: "Protocol", names: tuple[str, ...] | None = None) -> list[str]:
        """`knob (here, in other)` of those among `names` (of all, if None) that differ; paths of text left out."""
        mine, theirs = asdict(self), asdict(other)
        wanted = [name for name in mine if name != "calibration_data" and (names is None or name in names)]
        return [f"{name} ({mine[name]}, {theirs[name]})" for name in wanted if mine[name] != theirs[name]]


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Protocol)


def _checked(key: str, value: Any) -> Any:
    """`value` if it is of the kind that the knob wants, lists as tuples."""
    hint: Any = _hints()[key]
    value = tuple(value) if isinstance(value, list) else value
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    if key == "ranges_with_zero":
        fine = isinstance(value, tuple) and set(value) <= set(get_args(Range))
    elif kinds:
        exact = type(value) in kinds or (value is None and type(None) in kinds)
        fine = exact or (type(value) is int and float in kinds)
    else:
        fine = value in get_args(hint)
    if not fine:
        raise ConfigError(f"{key} cannot be {value!r}.")
    return float(value) if float in kinds and type(value) is int else value


PRESETS = {
    "osp": Protocol(name="osp"),
    "quarot": Protocol(
        name="quarot", activation_symmetric=True, activation_clip=0.9, cache_clip=0.95, output_group="token",
        method="gptq", residual_rotation="hadamard", value_hadamard=True, head_hadamard=True, ffn_hadamard=True,
    ),
    "spinquant": Protocol(
        name="spinquant", method="gptq", residual_rotation="learned", value_hadamard=True, ffn_hadamard=True
    ),
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """A preset, or the protocol in a .json file (which must have every knob and no other). Raises ConfigError."""
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(f"there is no protocol {name!r}{hint} There are {', '.join(PRESETS)}, or give a .json file.")
    if not Path(name).is_file():
        raise ConfigError(f"--protocol {name}: there is no such file.")
    values = read_json(Path(name))
    if not isinstance(values, dict):
        raise ConfigError(f"--protocol {name} is not a JSON object of knobs.")
    known = {field.name for field in fields(Protocol)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"--protocol {name} has knobs that do not exist: {', '.join(unknown)}.")
    if missing := sorted(known - values.keys()):
        raise ConfigError(f"--protocol {name} leaves knobs open: {', '.join(missing)}. A protocol pins every one.")
    try:
        return Protocol(**values)
    except ConfigError as error:
        raise ConfigError(f"--protocol {name}: {error}") from error
