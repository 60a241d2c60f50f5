"""Keeps oneDNN, which makes products in half precision, from keeping a kernel for every number of rows.

A router sends any number of tokens to an expert. For each number oneDNN compiles a kernel, of half a
megabyte or more, and keeps a thousand of them. Other ways to multiply would round otherwise than
transformers does.
"""

from __future__ import annotations

import os
import time
from functools import cache

import torch
import torch.nn.functional as F

KEPT = 24  # kernels: a token needs about ten
SIDE = 128  # of matrices that are large enough for oneDNN
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's of it


@cache
def bound_kernels(dtype: torch.dtype) -> bool:
    """Have few kernels kept in this process, and return whether it is so.

    oneDNN reads how many it may keep when it makes its first product: in a process that has made one in
    half precision, nothing can be changed any more. Numbers that the environment has are left.
    """
    supported = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
                 torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}
    if dtype not in supported or not supported[dtype]():
        return True
    ours = [name for name in _CAPACITIES if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, str(KEPT)))
    F.linear(*(torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2)))
    for name in ours:  # it has been read, and is not meant for processes that this one starts
        del os.environ[name]
    return any(_few_are_kept(dtype) for _ in range(3))  # on a busy machine a measurement may fail


def _few_are_kept(dtype: torch.dtype) -> bool:
    """Return whether kernels are compiled anew after many others: that takes thirty times as long."""
    w, x = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(2 * KEPT, SIDE, dtype=dtype)

    def seconds(rows: range) -> float:
        started = time.perf_counter()
        for n in rows:
            F.linear(x[:n], w)
        return time.perf_counter() - started

    few = range(1, KEPT // 3)
    seconds(range(1, 2 * KEPT))
    first = seconds(few)
    return first > 4 * seconds(few)
