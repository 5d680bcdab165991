"""The byte layouts: every bit where the docstrings say, and nothing lost on the way back."""

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.formats import Q2_0, TQ1_0, TQ2_0, Bitnet, GgufBlocks, LaneTwoBit, PanelBase3, PanelTwoBit, Q2_0Of128, TwoBit
from trilobit.quant import Granularity

SIZES = st.integers(1, 23)


def random_codes(outputs: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (outputs, inputs), generator=generator, dtype=torch.int8)


@given(rows=SIZES, inputs=SIZES, seed=st.integers(0, 9))
def test_bitnet_bits(rows: int, inputs: int, seed: int) -> None:
    """Bits 2i…2i+1 of byte [r, k] are the symbol of row i·R + r, and unpacking gives the codes back as they were."""
    codes = random_codes(4 * rows, inputs, seed)
    before = codes.clone()
    packed = Bitnet.pack(codes)
    naive = [[sum((codes[i * rows + r, k].item() + 1) * 4**i for i in range(4)) for k in range(inputs)] for r in range(rows)]
    assert packed.dtype == torch.uint8
    assert packed.tolist() == naive
    back = Bitnet.unpack(packed)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)
    assert torch.equal(codes, before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
@given(rows=SIZES, inputs=SIZES, seed=st.integers(0, 9))
def test_bitnet_is_transformers_layout(rows: int, inputs: int, seed: int) -> None:
    """The bytes are those of transformers' pack_weights, and its unpack_weights reads ours."""
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = random_codes(4 * rows, inputs, seed)
    packed = Bitnet.pack(codes)
    assert torch.equal(packed, pack_weights(codes.clone()))  # it changes its argument
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_weights(packed, torch.int8), codes)


@pytest.mark.parametrize("outputs", [1, 2, 3, 5, 6, 7, 9])
def test_bitnet_refuses_what_it_cannot_hold(outputs: int) -> None:
    """Output rows that are not a multiple of four are refused with their number, not padded."""
    assert not Bitnet.fits(outputs)
    assert Bitnet.fits(4 * outputs)
    with pytest.raises(ModelError, match=f"{outputs} output rows are not a multiple of 4"):
        Bitnet.pack(random_codes(outputs, 3, 0))


@given(outputs=SIZES, inputs=SIZES, seed=st.integers(0, 9))
def test_two_bit_bits(outputs: int, inputs: int, seed: int) -> None:
    """Bits 2j…2j+1 of byte [o, b] are the symbol of input 4b + j, code 0 past the end; any shape comes back."""
    codes = random_codes(outputs, inputs, seed)
    packed = TwoBit.pack(codes)
    width = -(-inputs // 4)
    naive = [
        [sum(((codes[o, 4 * b + j].item() if 4 * b + j < inputs else 0) + 1) * 4**j for j in range(4)) for b in range(width)]
        for o in range(outputs)
    ]
    assert packed.dtype == torch.uint8
    assert packed.tolist() == naive
    back = TwoBit.unpack(packed, inputs)
    assert back.dtype == torch.int8
    assert back.is_contiguous()
    assert torch.equal(back, codes)


@given(outputs=SIZES, inputs=st.integers(1, 40), seed=st.integers(0, 9))
def test_lane_two_bit_bits(outputs: int, inputs: int, seed: int) -> None:
    """Bits 2i…2i+1 of byte 4q + j are the symbol of input 16q + 4i + j, code 0 past the end; any shape comes back."""
    codes = random_codes(outputs, inputs, seed)
    packed = LaneTwoBit.pack(codes)
    padded = torch.nn.functional.pad(codes, (0, -inputs % 16)).tolist()
    places = [(q, j) for q in range(-(-inputs // 16)) for j in range(4)]
    assert packed.tolist() == [
        [sum((row[16 * q + 4 * i + j] + 1) * 4**i for i in range(4)) for q, j in places] for row in padded
    ]
    back = LaneTwoBit.unpack(packed, inputs)
    assert back.dtype == torch.int8
    assert back.is_contiguous()
    assert torch.equal(back, codes)


def test_non_contiguous_codes_pack_alike() -> None:
    """A transposed view packs as its contiguous copy does."""
    codes = random_codes(8, 12, 0)
    assert torch.equal(Bitnet.pack(codes.T), Bitnet.pack(codes.T.contiguous()))
    assert torch.equal(TwoBit.pack(codes.T), TwoBit.pack(codes.T.contiguous()))


def codes_and_scales(layout: type[GgufBlocks], rows: int, blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    codes = random_codes(rows, layout.BLOCK * blocks, seed)
    generator = torch.Generator().manual_seed(seed)
    return codes, (torch.rand(rows, blocks, generator=generator) + 0.01).half()


@pytest.mark.parametrize("layout", [TQ1_0, TQ2_0])
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_gguf_blocks_are_the_gguf_packages(layout: type[GgufBlocks], rows: int, blocks: int, seed: int) -> None:
    """Bytes equal those of the gguf package's codec bit for bit, and it reads ours as code · scale."""
    import gguf

    codes, scales = codes_and_scales(layout, rows, blocks, seed)
    packed = layout.pack(codes, scales)
    kind = gguf.GGMLQuantizationType(layout.TYPE)
    dense = codes.float() * scales.float().repeat_interleave(layout.BLOCK, dim=1)
    assert torch.equal(packed, torch.from_numpy(gguf.quants.quantize(dense.numpy(), kind)))
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind)), dense)


@pytest.mark.parametrize("layout", [Q2_0, Q2_0Of128])
@given(seed=st.integers(0, 99))
def test_q2_0_bits(layout: type[GgufBlocks], seed: int) -> None:
    """An fp16 scale, then byte b has columns 4b … 4b + 3, the first in the lowest bits."""
    codes, scales = codes_and_scales(layout, 1, 1, seed)
    packed = layout.pack(codes, scales)[0]
    assert torch.equal(packed[:2].view(torch.float16), scales[0])
    naive = [sum((int(codes[0, 4 * b + j]) + 1) * 4**j for j in range(4)) for b in range(layout.BLOCK // 4)]
    assert packed[2:].tolist() == naive


@pytest.mark.parametrize("layout", [Q2_0, Q2_0Of128, TQ1_0, TQ2_0])
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_gguf_blocks_come_back(layout: type[GgufBlocks], rows: int, blocks: int, seed: int) -> None:
    """Codes and scales come back as they were, zero scales and all-zero blocks among them."""
    codes, scales = codes_and_scales(layout, rows, blocks, seed)
    codes[0, : layout.BLOCK], scales[-1, 0] = 0, 0
    packed = layout.pack(codes, scales)
    assert packed.shape == (rows, blocks * layout.SIZE)
    back, halves = layout.unpack(packed)
    assert torch.equal(back, codes)
    assert torch.equal(halves, scales)


@pytest.mark.parametrize("layout", [Q2_0, TQ1_0, TQ2_0])
def test_gguf_blocks_refuse_what_they_cannot_hold(layout: type[GgufBlocks]) -> None:
    """Widths between blocks, and scales outside fp16, are refused with the number."""
    codes = random_codes(2, layout.BLOCK, 0)
    with pytest.raises(ModelError, match=f"576 columns|{layout.BLOCK // 2} columns"):
        layout.pack(codes[:, : layout.BLOCK // 2], torch.ones(2, 1))
    for scale in (1e6, 1e-9):
        with pytest.raises(ModelError, match="fp16 scales"):
            layout.pack(codes, torch.full((2, 1), scale))


SHAPES = 1000


def matrices() -> Iterator[tuple[Tensor, Granularity]]:
    """Weights of 1,000 shapes with each granule in turn, as training could leave them and as it would not: in steps of half
    their scale (ties), rows and groups of zeros, nothing but zeros, one column, one row."""
    generator = torch.Generator().manual_seed(0)

    def whole(least: int, most: int) -> int:
        return int(torch.randint(least, most, (), generator=generator))

    for index in range(SHAPES):
        rows, columns = whole(1, 13), whole(1, 600) if index % 3 else 64 * whole(1, 9)
        weight = torch.randn(rows, columns, generator=generator) * 10.0 ** whole(-4, 3)
        if index % 4 == 1:
            weight = torch.randint(-3, 4, (rows, columns), generator=generator) / 2.0 ** whole(1, 9)
        if index % 5 == 1:
            weight[:, : columns // 2] = 0
        if index % 7 == 1:
            weight[::2] = 0
        yield weight * (index % 50 != 49), get_args(Granularity)[index % len(get_args(Granularity))]


def block_scales(scale: Tensor, shape: torch.Size, layout: type[GgufBlocks], granularity: Granularity) -> Tensor:
    """A scale for each block, as the exporter spreads them."""
    group, blocks = quant.group_size(granularity), shape[1] // layout.BLOCK
    spread = scale.repeat_interleave(group // layout.BLOCK, dim=1)[:, :blocks] if group else scale
    return spread.expand(shape[0], blocks)


def test_a_thousand_matrices_in_every_layout() -> None:
    """Codes, and in GGUF's blocks scales to their last fp16 bit, come back from every layout that has the shape; every other
    layout refuses it. Where the gguf package has a codec, bytes and numbers are its own."""
    import gguf

    held = dict.fromkeys((Bitnet, TwoBit, LaneTwoBit, PanelTwoBit, PanelBase3, Q2_0, Q2_0Of128, TQ1_0, TQ2_0), 0)
    for weight, granularity in matrices():
        scale = quant.absmean_scale(weight, granularity)
        codes = quant.ternary_codes(weight, scale, granularity)
        (rows, columns), group = codes.shape, quant.group_size(granularity)
        for flat in (TwoBit, LaneTwoBit):
            assert torch.equal(flat.unpack(flat.pack(codes), columns), codes)
            held[flat] += 1
        for panel in (PanelTwoBit, PanelBase3):
            assert torch.equal(panel.unpack(panel.pack(codes, group or 0), rows, columns, group or 0), codes)
            held[panel] += 1
        if rows % 4 == 0:
            assert torch.equal(Bitnet.unpack(Bitnet.pack(codes)), codes)
            held[Bitnet] += 1
        else:
            with pytest.raises(ModelError, match="not a multiple of 4"):
                Bitnet.pack(codes)
        for layout in (Q2_0, Q2_0Of128, TQ1_0, TQ2_0):
            if columns % layout.BLOCK:
                with pytest.raises(ModelError, match=f"not a multiple of {layout.BLOCK}"):
                    layout.pack(codes, torch.ones(rows, -(-columns // layout.BLOCK)))
                continue
            if group and group % layout.BLOCK:
                continue
            scales = block_scales(scale, codes.shape, layout, granularity)
            packed = layout.pack(codes, scales)
            back, halves = layout.unpack(packed)
            assert torch.equal(back, codes) and torch.equal(halves, scales.half())
            held[layout] += 1
            if layout in (TQ1_0, TQ2_0):
                kind = gguf.GGMLQuantizationType(layout.TYPE)
                dense = codes.float() * halves.float().repeat_interleave(layout.BLOCK, dim=1)
                assert torch.equal(torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind)), dense)
                used = codes.unflatten(1, (-1, layout.BLOCK)).any(dim=2).repeat_interleave(layout.SIZE, dim=1)
                theirs = torch.from_numpy(gguf.quants.quantize(dense.numpy(), kind))
                assert torch.equal(packed[used], theirs[used])  # of a block of zeros the package keeps no scale
    assert held[TwoBit] == held[PanelTwoBit] == held[PanelBase3] == SHAPES
    assert min(held.values()) >= 50, held
