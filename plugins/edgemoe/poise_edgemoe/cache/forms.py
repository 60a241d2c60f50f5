"""Matrices made of the bytes of a store, on the kernel that multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.quantizers.matrix import InPlace, PackedMatrix
from poise.quantizers.sliced import SlicedMatrix, refusal
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.store.index import Index, payload, places
from poise_edgemoe.store.schemes import Raw, RawMatrix, read_quantizer


class Forms:
    """Makes matrices of bytes, as the index says.

    Parameters
    ----------
    index : Index
    kernel : str
        Of matrices that are packed; "auto" is the fastest one that takes them.

    Attributes
    ----------
    fast : bool
        Whether they are multiplied without being made in full.
    slow : str
        Why not, though they could be.
    """

    def __init__(self, index: Index, kernel: str = "reference") -> None:
        self.dtype = getattr(torch, index.dtype)
        self.index = index
        self._quantizers = [read_quantizer(q, "the index") for q in index.quantizers]
        self._kernels: dict[tuple[int, int], str] = {}  # by form and columns
        self.slow = ""
        if kernel != "reference":
            self._choose(kernel)
        self.fast = bool(self._kernels)
        self._known: dict[tuple[int, str, int], tuple[Any, dict[str, Any], tuple[int, int]]] = {}
        for n, e, parts in index.blobs():
            for part, m in parts.items():
                if payload(self._layout(n, part, m.form)[1]) != m.nbytes:
                    raise FileError(f"the index is wrong: {part} of expert {e} in layer {n} cannot have "
                                    f"{m.nbytes} bytes in its form")

    def matrix(self, key: Key, part: str, buffer: memoryview) -> tuple[Any, Tensor | None]:
        """Return the stored matrix and its bias, views of a buffer."""
        form = self.index.layers[key[0]].experts[key[1]][part].form
        quantizer, found, shape = self._layout(key[0], part, form)
        tensors = {name: torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize, offset=at)
                   .view(dims) for name, (at, size, dims, dtype) in found.items()}
        bias = tensors.pop("bias", None)
        matrix = quantizer.from_tensors(tensors, shape, self.dtype)
        kernel = self._kernels.get((form, shape[1]))
        return matrix if kernel is None else matrix.prepared(kernel), bias

    def alike(self, key: Key, part: str) -> Any:
        """Return what two matrices have in common that lie in memory in the same way."""
        form, layer = self.index.layers[key[0]].experts[key[1]][part].form, self.index.layers[key[0]]
        return form, *layer.shapes[part], part in layer.biased, layer.transposed

    def on(self, kernel: str) -> bool:
        """Return whether a kernel multiplies all matrices."""
        found = {(m.form, self.index.layers[n].shapes[part][1])
                 for n, _, parts in self.index.blobs() for part, m in parts.items()}
        return all(self._kernels.get(one) == kernel for one in found)

    def _choose(self, kernel: str) -> None:
        """See which forms a kernel takes; raise for those that one asked for by name does not."""
        found = {(m.form, self.index.layers[n].shapes[part][1], part)
                 for n, _, parts in self.index.blobs() for part, m in parts.items()}
        for form, columns, part in sorted(found):
            quantizer = self._quantizers[form]
            why, name = _kernel(quantizer, columns, self.dtype, kernel)
            if why and kernel != "auto":
                raise ConfigError(f"kernel={kernel} cannot be used with this store: {part}: {why}; "
                                  f"kernel=auto takes what there is")
            if not why:
                self._kernels[form, columns] = name
            elif not isinstance(quantizer, Raw):
                self.slow = self.slow or why

    def _layout(self, n: int, part: str, form: int) -> tuple[Any, dict[str, Any], tuple[int, int]]:
        if (n, part, form) not in self._known:
            layer, quantizer = self.index.layers[n], self._quantizers[form]
            out, columns = layer.shapes[part]
            raw = self.index.quantizers[form]["entry"] == "raw"
            shape = (columns, out) if layer.transposed and raw else (out, columns)
            bias = (out, self.dtype) if part in layer.biased else None
            found = places(quantizer.layout(shape, self.dtype), bias)
            self._known[n, part, form] = quantizer, found, shape
        return self._known[n, part, form]


def lasting(matrix: Any) -> bool:
    """Return whether a view keeps nothing made of its bytes: they may become another expert's."""
    return type(matrix) in (RawMatrix, PackedMatrix, InPlace)


def _kernel(quantizer: Any, columns: int, dtype: torch.dtype, kernel: str) -> tuple[str, str]:
    """Return why a kernel does not take matrices of a quantizer, or nothing; and the name of the kernel."""
    if isinstance(quantizer, Raw):
        return "its weights are not packed", kernel
    tensors = {name: torch.zeros(shape, dtype=kind)
               for name, (shape, kind) in quantizer.layout((16, columns), dtype).items()}
    like = quantizer.from_tensors(tensors, (16, columns), dtype)
    if not isinstance(like, SlicedMatrix):
        return f"no kernel multiplies a {type(like).__name__}", kernel
    return refusal(like, kernel), next(iter(like.kernels())) if kernel == "auto" else kernel
