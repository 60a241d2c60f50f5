"""The experts of a layer as bytes of a store: each matrix, and each plane of one, begins at a page."""

from __future__ import annotations

from typing import Any, BinaryIO

import torch
from torch import Tensor

from poise.errors import DataError
from poise.walk import Weight
from poise_edgemoe.store.blobs import bytes_of_tensors
from poise_edgemoe.store.checksums import crc32
from poise_edgemoe.store.hot import finite
from poise_edgemoe.store.index import LOW, PAGE, Layer, Matrix, padded
from poise_edgemoe.store.layouts import lay_out
from poise_edgemoe.store.planes import Planed
from poise_edgemoe.store.schemes import Raw, stored, written
from poise_edgemoe.store.source import MoELayer


def write_layer(
    f: BinaryIO, layer: MoELayer, forms: dict[str, Any], biases: dict[str, Tensor],
    quantizers: list[dict[str, Any]], dtype: torch.dtype, layout: str,
) -> Layer:
    """Write a layer's experts; of those in two planes all bases first, then what refines them."""
    experts = []
    for e, one in enumerate(layer.experts):
        where, after = {}, {}
        for part, w in one.items():
            name = f"{layer.path}.{part}_proj_bias"
            bias = finite(biases[part][e].to(dtype), name) if part in biases else None
            quantizer, *planes = _planes(w, forms[w.name], layer.transposed, layout)
            if (said := written(quantizer)) not in quantizers:
                quantizers.append(said)
            form = quantizers.index(said)
            where[part] = _put(f, bytes_of_tensors(planes[0], bias), form)
            if len(planes) > 1:
                after[part + LOW] = bytes_of_tensors(planes[1], None), form
        experts.append(where | {name: _put(f, *one) for name, one in after.items()})
    shapes = {part: list(w.shape) for part, w in layer.experts[0].items()}
    return Layer(layer.path, layer.encoder, shapes, sorted(biases), layer.transposed, experts)


def _planes(w: Weight, quantizer: Any, transposed: bool, layout: str) -> tuple[Any, ...]:
    """Return the quantizer that was used, and the tensors of a matrix, those of each plane."""
    matrix = w.read()
    if isinstance(quantizer, Raw) and transposed:
        matrix = w.plain(matrix)
    planed = isinstance(quantizer, Planed)
    try:
        quantizer, made = stored(quantizer.quantizer if planed else quantizer, matrix.contiguous())
    except DataError as error:
        raise DataError(f"weight {w.name} {error}") from None
    if planed:
        return (it := Planed(quantizer)), *it.split(made)
    quantizer, made = lay_out(quantizer, made, layout)
    return quantizer, made.tensors()


def _put(f: BinaryIO, data: bytearray, form: int) -> Matrix:
    """Write a matrix, or a plane of one, from one page to the next."""
    offset = f.tell()
    f.write(data)
    f.write(bytes(padded(len(data), PAGE) - len(data)))
    return Matrix(offset, len(data), form, crc32(data))
