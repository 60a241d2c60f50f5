"""Matrices made of the bytes of a store, on the kernel that multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.quantizers.matrix import InPlace, PackedMatrix
from poise.quantizers.sliced import SlicedMatrix, refusal
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.store.index import LOW, Index, payload, places
from poise_edgemoe.store.planes import Planed
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
        self._planes: dict[tuple[int, str, int], dict[str, Any]] = {}
        for n, e, parts in index.blobs():
            for part, m in parts.items():
                if payload(self._stored(n, part, m.form)) != m.nbytes:
                    raise FileError(f"the index is wrong: {part} of expert {e} in layer {n} cannot have "
                                    f"{m.nbytes} bytes in its form")

    def matrix(self, key: Key, part: str, buffer: memoryview) -> tuple[Any, Tensor | None]:
        """Return the stored matrix and its bias, views of a buffer."""
        form = self.index.layers[key[0]].experts[key[1]][part].form
        quantizer, found, shape = self._layout(key[0], part, form)
        tensors, bias = _tensors(found, buffer)
        matrix = quantizer.from_tensors(tensors, shape, self.dtype)
        kernel = self._kernels.get((form, shape[1]))
        return matrix if kernel is None else matrix.prepared(kernel), bias

    def base(
        self, key: Key, part: str, buffer: memoryview, room: Tensor
    ) -> tuple[Any, Tensor | None]:
        """Return the matrix that a base is, and its bias; scales are written to `room` (`Planed.base`)."""
        form = self.index.layers[key[0]].experts[key[1]][part].form
        quantizer, _, shape = self._layout(key[0], part, form)
        tensors, bias = _tensors(self._stored(key[0], part, form), buffer)
        matrix = quantizer.base(tensors, shape, self.dtype, room)
        kernel = self._kernels.get((form, shape[1]))
        return matrix if kernel is None else matrix.prepared(kernel), bias

    def whole(self, key: Key) -> dict[str, dict[str, Any]]:
        """Return where each tensor of an expert's matrices lies in it, by part, and by name."""
        layer = self.index.layers[key[0]]
        return {part: self._layout(key[0], part, layer.experts[key[1]][part].form)[1]
                for part in layer.shapes}

    def halves(self, key: Key) -> dict[str, int]:
        """Return the bits of a base's codes, by part, of a store in planes."""
        layer = self.index.layers[key[0]]
        return {part: self._quantizers[layer.experts[key[1]][part].form].half for part in layer.shapes}

    def refuses_bases(self) -> str:
        """Return why bases cannot be multiplied on the kernel that whole matrices are on, or nothing."""
        for form, columns, part in sorted(self._matrices()):
            if (kernel := self._kernels.get((form, columns))) is not None:
                quantizer, room = self._quantizers[form], torch.empty(32 * columns)
                tensors = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind)
                           in quantizer.high((16, columns), self.dtype).items()}
                if why := refusal(quantizer.base(tensors, (16, columns), self.dtype, room), kernel):
                    return f"kernel {kernel}, {part}: {why}"
        return ""

    def alike(self, key: Key, part: str) -> Any:
        """Return what two matrices have in common that lie in memory in the same way."""
        form, layer = self.index.layers[key[0]].experts[key[1]][part].form, self.index.layers[key[0]]
        return form, *layer.shapes[part], part in layer.biased, layer.transposed

    def on(self, kernel: str) -> bool:
        """Return whether a kernel multiplies all matrices."""
        return all(self._kernels.get(one[:2]) == kernel for one in self._matrices())

    def _choose(self, kernel: str) -> None:
        """See which forms a kernel takes; raise for those that one asked for by name does not."""
        for form, columns, part in sorted(self._matrices()):
            quantizer = self._quantizers[form]
            why, name = _kernel(quantizer, columns, self.dtype, kernel)
            if why and kernel != "auto":
                raise ConfigError(f"kernel={kernel} cannot be used with this store: {part}: {why}; "
                                  f"kernel=auto takes what there is")
            if not why:
                self._kernels[form, columns] = name
            elif not isinstance(quantizer, Raw):
                self.slow = self.slow or why

    def _matrices(self) -> set[tuple[int, int, str]]:
        """Return form, columns and part of all matrices."""
        return {(parts[part].form, shape[1], part) for n, _, parts in self.index.blobs()
                for part, shape in self.index.layers[n].shapes.items()}

    def _stored(self, n: int, part: str, form: int) -> dict[str, Any]:
        """Return where the tensors of a matrix, or of one of its planes, lie in the store."""
        quantizer, found, shape = self._layout(n, part.removesuffix(LOW), form)
        if not isinstance(quantizer, Planed):
            return found
        if (n, part, form) not in self._planes:
            low, (_, size, _, _) = part.endswith(LOW), found.get("bias", (0, 0, 0, 0))
            bias = (size // self.dtype.itemsize, self.dtype) if size and not low else None
            layout = (quantizer.low if low else quantizer.high)(shape, self.dtype)
            self._planes[n, part, form] = places(layout, bias)
        return self._planes[n, part, form]

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


def _tensors(found: dict[str, Any], buffer: memoryview) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return tensors and bias, views of a buffer."""
    tensors = {name: torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize, offset=at)
               .view(dims) for name, (at, size, dims, dtype) in found.items()}
    return tensors, tensors.pop("bias", None)


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
