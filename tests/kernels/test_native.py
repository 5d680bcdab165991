"""The native kernels against quant.py and formats.py: the same bits from every instruction set, for every shape.

What does not run here (no C++ compiler, an instruction set this processor lacks) is skipped or left out with the reason.
"""

import os
import subprocess
import sys
from itertools import product as every

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trilobit import quant
from trilobit.errors import ConfigError
from trilobit.formats import PanelBase3, PanelTwoBit
from trilobit.kernels import build, native
from trilobit.kernels.native import Format
from trilobit.quant import Granularity

NO_COMPILER = build.find_library() is None and build.compiler() is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason=f"no native library: {build.why_not()}")

TERNARY: list[Format] = ["two-bit", "base-3"]
GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]
EXAMPLES = 350  # shapes a property: over 1,000 in all
ROWS = st.integers(1, 70) | st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 65, 129])
COLUMNS = st.integers(1, 90) | st.integers(1, 900) | st.sampled_from([16, 20, 64, 80, 128, 256, 512, 560, 561, 640, 1300])
TOKENS = st.integers(1, 9)
SEEDS = st.integers(0, 1 << 20)


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if build.find_library() is None:
        build.build()
    native._library.cache_clear()
    assert native.available()


def codes_of(rows: int, columns: int, seed: int) -> Tensor:
    """Random ternary codes; for some seeds all −1, all 0, or one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    if seed % 7 == 0:
        return torch.full_like(codes, -1)
    codes[seed % rows] = 0
    return codes


def activations_of(tokens: int, columns: int, seed: int) -> Tensor:
    """Random int8 over the whole range; for some seeds all −128, all 127, or zeros."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randint(-128, 128, (tokens, columns), generator=generator, dtype=torch.int8)
    extreme = {0: -128, 1: 127, 2: 0}.get(seed % 11)
    return x if extreme is None else torch.full_like(x, extreme)


def scales_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """Positive fp32 over most of its range."""
    return 10 ** (torch.rand(shape, generator=torch.Generator().manual_seed(seed + 2)) * 24 - 12)


def weight_scale(rows: int, columns: int, granularity: Granularity, seed: int) -> Tensor:
    """As quant.absmean_scale gives it."""
    group = quant.group_size(granularity)
    width = 1 if group is None else -(-columns // group)
    scale = scales_of((1 if granularity == "tensor" else rows, width), seed)
    return scale if group is None else scale.clamp(6e-5, 6e4).half().float()


def kernel_scale(scale: Tensor, granularity: Granularity) -> Tensor:
    return scale if quant.group_size(granularity) is None else scale.T.contiguous()


def exact_product(x: Tensor, codes: Tensor) -> Tensor:
    return (x.long() @ codes.long().T).int()


@settings(max_examples=EXAMPLES)
@given(rows=ROWS, columns=COLUMNS, tokens=TOKENS, seed=SEEDS, granularity=st.sampled_from(GRANULARITIES))
def test_linear_is_integer_linear(rows: int, columns: int, tokens: int, seed: int, granularity: Granularity) -> None:
    """Every instruction set and ternary layout has quant.integer_linear's bits, and the exact integers before scaling."""
    codes, x = codes_of(rows, columns, seed), activations_of(tokens, columns, seed)
    scale, x_scale = weight_scale(rows, columns, granularity, seed), scales_of((tokens, 1), seed)
    bias = torch.randn(rows) if seed % 2 else None
    expected = quant.integer_linear(x, x_scale, codes, scale, bias, granularity)
    integers = exact_product(x, codes)
    for form in TERNARY:
        matrix = native.pack(codes, form, granularity)
        for name in native.instruction_sets():
            assert torch.equal(native.product(matrix, x, name), integers), (form, name)
            y = native.linear(matrix, kernel_scale(scale, granularity), x, x_scale, bias, name)
            assert torch.equal(y, expected), (form, name)


@settings(max_examples=EXAMPLES)
@given(rows=ROWS, columns=COLUMNS, tokens=TOKENS, seed=SEEDS)
def test_int8_head_is_exact(rows: int, columns: int, tokens: int, seed: int) -> None:
    """int8 × int8 with a scale per row: exact integers and integer_linear's bits, −128 and saturation included."""
    weight = activations_of(rows, columns, seed // 3)
    x, scale, x_scale = activations_of(tokens, columns, seed), scales_of((rows, 1), seed), scales_of((tokens, 1), seed)
    matrix = native.pack(weight, "int8")
    assert torch.equal(native.unpack(matrix), weight)
    expected = exact_product(x, weight).float() * (x_scale * scale.T)
    for name in native.instruction_sets():
        assert torch.equal(native.product(matrix, x, name), exact_product(x, weight)), name
        assert torch.equal(native.linear(matrix, scale, x, x_scale, None, name), expected), name


@settings(max_examples=EXAMPLES)
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, group=st.sampled_from([0, 64, 128, 256]))
def test_layouts_are_those_of_formats(rows: int, columns: int, seed: int, group: int) -> None:
    """C and torch pack the same bytes, and each unpacks the other's."""
    codes = codes_of(rows, columns, seed)
    granularity: Granularity = "tensor" if group == 0 else f"group-{group}"  # pyright: ignore[reportAssignmentType]
    layouts: list[tuple[Format, type[PanelTwoBit] | type[PanelBase3]]] = [("two-bit", PanelTwoBit), ("base-3", PanelBase3)]
    for form, layout in layouts:
        matrix = native.pack(codes, form, granularity)
        assert torch.equal(matrix.data, layout.pack(codes, group)), form
        assert torch.equal(layout.unpack(matrix.data, rows, columns, group), codes), form
        assert torch.equal(native.unpack(matrix), codes), form


@given(rows=ROWS, columns=st.integers(1, 90), seed=SEEDS, group=st.sampled_from([0, 16, 64]))
def test_bits_lie_where_the_diagram_says(rows: int, columns: int, seed: int, group: int) -> None:
    """Each code is found in the byte and symbol that docs/formats.md names, by arithmetic of its own."""
    codes = codes_of(rows, columns, seed)
    for layout, width, base in ((PanelTwoBit, 16, 4), (PanelBase3, 20, 3)):
        packed = layout.pack(codes, group).tolist()
        size = group or columns
        per_group, last = -(-size // width), columns - (-(-columns // size) - 1) * size
        tiles = (-(-columns // size) - 1) * per_group + -(-last // width)
        assert len(packed) == -(-rows // 32) * tiles * 128
        for o, k in every(range(rows), range(columns)):
            tile, column = k // size * per_group + k % size // width, k % size % width
            byte = (o // 32 * tiles + tile) * 128 + o % 32 // 16 * 64 + o % 16 * 4 + column % 4
            assert packed[byte] // base ** (column // 4) % base - 1 == codes[o, k], (layout, o, k)


def values_of(tokens: int, columns: int, seed: int) -> Tensor:
    """fp32 rows of very different sizes; for some seeds exact ties, zeros, or one outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) * scales_of((tokens, 1), seed)
    if seed % 5 == 0:  # codes halfway between integers
        x = torch.randint(-253, 254, (tokens, columns), generator=generator) / 2
        x[:, 0] = 127
    if seed % 5 == 1:
        x[seed % tokens] = 0
    if seed % 5 == 2:
        x[:, seed % columns] *= 1e4
    return x


@settings(max_examples=EXAMPLES)
@given(columns=COLUMNS, tokens=TOKENS, seed=SEEDS, half=st.booleans())
def test_quantise_is_int8_codes(columns: int, tokens: int, seed: int, half: bool) -> None:
    """Without a norm codes and scales have quant.int8_codes' bits: ties, zero rows, tiny and huge values, bf16."""
    x = values_of(tokens, columns, seed)
    x = x.bfloat16() if half else x
    expected = quant.int8_codes(x)
    for name in native.instruction_sets():
        codes, scale = native.quantize(x, instructions=name)
        assert torch.equal(codes, expected[0]), name
        assert torch.equal(scale, expected[1]), name


def test_quantise_after_a_norm_differs_by_the_order_of_a_sum_only() -> None:
    """With a vector or scalar gain at most one code in 10,000 differs from quant.py's, by 1, and scales by a few roundings."""
    different = total = 0
    for seed, columns, half, scalar in every(range(6), (1, 17, 63, 576, 2560), (False, True), (False, True)):
        x = torch.randn(7, columns, generator=torch.Generator().manual_seed(seed)) * 3
        x = x.bfloat16() if half else x
        gain = torch.rand(1 if scalar else columns, generator=torch.Generator().manual_seed(seed + 1)) + 0.5
        expected, expected_scale = quant.int8_codes(quant.rms_norm(x.float(), gain, 1e-6))
        for name in native.instruction_sets():
            codes, scale = native.quantize(x, gain, 1e-6, name)
            distance = (codes.int() - expected.int()).abs()
            assert distance.max() <= 1
            assert torch.allclose(scale, expected_scale, rtol=1e-6, atol=0)
            different += int(distance.sum())
            total += distance.numel()
    assert different <= 1e-4 * total, (different, total)


def test_vector_sets_quantise_alike() -> None:
    """After a norm too, all vector instruction sets give the same bits."""
    x, gain = torch.randn(5, 777), torch.rand(777)
    results = [native.quantize(x, gain, 1e-6, name) for name in native.instruction_sets() if name != "scalar"]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_scale(bad: float) -> None:
    """A NaN or infinity makes its token's scale NaN or infinite, as in quant.py, and no other's."""
    x = torch.randn(3, 100)
    x[1, 57] = bad
    expected = quant.int8_codes(x)[1]
    for name in native.instruction_sets():
        scale = native.quantize(x, instructions=name)[1]
        assert torch.equal(scale.isnan(), expected.isnan())
        assert torch.equal(scale[~scale.isnan()], expected[~expected.isnan()])
        normed = native.quantize(x, torch.ones(1), 1e-6, name)[1]
        assert normed[1].isnan().all() == quant.int8_codes(quant.rms_norm(x, torch.ones(1), 1e-6))[1][1].isnan().all()
        assert normed[::2].isfinite().all()


@pytest.mark.parametrize("columns", [70_001, 131_071])
def test_long_rows_do_not_overflow(columns: int) -> None:
    """The largest sums are exact where accumulators hold multiples of them: 64 times (2 bits) and 81 times (base 3)."""
    x = torch.full((2, columns), -128, dtype=torch.int8)
    codes = torch.full((3, columns), -1, dtype=torch.int8)
    codes[1] = 1
    for form, name in every(TERNARY, native.instruction_sets()):
        matrix = native.pack(codes, form)
        assert torch.equal(native.product(matrix, x, name), exact_product(x, codes)), (form, name)
        assert torch.equal(native.product(matrix, x[:1], name), exact_product(x[:1], codes)), (form, name)


@pytest.mark.parametrize("tokens", [240, 241, 500])
def test_many_tokens(tokens: int) -> None:
    """More tokens than a block holds, in every layout, with and without groups."""
    codes, x = codes_of(70, 700, 5), activations_of(tokens, 700, 5)
    x_scale = scales_of((tokens, 1), 5)
    for form, granularity in every(TERNARY, ("row", "group-128")):
        scale = weight_scale(70, 700, granularity, 5)
        expected = quant.integer_linear(x, x_scale, codes, scale, None, granularity)
        matrix = native.pack(codes, form, granularity)
        for name in native.instruction_sets():
            if name == "scalar" and tokens > 241:
                continue
            assert torch.equal(native.linear(matrix, kernel_scale(scale, granularity), x, x_scale, None, name), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    """One thread, two and three give the same, whichever takes which rows: one token and many, and quantisation."""
    codes, x = codes_of(1500, 2000, 4), activations_of(40, 2000, 4)
    matrix, expected = native.pack(codes, "two-bit"), exact_product(x, codes)
    values = torch.randn(300, 2000)
    wanted = quant.int8_codes(values)
    for _ in range(20):
        assert torch.equal(native.product(matrix, x[:1], threads=threads), expected[:1])
        assert torch.equal(native.product(matrix, x, threads=threads), expected)
        codes_, scale = native.quantize(values, threads=threads)
        assert torch.equal(codes_, wanted[0]) and torch.equal(scale, wanted[1])


def test_callers_from_several_threads_do_not_meet() -> None:
    """Products from four Python threads at once, each allowed two threads, are all exact."""
    from concurrent.futures import ThreadPoolExecutor

    matrices = [native.pack(codes_of(600, 1000 + i, i), "two-bit") for i in range(4)]

    def run(i: int) -> bool:
        x = activations_of(1 + i % 2, 1000 + i, i)
        expected = exact_product(x, native.unpack(matrices[i]))
        return all(torch.equal(native.product(matrices[i], x, threads=2), expected) for _ in range(30))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(4)))


FORK = """
import os, torch
from trilobit.kernels import native
matrix = native.pack(torch.ones(4000, 1000, dtype=torch.int8), "two-bit")
x = torch.ones(1, 1000, dtype=torch.int8)
assert (native.product(matrix, x, threads=2) == 1000).all()
child = os.fork()
right = bool((native.product(matrix, x, threads=2) == 1000).all())
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_starts_its_own_threads() -> None:
    """A child forked after the pool has started computes with two threads and ends; it does not wait for threads it lacks."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


def test_group_scales_wider_than_the_row() -> None:
    """A group that is wider than the matrix is one group: scaled before x's scale is applied, as quant.py does."""
    codes, x = codes_of(33, 50, 3), activations_of(2, 50, 3)
    scale, x_scale = weight_scale(33, 50, "group-256", 3), scales_of((2, 1), 3)
    expected = quant.integer_linear(x, x_scale, codes, scale, None, "group-256")
    for form, name in every(TERNARY, native.instruction_sets()):
        y = native.linear(native.pack(codes, form, "group-256"), scale.T.contiguous(), x, x_scale, None, name)
        assert torch.equal(y, expected)


def test_no_tokens() -> None:
    """An empty batch gives an empty result."""
    matrix = native.pack(codes_of(5, 7, 1), "two-bit")
    assert native.product(matrix, torch.empty(0, 7, dtype=torch.int8)).shape == (0, 5)
    codes, scale = native.quantize(torch.empty(0, 7))
    assert codes.shape == (0, 7) and scale.shape == (0, 1)


def test_an_unknown_instruction_set_is_refused() -> None:
    """A name that does not exist here is refused with those that do; an override holds until it is lifted, and says so."""
    with pytest.raises(ConfigError, match="sse9 does not exist here: choose one of scalar"):
        native.set_instruction_set("sse9")
    with pytest.raises(ConfigError, match="sse9"):
        native.product(native.pack(codes_of(2, 2, 1), "two-bit"), torch.zeros(1, 2, dtype=torch.int8), "sse9")
    try:
        native.set_instruction_set("scalar")
        assert native.choice().name == "scalar"
        assert "set_instruction_set" in native.choice().reason
    finally:
        native.set_instruction_set(None)
    assert native.choice().name == native.instruction_sets()[-1]
    assert "scalar" in native.choice().reason


def test_wrong_arguments_do_not_reach_the_kernels() -> None:
    """Types, shapes and scales that do not fit are assertions with both values, not reads past an end."""
    matrix, x = native.pack(codes_of(4, 130, 1), "two-bit", "group-64"), torch.zeros(2, 130, dtype=torch.int8)
    scale, x_scale = torch.ones(3, 4), torch.ones(2, 1)
    native.linear(matrix, scale, x, x_scale)
    with pytest.raises(AssertionError, match="129"):
        native.product(matrix, x[:, :129])
    with pytest.raises(AssertionError, match="int16"):
        native.product(matrix, x.short())
    with pytest.raises(AssertionError, match=r"\(4, 3\)"):
        native.linear(matrix, scale.T, x, x_scale)
    with pytest.raises(AssertionError, match="3"):
        native.linear(matrix, scale, x, torch.ones(3, 1))
    with pytest.raises(AssertionError, match="columns"):
        native.packed_bytes("int8", 1, 1 << 17)


def test_strided_operands_are_read_rightly() -> None:
    """Codes and activations that are slices or transposes give the same product."""
    codes, x = codes_of(66, 40, 2), activations_of(20, 66, 2)
    matrix = native.pack(codes.T, "base-3")
    assert torch.equal(native.product(matrix, x[::2]), exact_product(x[::2], codes.T))
    assert torch.equal(native.product(matrix, x.T.contiguous().T), exact_product(x, codes.T))
