"""A matrix as it lies in a store: codes, scales and bias, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from poise_edgemoe.store.index import payload, places


def bytes_of_tensors(tensors: Mapping[str, Tensor], bias: Tensor | None) -> bytearray:
    """Return tensors and a bias one after the other, each at a line."""
    found = places({n: (tuple(t.shape), t.dtype) for n, t in tensors.items()},
                   None if bias is None else (len(bias), bias.dtype))
    data = bytearray(payload(found))
    for name, (at, size, _, _) in found.items():
        tensor = bias if name == "bias" else tensors[name]
        assert tensor is not None
        data[at: at + size] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data
