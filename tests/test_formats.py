"""The byte layouts: every bit where the docstrings say, and nothing lost on the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trilobit.errors import ModelError
from trilobit.formats import Bitnet, TwoBit

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


def test_non_contiguous_codes_pack_alike() -> None:
    """A transposed view packs as its contiguous copy does."""
    codes = random_codes(8, 12, 0)
    assert torch.equal(Bitnet.pack(codes.T), Bitnet.pack(codes.T.contiguous()))
    assert torch.equal(TwoBit.pack(codes.T), TwoBit.pack(codes.T.contiguous()))
