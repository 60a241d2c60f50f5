"""Experts of a store that are not quantized, read one at a time as matrices (out, in)."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from poise.errors import FileError
from poise_edgemoe.cache.forms import Forms
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.store.checksums import crc32
from poise_edgemoe.store.index import EXPERTS, Index

Parts = dict[str, tuple[Tensor, Tensor | None]]  # part to matrix (out, in) and bias


class RawExperts:
    """Reads experts of a store, checked, each into memory of its own."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index, self._forms = folder, index, Forms(index)

    def read(self, key: Key) -> Parts:
        """Return an expert's matrices and biases, in the order in which it uses them.

        Raises
        ------
        FileError
            For bytes that are not those that were written.
        """
        layer, found = self.index.layers[key[0]], {}
        path = self.folder / EXPERTS
        with open(path, "rb", buffering=0) as f:
            for part, m in layer.experts[key[1]].items():
                data = bytearray(m.nbytes)
                f.seek(m.offset)
                if f.readinto(data) != m.nbytes or crc32(data) != m.crc:
                    raise FileError(f"{path} is torn or altered: {part} of expert {key[1]} in layer "
                                    f"{key[0]}")
                matrix, bias = self._forms.matrix(key, part, memoryview(data))
                weight = matrix.dequantize()
                found[part] = (weight.T if layer.transposed else weight), bias
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return found
