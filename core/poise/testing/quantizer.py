"""What every quantizer keeps."""

from __future__ import annotations

from typing import Any

import torch

from poise.testing.faults import expect, expect_methods, expect_refusal


def check_quantizer(quantizer: Any, shape: tuple[int, int] = (24, 40), seed: int = 0) -> None:
    """Run a quantizer through its contract on a random matrix.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    stored = quantizer.quantize(weight)
    expect_methods(
        stored, ("shape", "dtype", "nbytes", "bits_per_weight", "dequantize", "matmul", "matmul_t",
                 "tensors"), "the quantized tensor")
    _sizes(stored, shape)
    _values(quantizer, stored, weight)
    _products(stored, generator)
    _round_trip(quantizer, stored, shape)
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken.view(-1)[-1] = bad
        expect_refusal(lambda b=broken: quantizer.quantize(b), f"a weight that holds {bad} is accepted")


def _sizes(stored: Any, shape: tuple[int, int]) -> None:
    expect(tuple(stored.shape) == shape, f"shape is {tuple(stored.shape)}, not {shape}")
    held = sum(t.numel() * t.element_size() for t in stored.tensors().values())
    expect(stored.nbytes == held, f"nbytes lies: it says {stored.nbytes}, its tensors hold {held}")
    bits = 8 * held / (shape[0] * shape[1])
    expect(abs(stored.bits_per_weight - bits) < 1e-9,
           f"bits_per_weight is {stored.bits_per_weight}, its tensors take {bits}")


def _values(quantizer: Any, stored: Any, weight: torch.Tensor) -> None:
    dense = stored.dequantize()
    expect(dense.shape == weight.shape, "dequantize has another shape than the weight")
    expect(dense.dtype == weight.dtype == stored.dtype, "dequantize has another dtype than the weight")
    expect(bool(torch.isfinite(dense).all()), "dequantize holds NaN or Inf")
    error = float((dense - weight).norm() / weight.norm())
    expect(error < 1.0, f"the error is {error:.2f} of the weight: no better than zeros")
    for rows in (slice(0, 1), slice(3, 9), slice(weight.shape[0] - 2, weight.shape[0])):
        expect(torch.equal(stored.dequantize(rows), dense[rows]),
               f"dequantize({rows}) differs from those rows of the whole")
    again = quantizer.quantize(weight)
    expect(torch.equal(again.dequantize(), dense), "quantizing the same weight twice differs")


def _products(stored: Any, generator: torch.Generator) -> None:
    dense = stored.dequantize()
    x = torch.randn(2, 5, dense.shape[1], generator=generator)
    dy = torch.randn(2, 5, dense.shape[0], generator=generator)
    for name, got, want in (
        ("matmul(x)", stored.matmul(x), x @ dense.T), ("matmul_t(dy)", stored.matmul_t(dy), dy @ dense)
    ):
        expect(got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        error = float((got - want).abs().max() / want.abs().max())
        expect(error < 1e-5, f"{name} differs from the dequantized product by {error:.1e}")


def _round_trip(quantizer: Any, stored: Any, shape: tuple[int, int]) -> None:
    tensors = {k: v.clone() for k, v in stored.tensors().items()}
    back = quantizer.from_tensors(tensors, shape, stored.dtype)
    expect(torch.equal(back.dequantize(), stored.dequantize()),
           "from_tensors(tensors()) dequantizes differently")
