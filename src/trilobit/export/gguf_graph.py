"""Which llama.cpp graph and which of its types hold a model exactly, from the model's structure and its gains.

    graph      holds                                                         of
    bitnet     norms at attention output and MLP output (placement output);  Llama-like, tied head, no biases,
               norms everywhere, if their gains are scalar and block gains    no q/k norms, SiLU
               constant: those in front of q, k, v, gate, up become factors
               BitNet's own layers
    llama …    no inserted norms; and models that are not ternary             Llama, Mistral, Qwen2, Qwen3, Gemma 3

The gate of `bitnet` is silu in every released llama.cpp, also where a file names another: relu² (BitNet-b1.58-2B-4T's) is
refused, because it would run, as another model.

A graph has one ε for all its norms. Where a model has two, the inputs of some are scaled so that the one ε means the other to
them (docs/math.md, "One ε for two"), which costs nothing: what is scaled are ternary scales.
"""

import math
from dataclasses import dataclass, field

from trilobit import quant
from trilobit.errors import ExportError
from trilobit.export.gguf_blocks import KINDS
from trilobit.export.source import Source
from trilobit.formats import Q2_0, TQ1_0, TQ2_0, GgufBlocks
from trilobit.infer.gguf_header import GEMMA_LOCAL_THETA, LINEARS

GRAPHS = {
    "Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma3": "gemma3",
    "BitNet": "bitnet",
}  # fmt: skip
TERNARY: dict[str, type[GgufBlocks]] = {"tq1_0": TQ1_0, "tq2_0": TQ2_0, "q2_0": Q2_0}
DENSE = ("f16", "f32", "bf16")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # into the residual stream
BIASES = {"llama": tuple(LINEARS.values()), "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
GEMMA_WINDOW_PATTERN = 6  # what the graph takes for granted


def choose_graph(source: Source) -> tuple[str, str]:
    """The graph that holds a model exactly, and why. Raises ExportError with what to do where there is none."""
    name = type(source.model).__name__.removesuffix("ForCausalLM")
    if name not in GRAPHS:
        raise ExportError(
            f"no llama.cpp graph is known here for {type(source.model).__name__} (known: {', '.join(GRAPHS)}). Use --to hf."
        )
    if reason := _unlike_its_graph(source, GRAPHS[name]):
        raise ExportError(f"llama.cpp's {GRAPHS[name]} graph cannot hold this model: {reason}. Use --to hf.")
    if name == "BitNet":
        if reason := _unlike_bitnet(source, name):
            raise ExportError(f"llama.cpp's bitnet graph cannot hold this model: {reason}. Use --to native or --to hf.")
        return "bitnet", "its own graph"
    if source.plan is None:
        return GRAPHS[name], "an ordinary model"
    if not any(linear.normed for linear in source.plan.linears.values()):
        return GRAPHS[name], "no inserted norms"
    if reason := _unlike_bitnet(source, name):
        raise ExportError(
            f"of llama.cpp's graphs only bitnet has norms inside a block, and it cannot hold this model: {reason}. "
            "A model tuned with --placement none fits every graph; for this one use --to native or --to hf."
        )
    return "bitnet", "norms inside the blocks"


def _unlike_its_graph(source: Source, graph: str) -> str | None:
    """What of a model its family's own graph would ignore; None if nothing."""
    config = source.config
    rope = config.rope_parameters
    if graph == "gemma3":
        pattern = [(i + 1) % GEMMA_WINDOW_PATTERN == 0 for i in range(config.num_hidden_layers)]
        if [kind == "full_attention" for kind in config.layer_types] != pattern:
            return f"it takes every {GEMMA_WINDOW_PATTERN}th layer to see all positions"
        if rope["sliding_attention"]["rope_theta"] != GEMMA_LOCAL_THETA:
            return f"it takes {GEMMA_LOCAL_THETA:g} for the base of local positions"
        if config.query_pre_attn_scalar != config.head_dim:
            return "it takes the attention scale from the head size"
        for cap in ("final_logit_softcapping", "attn_logit_softcapping"):
            if getattr(config, cap, None) is not None:
                return f"it has no {cap}, this model one of {getattr(config, cap):g}"
        kinds = {rope[name].get("rope_type", "default") for name in rope}
    else:
        kinds = {rope.get("rope_type", "default")}
        windows = getattr(config, "layer_types", None) or []
        if "sliding_attention" in windows or (type(config).__name__ == "MistralConfig" and config.sliding_window):
            return "it sees all positions, this model a window of them"
    if odd := kinds - ({"default", "linear", "llama3"} if graph == "llama" else {"default"}):
        return f"rotary positions of the kind {', '.join(sorted(odd))}"
    if reason := _odd_bias(source, graph):
        return reason
    gate = getattr(config, "hidden_act", None) or config.hidden_activation
    wanted = ("gelu_pytorch_tanh",) if graph == "gemma3" else ("silu", "swish")
    if graph == "bitnet" and gate not in wanted:
        return f"released versions of llama.cpp run it with silu, whatever a file says, and this model's gate is {gate}"
    return None if gate in wanted else f"its gate is {wanted[0]}, this model's {gate}"


def _odd_bias(source: Source, graph: str) -> str | None:
    """A bias that a graph has no place for."""
    allowed = BIASES.get(graph, ())
    layers = range(source.config.num_hidden_layers)
    inner = [(f"model.layers.{index}.{path}", path) for index in layers for path in LINEARS.values()]
    for path, kind in (*inner, (source.head_path, "")):
        if kind not in allowed and source.has_bias(path):
            some = f"biases only at {', '.join(name.rpartition('.')[2] for name in allowed)}" if allowed else "no biases"
            plan = source.plan
            cause = " (--dead-zone-bias)" if plan is not None and plan.spec.dead_zone_bias and path in source.ternary else ""
            return f"it has {some}, and {path} has one{cause}"
    return None


def _unlike_bitnet(source: Source, name: str) -> str | None:
    plan, config = source.plan, source.config
    if name not in ("Llama", "Mistral", "Qwen2", "BitNet"):
        return f"it has none of the further norms of {name}"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return f"rotary positions of the kind {config.rope_parameters['rope_type']}"
    if not source.tied:
        return "its head is the embedding, this model has one of its own"
    if (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * config.num_attention_heads != (
        config.hidden_size
    ):
        return "its heads fill the width"
    if any(name.endswith("proj.bias") for name in source.kept_names):
        return "it has no biases"
    if plan is None:
        return None
    if any(source.has_bias(path) for path in plan.linears):
        return "it has no biases"
    if name == "BitNet":
        more = next((path for path, linear in plan.linears.items() if linear.normed), None)
        return None if more is None else f"its layers have norms of their own, {more} has one more"
    writers = [f"model.layers.{index}.{path}" for index in range(config.num_hidden_layers) for path in WRITERS]
    if bare := [path for path in writers if path not in plan.linears]:
        return f"{bare[0]} is not ternary and has no norm"
    for path, linear in plan.linears.items():
        if linear.normed and linear.fed_by is not None:
            if plan.spec.gain != "scalar":
                return (
                    "norms with a gain per channel in front of q, k, v, gate and up. Tune with --placement output, or with "
                    "--gain scalar where block gains are constant (single-scale norms)"
                )
            gain = source.kept(f"{linear.fed_by}.weight")
            if (gain.max() - gain.min()).item() > 1e-6 * gain.abs().max().item():
                return f"two norms in a row are one only where the first has a constant gain, and {linear.fed_by} has not"
        elif linear.normed != path.endswith(WRITERS):
            return f"{path} has {'a' if linear.normed else 'no'} norm of its own"
    return None


def choose_kind(source: Source, kind: str) -> str:
    """The type of the projections. Raises ExportError if it cannot hold them."""
    if source.plan is None:
        if kind in TERNARY:
            raise ExportError(f"--type {kind} holds ternary weights, and this model is not ternary: use f16 or f32.")
        return "f16" if kind == "auto" else kind
    if kind in DENSE:
        return kind
    obstacles = {name: _does_not_hold(source, name) for name in (("tq2_0", "q2_0") if kind == "auto" else (kind,))}
    if fitting := [name for name, obstacle in obstacles.items() if obstacle is None]:
        return fitting[0]
    if kind == "auto":
        return "f16"
    other = "q2_0 (any width that 64 divides)" if kind != "q2_0" and _does_not_hold(source, "q2_0") is None else "f16"
    raise ExportError(f"--type {kind} cannot hold this model: {obstacles[kind]}. Use --type {other}.")


def _does_not_hold(source: Source, kind: str) -> str | None:
    layout = TERNARY[kind]
    assert source.plan is not None
    group = quant.group_size(source.plan.spec.scale)
    if group is not None and group % layout.BLOCK:
        return f"its blocks have {layout.BLOCK} columns and one scale, this model one scale for {group}"
    for path in source.plan.linears:
        width = int(source.ternary[path].in_features)  # pyright: ignore
        if not layout.fits(width):
            return f"its blocks have {layout.BLOCK} columns, and {path} has {width}, not a multiple"
    return None


def choose_head(source: Source, head: str, kind: str) -> str:
    width = source.config.hidden_size
    if head == "auto":
        return kind if kind in DENSE and source.plan is None else "q8_0" if width % 32 == 0 else "f16"
    block = KINDS[head][0]
    if width % block:
        raise ExportError(f"--head {head} has blocks of {block} columns, and this model is {width} wide: use f16.")
    return head


@dataclass(frozen=True)
class Adjustments:
    """ε of the file, and factors: on the residual stream (what writes into it, and its embedding), on v and up, and on the
    scales of linears whose norm became one with the block norm in front. merged: those block norms."""

    eps: float
    residual: float = 1.0
    inner: float = 1.0
    scales: dict[str, float] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()


def adjustments(source: Source, graph: str) -> Adjustments:
    """The numbers that make a graph's one ε do."""
    block: float = source.config.rms_norm_eps
    plan = source.plan
    if graph != "bitnet" or plan is None or type(source.model).__name__.startswith("BitNet"):  # whose norms have one ε
        return Adjustments(block)
    inserted = plan.spec.eps
    fed = {path: linear.fed_by for path, linear in plan.linears.items() if linear.normed and linear.fed_by is not None}
    if not fed:  # a norm of k·x with ε is one of x with ε / k²
        return Adjustments(block, inner=math.sqrt(block / inserted))
    scales, left = {}, []
    for path, norm in fed.items():
        first = source.kept(f"{norm}.weight").double().mean().item()
        second = source.gain(path).double().mean().item()
        both = first**2 + inserted
        scales[path] = first * second / math.sqrt(both)
        left.append(block * inserted / both)
    # the merged norms' ε is far below the others': a larger residual stream hides the file's
    residual = 2.0 ** math.ceil(math.log2(math.sqrt(inserted / min(left)))) if min(left) < inserted else 1.0
    return Adjustments(inserted, residual=residual, scales=scales, merged=frozenset(fed.values()))
