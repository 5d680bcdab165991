"""The native engine against a decoder written out here in float64: one sequence at a time, every product in full.

Int8 codes and bf16 keys jump: a difference in the last bit of a sum moves a code by a whole step where it lay on the edge,
and every later position sees it. So two things are asked, of a few texts each: that where no code moved (the best text) the
logits agree to fp32 rounding, and that the worst text is no further off than a few times what the reference itself moves
when its embeddings change so much (2⁻¹²) that some codes are sure to.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)  # fmt: skip

from trilobit.errors import ConfigError, ModelError
from trilobit.kernels import build, native
from trilobit.kernels.engine import Cache, Decoder, Layer, Projection, Sampler, Sampling, Session
from trilobit.kernels.native import Format, PackedMatrix

NO_COMPILER = build.find_library() is None and build.compiler() is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason=f"no native library: {build.why_not()}")

CACHES: list[Cache] = ["bf16", "int8"]
SHAKE = 2.0**-12
FURTHER = 3.0  # times what a shake moves the reference
ROUNDING = 2e-6  # of the logits' size: fp32 sums
TEXTS = 4
EPS, OWN_EPS = 1e-5, 1e-6


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if build.find_library() is None:
        build.build()
    native._library.cache_clear()
    assert native.available()


class Maker:
    """Random tensors of a decoder whose activations keep about unit size."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def near_one(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=self.generator)

    def matrix(
        self, rows: int, columns: int, *, form: Format = "two-bit", group: int = 0, scale: str = "row", bias: bool = False,
        gain: str = "none", activations: Any = "token",
    ) -> Projection:  # fmt: skip
        low, high = (-127, 128) if form == "int8" else (-1, 2)
        codes = torch.randint(low, high, (rows, columns), generator=self.generator, dtype=torch.int8)
        size = (73.0 if form == "int8" else 0.8) * columns**0.5
        groups = -(-columns // group) if group else 0
        scales = self.near_one(*((groups, rows) if groups else (1 if scale == "tensor" else rows,))) / size
        packed = native.pack(codes, form, f"group-{group}" if group else "tensor")  # pyright: ignore[reportArgumentType]
        gains = {"none": None, "scalar": self.near_one(1), "vector": self.near_one(columns)}[gain]
        return Projection(packed, scales, self.normal(rows) * 0.3 if bias else None, gains, OWN_EPS, activations)


def decoder_of(
    seed: int = 0, *, width: int = 48, hidden: int = 80, heads: int = 4, kv_heads: int = 2, head_size: int = 24,
    vocabulary: int = 67, layers: int = 1, form: Format = "two-bit", group: int = 0, scale: str = "row",
    activations: Any = "token", gate: Any = "silu", windows: Sequence[int] = (0,), rotary: Sequence[bool] = (True,),
    qk_norms: bool = False, bias: bool = False, gain: str = "none", output_gain: str | None = None,
    ternary_embedding: bool = False, ternary_head: bool = False, head_group: int = 64, rotary_scale: float = 1.0,
) -> Decoder:  # fmt: skip
    """A random decoder. gain: of the norms in front of all projections; output_gain: of o and down, if another."""
    make, queries, keys = Maker(seed), heads * head_size, kv_heads * head_size
    options: dict[str, Any] = {"form": form, "group": group, "scale": scale, "activations": activations}
    shapes = {
        "q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries), "gate": (hidden, width),
        "up": (hidden, width), "down": (width, hidden),
    }  # fmt: skip
    built = []
    for index in range(layers):
        projections = {
            name: make.matrix(
                *shape, bias=bias, gain=(output_gain or gain) if name in ("o", "down") else gain, **options
            )
            for name, shape in shapes.items()
        }  # fmt: skip
        norms = [make.near_one(head_size) for _ in range(2)] if qk_norms else [None, None]
        window, rotates = windows[index % len(windows)], rotary[index % len(rotary)]
        built.append(Layer(make.near_one(width), make.near_one(width), *norms, projections, window, rotates))
    frequencies = 10000.0 ** (-torch.arange(head_size // 2) * 2 / head_size)
    embedding: Tensor | Projection = make.normal(vocabulary, width).bfloat16()
    if ternary_embedding:
        embedding = make.matrix(vocabulary, width, **options)
        embedding = replace(embedding, scales=embedding.scales * width**0.5)
    if ternary_head:
        head = make.matrix(vocabulary, width, **options)
    else:
        head = make.matrix(vocabulary, width, form="int8", group=head_group, activations="int16")
    return Decoder(
        width, hidden, heads, kv_heads, head_size, vocabulary, EPS, head_size**-0.5, rotary_scale, frequencies, gate, built,
        make.near_one(width), embedding, head,
    )  # fmt: skip


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain.double()


def int8(x: Tensor) -> Tensor:
    """Q(x) of each row, in x's dtype."""
    absmax = x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return (x * (127 / absmax)).round() * (absmax / 127)


def quantised(x: Tensor, activations: str, group: int) -> Tensor:
    if activations == "group":
        return torch.cat([int8(part) for part in x.split(group, dim=-1)], dim=-1)
    return int8(x) if activations == "token" else int8(x) + int8(x - int8(x))


def weight_of(p: Projection) -> Tensor:
    """[O, K] float64."""
    m = p.matrix
    scales = p.scales.double()
    spread = scales.T.repeat_interleave(m.group, dim=1)[:, : m.columns] if m.group else scales.view(-1, 1)
    return native.unpack(m).double() * spread


def project(p: Projection, x: Tensor) -> Tensor:
    x = x if p.gain is None else rms_norm(x, p.gain, p.eps)
    y = quantised(x, p.activations, p.matrix.group) @ weight_of(p).T
    return y if p.bias is None else y + p.bias.double()


def stored(x: Tensor, cache: Cache) -> Tensor:
    """Keys or values as the cache holds them."""
    if cache == "bf16":
        return x.float().bfloat16().double()
    absmax = x.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    return (x * (127 / absmax)).round() * (absmax / 127)


def rotated(x: Tensor, d: Decoder) -> Tensor:
    """x [T, H, E]. Angles are rounded to fp32, as transformers does."""
    angles = torch.arange(len(x)).float()[:, None] * d.frequencies
    cosine, sine = (f(angles.double()).float()[:, None] * d.rotary_scale for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def naive(d: Decoder, ids: Tensor, cache: Cache = "bf16", shake: int | None = None) -> Tensor:
    """Logits [T, V] float64 of a text [T] that begins at position 0."""
    count, group = len(ids), d.heads // d.kv_heads
    table = d.embedding.double() if isinstance(d.embedding, Tensor) else weight_of(d.embedding)
    x = table[ids.long()]
    if shake is not None:
        signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(shake)) * 2 - 1
        x = x * (1 + SHAKE * signs)
    for layer in d.layers:
        p = layer.projections
        h = rms_norm(x, layer.attention_norm, d.eps)
        q, k, v = (project(p[name], h).view(count, -1, d.head_size) for name in "qkv")
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, d.eps), rms_norm(k, layer.k_norm, d.eps)
        if layer.rotary:
            q, k = rotated(q, d), rotated(k, d)
        k, v = (stored(t, cache).repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * d.attention_scale
        t, s = torch.arange(count)[:, None], torch.arange(count)
        seen = (s <= t) & (s > t - layer.window if layer.window else s >= 0)
        attended = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)
        x = x + project(p["o"], attended)
        h = rms_norm(x, layer.mlp_norm, d.eps)
        gate, up = project(p["gate"], h), project(p["up"], h)
        gate = gate.clamp_min(0) ** 2 if d.gate == "relu2" else torch.nn.functional.silu(gate)
        x = x + project(p["down"], gate * up)
    return project(d.head, rms_norm(x, d.final_norm, d.eps))


def text_of(d: Decoder, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, d.vocabulary, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def whole(session: Session, ids: Tensor, slot: int = 0, chunk: int | None = None) -> Tensor:
    """Logits of every position of a text, run `chunk` tokens at a time."""
    chunk, parts = chunk or session.most_tokens, []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        positions = torch.arange(start, start + len(part), dtype=torch.int32)
        slots, rows = torch.full_like(part, slot), torch.arange(len(part), dtype=torch.int32)
        parts.append(session.run(part, slots, positions, rows))
    return torch.cat(parts)


def errors(a: Tensor, b: Tensor) -> Tensor:
    """Relative distance of each position's logits, [T]."""
    return (a.double() - b).norm(dim=-1) / b.norm(dim=-1)


def require_close(d: Decoder, count: int, cache: Cache, **options: Any) -> None:
    """As the module's docstring says, for every instruction set."""
    texts = [text_of(d, count, seed) for seed in range(TEXTS)]
    expected = [naive(d, ids, cache) for ids in texts]
    noise = max(errors(naive(d, ids, cache, 1), y).mean().item() for ids, y in zip(texts[:2], expected, strict=False))
    for name in native.instruction_sets():
        session = Session(d, capacity=count, cache=cache, instructions=name, most_tokens=count, **options)
        off = [errors(whole(session, ids), y) for ids, y in zip(texts, expected, strict=True)]
        assert max(e.mean().item() for e in off) <= FURTHER * noise, (name, off, noise)
        assert min(e.median().item() for e in off) <= ROUNDING, (name, off)


CASES: dict[str, tuple[int, dict[str, Any]]] = {  # tokens of a text, and what is not as by default
    "plain": (30, {}),
    "two-layers": (30, {"layers": 2, "scale": "tensor"}),
    "base-3": (20, {"form": "base-3", "width": 60, "hidden": 100}),
    "odd-widths": (20, {"width": 33, "hidden": 71, "vocabulary": 101, "head_size": 6, "bias": True}),
    "smallest-heads": (20, {"head_size": 2, "heads": 3, "kv_heads": 3, "width": 7, "hidden": 5, "vocabulary": 3}),
    "one-key-head": (70, {"heads": 8, "kv_heads": 1, "head_size": 80, "width": 64}),
    "more-queries-than-a-block": (40, {"heads": 70, "kv_heads": 1, "head_size": 6, "width": 40}),
    "groups-of-three": (70, {"heads": 6, "kv_heads": 2, "head_size": 32}),
    "largest-heads": (10, {"heads": 2, "kv_heads": 1, "head_size": 256}),
    "several-tiles": (200, {"head_size": 6, "heads": 2, "kv_heads": 1, "width": 24, "hidden": 24}),
    "several-spans": (1_030, {"head_size": 6, "heads": 2, "kv_heads": 1, "width": 24, "hidden": 24}),
    "span-and-one": (513, {"head_size": 6, "heads": 2, "kv_heads": 1, "width": 24, "hidden": 24, "windows": (512,)}),
    "tile-and-one": (65, {"windows": (64,)}),
    "window": (150, {"windows": (70,), "head_size": 8}),
    "small-window": (70, {"layers": 2, "windows": (3, 0)}),
    "window-of-one": (20, {"windows": (1,)}),
    "no-positions": (30, {"layers": 2, "rotary": (True, False)}),
    "rotary-scale": (30, {"rotary_scale": 1.3}),
    "query-and-key-norms": (30, {"qk_norms": True}),
    "vector-gains": (20, {"gain": "vector", "bias": True}),
    "scalar-gains": (20, {"gain": "scalar"}),
    "norms-of-outputs": (20, {"output_gain": "vector"}),
    "relu2": (20, {"gate": "relu2", "output_gain": "vector"}),
    "groups": (20, {"group": 64, "width": 100, "hidden": 130}),
    "groups-base-3": (20, {"group": 128, "width": 160, "hidden": 130, "form": "base-3", "scale": "row"}),
    "group-wider-than-rows": (20, {"group": 256}),
    "activations-in-groups": (20, {"group": 64, "width": 100, "hidden": 130, "activations": "group"}),
    "activations-in-groups-after-norms": (20, {"group": 64, "width": 100, "activations": "group", "gain": "vector"}),
    "activations-in-one-group": (20, {"group": 256, "activations": "group", "qk_norms": True}),
    "ternary-ends": (20, {"ternary_embedding": True, "ternary_head": True}),
    "ternary-ends-in-groups": (20, {"ternary_embedding": True, "ternary_head": True, "group": 32, "activations": "group"}),
    "ternary-embedding-per-matrix": (20, {"ternary_embedding": True, "scale": "tensor", "form": "base-3"}),
    "head-without-groups": (20, {"head_group": 0}),
    "many-tokens": (130, {"head_size": 8, "width": 24, "hidden": 40}),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_definitions(case: str, cache: Cache) -> None:
    """Every instruction set computes the decoder written out above, in each of its variations, with both caches."""
    count, options = CASES[case]
    require_close(decoder_of(len(case), **options), count, cache)


@settings(max_examples=40)
@given(st.data())
def test_any_shapes(data: st.DataObject) -> None:
    """Whatever sizes, norms, groups and windows come together, the best instruction set computes the definition."""
    pick, flag = (lambda *of: data.draw(st.sampled_from(of))), (lambda: data.draw(st.booleans()))
    kv_heads, of_each = pick(1, 2, 3), pick(1, 3, 8)
    group = pick(0, 0, 16, 64)
    d = decoder_of(
        data.draw(st.integers(0, 1 << 20)), width=data.draw(st.integers(3, 70)), hidden=data.draw(st.integers(1, 90)),
        heads=kv_heads * of_each, kv_heads=kv_heads, head_size=pick(2, 6, 10, 24, 34), vocabulary=data.draw(st.integers(2, 70)),
        layers=1, form=pick("two-bit", "base-3"), group=group, scale=pick("row", "tensor"),
        activations=pick("token", "group") if group else "token", gate=pick("silu", "relu2"), windows=(pick(0, 1, 5, 64),),
        rotary=(flag(),), qk_norms=flag(), bias=flag(), gain=pick("none", "scalar", "vector"),
        output_gain=pick(None, "vector", "scalar"), ternary_embedding=flag(), ternary_head=flag(), head_group=pick(0, 32, 64),
    )  # fmt: skip
    cache, count = pick(*CACHES), data.draw(st.integers(1, 80))
    ids = text_of(d, count)
    expected = naive(d, ids, cache)
    y = whole(Session(d, capacity=count, cache=cache, most_tokens=data.draw(st.integers(1, count))), ids)
    noise = max(errors(naive(d, ids, cache, shake), expected).mean().item() for shake in range(3))
    assert errors(y, expected).mean() <= FURTHER * noise + 1e-3


SPEEDS: list[dict[str, Any]] = [
    {"heads": 6, "kv_heads": 2, "windows": (0, 20), "qk_norms": True, "bias": True},
    {"group": 64, "width": 100, "activations": "group", "gain": "vector", "heads": 8, "kv_heads": 1},
]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", SPEEDS, ids=["windows", "groups"])
def test_how_a_text_is_cut_changes_no_bit(options: dict[str, Any], cache: Cache) -> None:
    """A prompt run at once, in chunks of several sizes and token by token gives the same logits, to the last bit."""
    d = decoder_of(1, layers=2, **options)
    ids = text_of(d, 141)
    for name in native.instruction_sets():
        sessions = [Session(d, capacity=150, cache=cache, most_tokens=150, instructions=name) for _ in range(5)]
        at_once, *others = (whole(s, ids, chunk=chunk) for s, chunk in zip(sessions, (150, 64, 63, 7, 1), strict=True))
        assert all(torch.equal(at_once, y) for y in others), name


@pytest.mark.parametrize("cache", CACHES)
def test_sequences_run_together_do_not_meet(cache: Cache) -> None:
    """Three sequences of different lengths, in chunks and token by token in one call each, their rows in any order, have the
    bits that each has alone; so has one that takes over a slot where another was."""
    d = decoder_of(2, layers=2, windows=(0, 9), vocabulary=50)
    lengths = [90, 31, 66]
    texts = [text_of(d, n, i) for i, n in enumerate(lengths)]
    alone = [whole(Session(d, capacity=90, cache=cache), ids) for ids in texts]
    session = Session(d, slots=3, capacity=90, cache=cache)
    assert torch.equal(whole(session, text_of(d, 90, 7), slot=1)[0], naive_first(d, 7, cache))
    step = {0: 25, 1: 1, 2: 11}
    done, got = [0, 0, 0], [[], [], []]
    turn = 0
    while any(n < length for n, length in zip(done, lengths, strict=True)):
        turn += 1
        rows: list[tuple[int, int]] = []  # slot, position
        order = [(i + turn) % 3 for i in range(3)]
        for slot in order:
            many = step[slot] if turn % 4 else 1
            rows += [(slot, p) for p in range(done[slot], min(done[slot] + many, lengths[slot]))]
            done[slot] = min(done[slot] + many, lengths[slot])
        ids = torch.tensor([int(texts[slot][p]) for slot, p in rows], dtype=torch.int32)
        slots = torch.tensor([slot for slot, _ in rows], dtype=torch.int32)
        positions = torch.tensor([p for _, p in rows], dtype=torch.int32)
        wanted = torch.arange(len(rows), dtype=torch.int32).flip(0)
        for row, y in zip(wanted.tolist(), session.run(ids, slots, positions, wanted), strict=True):
            got[rows[row][0]].append((rows[row][1], y))
    for expected, parts in zip(alone, got, strict=True):
        assert torch.equal(torch.stack([y for _, y in sorted(parts, key=lambda part: part[0])]), expected)


def naive_first(d: Decoder, seed: int, cache: Cache) -> Tensor:
    """The first logits of text `seed` in a session of its own."""
    return whole(Session(d, capacity=90, cache=cache), text_of(d, 90, seed)[:1])[0]


@pytest.mark.parametrize("options", SPEEDS, ids=["windows", "groups"])
def test_threads_change_no_bit_of_the_logits(options: dict[str, Any]) -> None:
    """One thread, two and three give the same logits for a prompt and for single tokens, time after time."""
    d = decoder_of(
        3,
        width=300 if "group" not in options else 320,
        hidden=500,
        layers=2,
        **{k: v for k, v in options.items() if k != "width"},
    )
    ids = text_of(d, 80)
    expected = whole(Session(d, capacity=80, threads=1), ids)
    for threads in (2, 3):
        session = Session(d, capacity=80, threads=threads)
        for _ in range(5):
            assert torch.equal(whole(session, ids), expected)
        assert torch.equal(whole(session, ids, chunk=1), expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("window", [0, 600])
def test_threads_that_share_a_text_of_several_spans_change_no_bit(window: int, cache: Cache) -> None:
    """Past 512 positions threads share one token's attention by position (up to four tokens of a call): the logits are those of
    one thread and a whole prompt, at every length, with and without a window."""
    d = decoder_of(9, heads=4, kv_heads=1, head_size=16, windows=(window,))
    ids = text_of(d, 1_601)
    for name in native.instruction_sets():
        if name == "scalar":
            continue
        options: dict[str, Any] = {"capacity": len(ids), "cache": cache, "instructions": name}
        expected = whole(Session(d, most_tokens=len(ids), threads=1, **options), ids)
        for threads, chunk in ((2, 1), (3, 3), (2, 4), (1, 1), (3, 5)):
            y = whole(Session(d, threads=threads, **options), ids, chunk=chunk)
            assert torch.equal(y, expected), (name, threads, chunk)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_half_scales_of_a_head_are_their_numbers(tokens: int) -> None:
    """fp16 scales, subnormal ones and zero among them, give the bits of the same numbers in fp32 (old code: fp32 alone), for
    every instruction set; where no head with groups has them, there is no session."""
    d = decoder_of(5, vocabulary=101, head_group=32, width=70)
    half = d.head.scales.half()
    half.view(-1)[::7] = torch.tensor([0.0, 2.0**-24, 3e-6, 65504.0, 6.1e-5]).half().repeat(99)[: len(half.view(-1)[::7])]
    ids = text_of(d, tokens)
    rows = torch.arange(tokens, dtype=torch.int32)
    for name in native.instruction_sets():
        found = []
        for scales in (half, half.float()):
            session = Session(replace(d, head=replace(d.head, scales=scales)), capacity=tokens, instructions=name)
            found.append(session.run(ids, torch.zeros_like(ids), rows, rows))
        assert torch.equal(*found), name
    whole_rows = decoder_of(5, head_group=0)
    for wrong in (
        replace(whole_rows, head=replace(whole_rows.head, scales=whole_rows.head.scales.half())),
        with_projection(d, "q", scales=d.layers[0].projections["q"].scales.half()),
    ):
        with pytest.raises(ModelError, match="do not fit together"):
            Session(wrong, capacity=8)


def test_only_asked_for_logits_are_given() -> None:
    """By default the last token's; otherwise the rows asked for in their order, repeats too, none if none, into `out`."""
    d = decoder_of(4)
    ids, session = text_of(d, 40), Session(decoder_of(4), capacity=40)
    everything = whole(session, ids)
    slots, positions = torch.zeros(40, dtype=torch.int32), torch.arange(40, dtype=torch.int32)
    assert torch.equal(session.run(ids, slots, positions), everything[-1:])
    rows = torch.tensor([39, 0, 17, 17, *range(30)], dtype=torch.int32)
    out = torch.empty(34, d.vocabulary)
    assert session.run(ids, slots, positions, rows, out) is out
    assert torch.equal(out, everything[rows.long()])
    assert session.run(ids, slots, positions, rows[:0]).shape == (0, d.vocabulary)


def test_a_damaged_weight_gives_damaged_logits() -> None:
    """NaN in a norm, a scale or a cached key reaches the logits; it is never a plausible number, nor a crash."""
    base = decoder_of(5, layers=1)
    ids = text_of(base, 20)
    layer = base.layers[0]
    broken = [
        replace(base, final_norm=base.final_norm * torch.nan),
        replace(base, layers=[replace(layer, attention_norm=layer.attention_norm * torch.nan)]),
        *(
            replace(base, layers=[replace(layer, projections=layer.projections | {
                name: replace(layer.projections[name], scales=layer.projections[name].scales * torch.nan)
            })])
            for name in layer.projections
        ),
    ]  # fmt: skip
    for cache in CACHES:
        for d in broken:
            for name in native.instruction_sets():
                y = whole(Session(d, capacity=20, cache=cache, instructions=name), ids)
                assert y[-1].isnan().any(), name


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": ints(-1, 0)}, {"ids": ints(0, 67)}, {"slots": ints(0, 2)}, {"slots": ints(-1, 0)}, {"positions": ints(0, 30)},
        {"positions": ints(-1, 0)}, {"rows": ints(2)}, {"rows": ints(-1)}, {"rows": ints(0, 1, 0)},
        {"ids": ints(0, 0, 0, 0, 0), "slots": ints(0, 0, 0, 0, 0), "positions": ints(0, 1, 2, 3, 4)},
        {"ids": ints(), "slots": ints(), "positions": ints()}, {"positions": ints(0)}, {"slots": ints(0, 0, 0)},
        {"ids": torch.zeros(2, dtype=torch.int64)}, {"out": torch.empty(1, 66)},
        {"out": torch.empty(1, 67, dtype=torch.float64)}, {"out": torch.empty(67, 2)[:, :1]},
    ],
    ids=lambda wrong: str({k: tuple(v.shape) if k == "out" else v.tolist() for k, v in wrong.items()}),
)  # fmt: skip
def test_wrong_calls_do_not_reach_the_engine(wrong: dict[str, Tensor]) -> None:
    """Ids, slots, positions and rows out of range, more tokens than a call may have, and wrong shapes and types are refused,
    and the session goes on as if they had not been asked for."""
    d = decoder_of(6, layers=1)
    session = Session(d, slots=2, capacity=30, most_tokens=4)
    right = {"ids": ints(1, 2), "slots": ints(0, 0), "positions": ints(0, 1), "rows": ints(1)}
    expected = session.run(**right)
    with pytest.raises(AssertionError):
        session.run(**{**right, **wrong})
    assert torch.equal(session.run(**right), expected)


def with_projection(d: Decoder, name: str, **changes: Any) -> Decoder:
    layer = d.layers[0]
    projection = replace(layer.projections[name], **changes)
    return replace(d, layers=[replace(layer, projections=layer.projections | {name: projection})])


BASE = {"layers": 1, "width": 48}
MISSHAPEN: dict[str, Any] = {
    "kv_heads that do not divide heads": lambda d: replace(d, kv_heads=3),
    "an odd head size": lambda d: replace(d, head_size=23, frequencies=d.frequencies[:11]),
    "heads wider than 256": lambda d: replace(d, heads=1, kv_heads=1, head_size=258, frequencies=torch.ones(129)),
    "no heads": lambda d: replace(d, heads=0),
    "a negative hidden width": lambda d: replace(d, hidden=-80),
    "a matrix of another width": lambda d: with_projection(
        d, "o", matrix=native.pack(torch.zeros(48, 95, dtype=torch.int8), "two-bit")
    ),
    "a matrix with fewer rows": lambda d: with_projection(
        d, "up", matrix=native.pack(torch.zeros(79, 48, dtype=torch.int8), "two-bit"), scales=torch.ones(1)
    ),
    "as many scales as neither": lambda d: with_projection(d, "k", scales=torch.ones(47)),
    "no scales": lambda d: with_projection(d, "k", scales=torch.ones(0)),
    "as many gains as neither": lambda d: with_projection(d, "down", gain=torch.ones(79)),
    "groups of activations without groups": lambda d: with_projection(d, "q", activations="group"),
    "16 bits inside a layer": lambda d: with_projection(d, "q", activations="int16"),
    "a head of another vocabulary": lambda d: replace(d, head=decoder_of(1, vocabulary=66).head),
    "a negative window": lambda d: replace(d, layers=[replace(d.layers[0], window=-1)]),
    "no layers": lambda d: replace(d, layers=[]),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSHAPEN)
def test_graphs_that_do_not_fit_together_are_refused(what: str) -> None:
    """A decoder whose sizes disagree makes no session, and the error says so."""
    with pytest.raises(ModelError, match="the sizes of its parts do not fit together"):
        Session(MISSHAPEN[what](decoder_of(7, **BASE)), capacity=8)


def test_tensors_of_the_wrong_length_are_not_pointed_to() -> None:
    """Norms, biases, frequencies, embeddings and codes whose lengths or types are not the decoder's are assertions."""
    d = decoder_of(7, **BASE)
    assert isinstance(d.embedding, Tensor)
    short = PackedMatrix(torch.zeros(5, dtype=torch.uint8), 48, 96, 0, "two-bit")
    wrong = [
        replace(d, final_norm=torch.ones(47)), replace(d, frequencies=torch.ones(11)), replace(d, embedding=d.embedding[:-1]),
        replace(d, embedding=d.embedding.float()), replace(d, final_norm=torch.ones(96)[::2]),
        replace(d, layers=[replace(d.layers[0], q_norm=torch.ones(23))]), with_projection(d, "q", bias=torch.ones(95)),
        with_projection(d, "o", matrix=short),
    ]  # fmt: skip
    for decoder in wrong:
        with pytest.raises(AssertionError):
            Session(decoder, capacity=8)


@pytest.mark.parametrize(
    "sizes",
    [
        {"capacity": 0}, {"slots": 0}, {"most_tokens": 0}, {"capacity": -5}, {"capacity": 1 << 24}, {"slots": 1 << 16},
        {"capacity": 1 << 62}, {"most_tokens": 1 << 40},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_session_has_are_refused(sizes: dict[str, int]) -> None:
    """Nothing, less than nothing, and sizes beyond any machine make no session."""
    with pytest.raises(ModelError, match="do not fit"):
        Session(decoder_of(7, **BASE), **sizes)


def test_more_memory_than_there_is_is_refused_before_it_is_asked_for() -> None:
    """A cache larger than the machine's memory, and one whose size does not fit into 64 bits, are errors, at once."""
    d = decoder_of(8, layers=1, heads=2, kv_heads=2, head_size=256)
    for sizes in ({"slots": 1 << 15, "capacity": 1 << 23}, {"slots": 65_535, "capacity": (1 << 24) - 1}):
        with pytest.raises(ModelError, match="no memory"):
            Session(d, **sizes)
    many = decoder_of(8, width=1, hidden=1, heads=1 << 14, kv_heads=1 << 14, head_size=2, vocabulary=2)
    with pytest.raises(ModelError, match="no memory"):  # 2⁷¹ bytes
        Session(replace(many, layers=many.layers * 4096), slots=1 << 14, capacity=(1 << 24) - 1)


def test_a_closed_session_is_not_used() -> None:
    """Closing gives memory back, twice does no harm, and using it after that is an assertion; `bytes` counts the cache."""
    d = decoder_of(9)
    small, large = Session(d, capacity=64), Session(d, capacity=4096)
    assert large.bytes - small.bytes >= 2 * 2 * 24 * 2 * (4096 - 64)
    assert Session(d, capacity=4096, cache="int8").bytes < large.bytes
    small.close()
    small.close()
    with pytest.raises(AssertionError, match="closed"):
        whole(small, text_of(d, 3))
    with pytest.raises(ConfigError, match="sse9 does not exist here"):
        Session(d, capacity=8, instructions="sse9")


def test_callers_from_several_threads_wait_for_each_other() -> None:
    """One session called from four threads, each with a slot of its own, gives each its own logits."""
    d = decoder_of(10)
    texts = [text_of(d, 40, seed) for seed in range(4)]
    expected = [whole(Session(d, capacity=40), ids) for ids in texts]
    session = Session(d, slots=4, capacity=40, threads=2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda slot: whole(session, texts[slot], slot, 7), range(4))
            assert all(torch.equal(y, wanted) for y, wanted in zip(found, expected, strict=True))


# Sampling


def processors(s: Sampling) -> LogitsProcessorList:
    """What transformers' generate() puts together for these settings, in its order."""
    found: list[Any] = []
    if s.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature != 1:
        found.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        found.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        found.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        found.append(MinPLogitsWarper(s.min_p))
    return LogitsProcessorList(found)


def probabilities(s: Sampling, logits: Tensor, history: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(history)], dtype=torch.long)
    return processors(s)(ids, logits[None].clone()).softmax(-1)[0].double()  # pyright: ignore[reportArgumentType]


SETTINGS = [
    Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.5), Sampling(top_k=1), Sampling(top_k=7),
    Sampling(top_k=1000), Sampling(top_p=0.5), Sampling(top_p=0.9), Sampling(top_p=1e-6), Sampling(min_p=0.1),
    Sampling(min_p=1.0), Sampling(repetition_penalty=1.8), Sampling(repetition_penalty=0.6),
    Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
    Sampling(temperature=1.7, top_k=30, top_p=0.95, min_p=0.02),
]  # fmt: skip
DRAWS = 20_000


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampling_is_transformers_distribution(sampling: Sampling) -> None:
    """The tokens that come up are those that transformers' processors leave, as often as they say (χ² of 20,000 draws)."""
    make = Maker(3)
    logits, history = make.normal(50) * 2, [3, 17, 17, 40, 8]
    before = logits.clone()
    expected = probabilities(sampling, logits, history)
    sampler = Sampler(sampling, seed=1)
    counts = torch.zeros(50, dtype=torch.float64)
    for _ in range(DRAWS):
        counts[sampler(logits, history)] += 1
    assert torch.equal(logits, before)
    assert not counts[expected == 0].any()
    frequent = expected * DRAWS >= 5  # where χ² holds, and a token is all but sure to come up
    assert counts[frequent].all()
    squares = ((counts - expected * DRAWS) ** 2 / (expected * DRAWS))[frequent].sum().item()
    freedom = int(frequent.sum())
    assert squares <= freedom + 5 * (2 * freedom) ** 0.5, (squares, freedom)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 1 << 20), size=st.integers(1, 300), spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]), top_k=st.integers(0, 40), top_p=st.floats(0.01, 1.0), min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 2.0),
)  # fmt: skip
def test_only_what_transformers_leaves_is_sampled(
    seed: int, size: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    """For any settings, no token comes up that transformers' processors cut off, −inf included; and where they leave one
    token, that is it. (Cut-offs are compared a rounding apart: transformers adds up probabilities in fp32.)"""
    make = Maker(seed)
    logits = make.normal(size) * spread
    logits[seed % size] = -math.inf if size > 1 else 0.0
    history = [seed % size, (seed * 7) % size, seed % size]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    looser = replace(sampling, top_p=min(1.0, top_p + 1e-5), min_p=min_p * (1 - 1e-5))
    allowed = probabilities(sampling, logits, history) + probabilities(looser, logits, history) > 0
    sampler = Sampler(sampling, seed)
    drawn = {sampler(logits, history) for _ in range(20)}
    assert all(allowed[token] for token in drawn)


def test_the_first_of_the_likeliest_is_taken() -> None:
    """At temperature 0, and with top_k 1 or a tiny top_p or temperature, ties go to the token with the lowest number, after
    the penalty; of tokens tied at the edge of top-k so many are kept as it says, the first ones."""
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0, -1.0])
    assert Sampler(Sampling(temperature=0))(logits) == 1
    for s in (Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert {Sampler(s, seed)(logits) for seed in range(50)} == {1}
    assert Sampler(Sampling(temperature=0, repetition_penalty=1.5))(logits, [1, 3]) == 4
    assert Sampler(Sampling(temperature=0, repetition_penalty=3.0))(logits, [1, 3, 4, 1]) == 2
    sampler = Sampler(Sampling(top_k=2))
    assert {sampler(logits) for _ in range(200)} == {1, 3}
    sampler = Sampler(Sampling(temperature=1e-30))
    assert {sampler(torch.tensor([1.0, 5.0, 3.0])) for _ in range(20)} == {1}


def test_a_penalty_counts_a_token_once() -> None:
    """A token that comes twice in the history is penalised as one that comes once, and negative logits become smaller."""
    logits = torch.tensor([4.0, 3.0, -1.0])
    s = Sampling(repetition_penalty=1.25)
    once, twice = (probabilities(s, logits, history) for history in ([0, 2], [0, 0, 2, 2]))
    assert torch.equal(once, twice)
    counts = []
    for history in ([0, 2], [0, 0, 2, 2, 0]):
        sampler = Sampler(s, 5)
        counts.append([sampler(logits, history) for _ in range(300)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=2, top_p=0.5, min_p=0.1)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_token(sampling: Sampling, value: float) -> None:
    """NaN and +inf anywhere are a ModelError, cut off or not; −inf is what cutting off leaves, and is never sampled."""
    logits = torch.randn(40)
    logits[11] = value
    with pytest.raises(ModelError, match="not finite"):
        Sampler(sampling)(logits)
    logits[:39] = -math.inf
    assert Sampler(sampling)(logits) == 39


def test_a_seed_is_a_stream() -> None:
    """Equal seeds give equal tokens, other seeds others, and temperature 0 draws nothing from the stream."""
    logits = torch.randn(200)
    streams = [[Sampler(Sampling(), seed)] * 30 for seed in (1, 1, 2, 2**63 - 1)]
    first, second, third, last = ([sampler(logits) for sampler in stream] for stream in streams)
    assert first == second != third != last
    assert len(set(first)) > 5


def test_a_history_beyond_the_vocabulary_is_refused() -> None:
    """A penalised token that the logits do not have is an assertion, not a write past their end."""
    with pytest.raises(AssertionError):
        Sampler(Sampling(repetition_penalty=2.0))(torch.randn(5), [5])
    with pytest.raises(AssertionError):
        Sampler(Sampling(repetition_penalty=2.0))(torch.randn(5), [-1])
