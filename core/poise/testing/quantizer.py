"""What every quantizer keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from poise.errors import PoiseError
from poise.testing.faults import expect, expect_methods, expect_refusal


def check_quantizer(quantizer: Any, shape: tuple[int, int] = (24, 40), seed: int = 0) -> list[str]:
    """Run a quantizer through its contract on a random matrix.

    Returns
    -------
    list of str
        The checks that were made, in order.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    expect_methods(quantizer, ("quantize", "from_tensors", "at", "layout"), "the quantizer")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    stored = quantizer.quantize(weight.clone())
    expect_methods(
        stored, ("shape", "dtype", "nbytes", "resident_bytes", "bits_per_weight", "dequantize", "matmul",
                 "matmul_t", "tensors"), "the quantized tensor")
    case = _Case(quantizer, weight, stored, generator)
    for check in CHECKS.values():
        check(case)
    return list(CHECKS)


@dataclass
class _Case:
    quantizer: Any
    weight: Tensor
    stored: Any
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _sizes(case: _Case) -> None:
    stored, shape = case.stored, tuple(case.weight.shape)
    expect(tuple(stored.shape) == shape, f"shape is {tuple(stored.shape)}, not {shape}")
    held = sum(t.numel() * t.element_size() for t in stored.tensors().values())
    expect(stored.nbytes == held, f"nbytes lies: it says {stored.nbytes}, its tensors hold {held}")
    expect(stored.resident_bytes >= held,
           f"resident_bytes {stored.resident_bytes} are fewer than the {held} of its tensors")
    bits = 8 * held / (shape[0] * shape[1])
    expect(abs(stored.bits_per_weight - bits) < 1e-9,
           f"bits_per_weight is {stored.bits_per_weight}, its tensors take {bits}")


def _layout(case: _Case) -> None:
    """The layout is that of the tensors, for any shape and before any data."""
    shapes = (tuple(case.weight.shape), (3, 17), (1, 8))
    for (rows, columns), dtype in product(shapes, (torch.float32, torch.bfloat16, torch.float64)):
        weight = case.normal(rows, columns).to(dtype)
        said = case.quantizer.layout((rows, columns), weight.dtype)
        made = {k: (tuple(t.shape), t.dtype) for k, t in case.quantizer.quantize(weight).tensors().items()}
        said = {k: (tuple(size), dtype) for k, (size, dtype) in said.items()}
        expect(said == made, f"layout(({rows}, {columns})) says {said}, quantize makes {made}")


def _values(case: _Case) -> None:
    stored, weight = case.stored, case.weight
    dense = stored.dequantize()
    expect(dense.shape == weight.shape, "dequantize has another shape than the weight")
    expect(dense.dtype == weight.dtype == stored.dtype, "dequantize has another dtype than the weight")
    expect(bool(torch.isfinite(dense).all()), "dequantize holds NaN or Inf")
    error = float((dense - weight).norm() / weight.norm())
    expect(error < 1.0, f"the error is {error:.2f} of the weight: no better than zeros")
    for rows in (slice(0, 1), slice(3, 9), slice(weight.shape[0] - 2, weight.shape[0])):
        expect(torch.equal(stored.dequantize(rows), dense[rows]),
               f"dequantize({rows}) differs from those rows of the whole")
    again = case.quantizer.quantize(weight)
    expect(torch.equal(again.dequantize(), dense), "quantizing the same weight twice differs")


def _types(case: _Case) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        stored = case.quantizer.quantize(case.weight.to(dtype))
        got = stored.dequantize().dtype
        expect(got == dtype == stored.dtype,
               f"a weight of {dtype} comes back as {got} (dtype says {stored.dtype})")


def _levels(case: _Case) -> None:
    """What was quantized lies on levels: quantizing it again moves nothing, or little in a search."""
    dense = case.stored.dequantize()
    again = case.quantizer.quantize(dense).dequantize()
    if getattr(case.quantizer, "searches", False):
        share = float((again - dense).norm() / (dense - case.weight).norm())
        expect(share < 0.75, f"quantizing what was quantized errs by {share:.2f} of the first error: codes "
                             f"and levels do not belong together")
        return
    moved = float((again - dense).abs().max() / dense.abs().max())
    expect(moved < 1e-3, f"quantizing what was quantized moves it by {moved:.1e} of the largest weight: "
                         f"codes and levels do not belong together")


def _own_memory(case: _Case) -> None:
    weight = case.weight.clone()
    stored = case.quantizer.quantize(weight)
    expect(torch.equal(weight, case.weight), "quantize writes to the weight that it is given")
    before = stored.dequantize().clone()
    weight.zero_()
    expect(torch.equal(stored.dequantize(), before), "it changes with the weight that it was made from")


def _products(case: _Case) -> None:
    stored = case.stored
    dense = stored.dequantize()
    x, dy = case.normal(2, 5, dense.shape[1]), case.normal(2, 5, dense.shape[0])
    for name, got, want in (
        ("matmul(x)", stored.matmul(x), x @ dense.T), ("matmul_t(dy)", stored.matmul_t(dy), dy @ dense)
    ):
        expect(got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        error = float((got - want).abs().max() / want.abs().max())
        expect(error < 1e-5, f"{name} differs from the dequantized product by {error:.1e}")


def _round_trip(case: _Case) -> None:
    stored = case.stored
    tensors = {k: v.clone() for k, v in stored.tensors().items()}
    back = case.quantizer.from_tensors(tensors, tuple(case.weight.shape), stored.dtype)
    expect(torch.equal(back.dequantize(), stored.dequantize()),
           "from_tensors(tensors()) dequantizes differently")
    first = next(iter(tensors))
    for what, other in (("without one of its tensors", {k: v for k, v in tensors.items() if k != first}),
                        ("with a tensor of another shape", {**tensors, first: tensors[first][:-1]})):
        expect_refusal(lambda other=other: case.quantizer.from_tensors(
            other, tuple(case.weight.shape), stored.dtype), f"from_tensors accepts a state {what}")
    half = case.quantizer.from_tensors(tensors, tuple(case.weight.shape), torch.bfloat16).dequantize()
    expect(half.dtype == torch.bfloat16, f"from_tensors with bfloat16 dequantizes to {half.dtype}")


def _other_bits(case: _Case) -> None:
    """`at` gives a quantizer of those bits, or refuses in words."""
    for bits in (-1, 0, 1000):
        expect_refusal(lambda b=bits: case.quantizer.at(b), f"at({bits}) is accepted")
    for bits in range(2, 9):
        try:
            other = case.quantizer.at(bits)
        except PoiseError:
            continue
        except Exception as error:
            expect(False, f"at({bits}) raises {type(error).__name__} instead of one of Poise's errors")
            return
        codes = other.quantize(case.weight).bits_per_weight
        expect(codes >= bits, f"at({bits}) stores a weight in {codes:.2f} bits")


def _refusals(case: _Case) -> None:
    for power in (-30, 30):
        try:
            dense = case.quantizer.quantize(case.weight * 10.0**power).dequantize()
        except PoiseError:
            continue
        expect(bool(torch.isfinite(dense).all()), f"weights of size 1e{power} come back as NaN or Inf")
    for bad in (float("nan"), float("inf")):
        broken = case.weight.clone()
        broken.view(-1)[-1] = bad
        expect_refusal(lambda b=broken: case.quantizer.quantize(b),
                       f"a weight that holds {bad} is accepted")


CHECKS: dict[str, Callable[[_Case], None]] = {
    "sizes": _sizes, "values": _values, "products": _products, "tensors and back": _round_trip,
    "layout before data": _layout, "the dtype is kept": _types, "levels stay": _levels,
    "memory of its own": _own_memory, "other bits": _other_bits, "refuses NaN and Inf": _refusals,
}
