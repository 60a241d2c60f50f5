"""Keys and values in one place do what those of transformers do, whoever cuts, orders or replaces them."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from poise_edgemoe.kv import KeptLayer

HEADS, WIDTH = 2, 4


def new(rows, time, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, HEADS, time, WIDTH, generator=draw) for _ in range(2)]


def _double(layer):
    layer.keys = 2 * layer.keys


def _drop_the_first(layer):
    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]


@pytest.mark.parametrize("rows, change", [
    (2, lambda layer: layer.crop(-1)), (4, lambda layer: layer.batch_repeat_interleave(2)),
    (1, lambda layer: layer.batch_select_indices(torch.tensor([1]))),
    (2, lambda layer: layer.reorder_cache(torch.tensor([1, 0]))), (2, _double), (2, _drop_the_first),
    (2, lambda layer: layer.offload()), (3, lambda layer: layer.reset()),
])
def test_it_is_changed_as_transformers_s_is(rows, change):
    layers = KeptLayer(16), DynamicLayer()
    for layer in layers:
        for n, time in enumerate((3, 1, 1)):
            layer.update(*new(2, time, n))
        change(layer)
        layer.update(*new(rows, 2, 3))
    ours, theirs = layers
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length() and ours.has_room(rows)


def test_what_there_is_no_room_for_is_not_counted():
    layer = KeptLayer(5)
    layer.update(*new(1, 4, 0))
    with pytest.raises(RuntimeError):
        layer.update(*new(1, 2, 1))
    assert layer.get_seq_length() == 4 and layer.keys.shape[2] == 4
