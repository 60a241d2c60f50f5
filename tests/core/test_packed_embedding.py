"""A packed table gives the rows of the matrix that it holds, and may be tied with an output layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.quantizers import AbsMax, Affine, PackedEmbedding, PackedLinear, stored_bytes
from poise.quantizers.components import GgmlQ8
from poise.quantizers.layers import Stored
from poise.walk import weights

ROWS, WIDTH = 37, 64
QUANTIZERS = [Affine(4, group=16), Affine(8, group=0), AbsMax(3, group=-1), AbsMax(5, group=24), GgmlQ8()]
few = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def table(quantizer=QUANTIZERS[0], dtype=torch.float32):
    matrix = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    return PackedEmbedding(Stored(quantizer.quantize(matrix), quantizer))


@few
@given(st.sampled_from(QUANTIZERS), st.lists(st.integers(0, ROWS - 1), max_size=20),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_are_those_of_the_matrix_in_full(quantizer, ids, dtype):
    packed, ids = table(quantizer, dtype), torch.tensor(ids, dtype=torch.long)
    plain = nn.Embedding.from_pretrained(packed.packed.get().dequantize())
    for given_ids in (ids, ids[None], ids.int()):
        got, want = packed(given_ids), plain(given_ids)
        assert got.dtype == want.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("wrong", [-1, ROWS, 1 << 40])
def test_what_is_no_row_is_refused(wrong):
    with pytest.raises(IndexError, match=f"row {wrong} is none of the {ROWS}"):
        table()(torch.tensor([0, wrong, 3]))


@pytest.mark.parametrize("wrong", [torch.float32, torch.bool, torch.uint8])
def test_what_is_no_number_of_a_row_is_refused(wrong):
    with pytest.raises(TypeError, match=f"int32 or int64, not {wrong}"):
        table()(torch.ones(2, dtype=wrong))


def test_a_table_that_is_tied_is_met_and_counted_once():
    packed = table()
    head = PackedLinear(packed.packed, packed.packed.quantizer)
    model = nn.ModuleDict({"embed": packed, "head": head})
    (found,) = weights(model)
    assert (found.name, found.role, found.tied_with) == ("embed", "embedding", ("head",))
    assert stored_bytes(model)["packed"] == packed.packed.get().nbytes
    found.write(torch.ones(ROWS, WIDTH))
    x = torch.randn(2, WIDTH)
    assert torch.equal(packed(torch.tensor([5])), torch.ones(1, WIDTH))
    torch.testing.assert_close(head(x), x.sum(1, keepdim=True).expand(2, ROWS))


def test_it_moves_and_saves_with_its_model():
    packed, other = table(), table(dtype=torch.bfloat16)
    other.packed.put(torch.zeros(ROWS, WIDTH))
    other.load_state_dict(packed.state_dict())
    ids = torch.arange(ROWS)
    assert torch.equal(other.to(torch.float32)(ids), packed(ids))
    assert packed.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert (packed.weight.shape, packed.weight.dtype) == ((ROWS, WIDTH), torch.bfloat16)
