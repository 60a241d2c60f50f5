"""The changes are what their definitions say; blocks compose, invert, combine and become LoRAs."""

from __future__ import annotations

import pytest
import torch
from bone_forms import ADDED, GUIDED, SHAPES, VARIANTS, cases, loops, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError
from poise_bone import variants
from poise_bone.functional import (
    add_rows,
    block_shape,
    change_rows,
    changed,
    combine,
    compose,
    delta,
    forward,
    inverse,
    n_parameters,
    restored,
    shards,
    to_lora,
)

few = settings(max_examples=80, derandomize=True, deadline=None, database=None)


def test_the_forms_are_named_once():
    assert variants.VARIANTS == VARIANTS == tuple(SHAPES)


@few
@given(cases())
def test_the_change_is_that_of_loops_over_blocks(case):
    variant, o, i, shape = case
    W, D = randn(o, i), randn(*shape, seed=1)
    want = loops(W, D, variant)
    assert torch.allclose(delta(W, D, variant), want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(changed(W, D, variant), W + want, rtol=1e-12, atol=1e-12)
    x, bias = randn(3, i, seed=2), randn(o, seed=3)
    assert torch.allclose(forward(x, W, D, variant, bias), x @ (W + want).T + bias, rtol=1e-11, atol=1e-11)


@few
@given(cases(), st.data())
def test_rows_of_the_change_are_rows_of_the_whole(case, data):
    """A weight is changed in pieces of whole blocks: what each piece becomes is the same."""
    variant, o, i, shape = case
    W, D = randn(o, i), randn(*shape, seed=1)
    r = 1 if variant in ADDED else shape[-1]
    first = r * data.draw(st.integers(0, o // r - 1))
    last = data.draw(st.sampled_from(range(first + r, o + 1, r)))
    whole = changed(W, D, variant)
    assert torch.allclose(change_rows(W[first:last], D, variant, first, o), whole[first:last], rtol=1e-13)


@few
@given(cases(("bone", "mini")), st.sampled_from([torch.float64, torch.float32]), st.data())
def test_rows_written_at_once_are_bit_for_bit_those_of_the_change(case, dtype, data):
    variant, o, i, shape = case
    W, D = randn(o, i, dtype=dtype), randn(*shape, seed=1)
    first = data.draw(st.integers(0, o - 1))
    last = data.draw(st.integers(first + 1, o))
    out = torch.full_like(W, 7.0)[first:last]
    said = add_rows(out, W[first:last], D.to(dtype), first)
    want = change_rows(W[first:last], D.to(dtype), variant, first, o)
    assert torch.equal(out, want if said else torch.full_like(out, 7.0)) and said == (i % len(D) == 0)


@few
@given(cases())
def test_the_number_of_parameters_is_that_of_the_block(case):
    variant, o, i, shape = case
    r = shape[0] if variant in ADDED else shape[-1]
    mini_r = shape[1] if variant == "mini" else None
    tiles = tuple(shape[:2]) if variant == "bone_free" else (1, 1)
    assert block_shape(variant, o, i, r, mini_r, tiles) == shape
    formula = {"bone": r * o, "bone_out": r * i, "mini": r * (mini_r or 0), "bat": r * o, "bat_row": r * i,
               "bat_left": r * o, "bone_free": tiles[0] * tiles[1] * r * r}
    assert n_parameters(variant, o, i, r, mini_r, tiles) == formula[variant]


def test_the_paper_counts_of_parameters():
    """LLaMA2-7B, seven modules, r = 64: 87.03 M for bone and bat, 72.88 M for bat_row and bone_out."""
    h, f = 4096, 11008
    modules = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
    total = {v: 32 * sum(n_parameters(v, o, i, 64) for o, i in modules)
             for v in ("bone", "bat", "bat_row", "bone_out")}
    assert total == {"bone": 87_031_808, "bat": 87_031_808, "bat_row": 72_876_032, "bone_out": 72_876_032}


# ------------------------------------------------------------------ algebra


@few
@given(cases())
def test_two_changes_in_turn_are_one_composed_change(case):
    variant, o, i, shape = case
    W, first, second = randn(o, i), randn(*shape, seed=1), randn(*shape, seed=2)
    if variant == "bat_left" and i % shape[-1]:  # a cut block has no square identity
        return
    turns = changed(changed(W, first, variant), second, variant)
    once = changed(W, compose(first, second, variant), variant)
    assert torch.allclose(once, turns, rtol=1e-10, atol=1e-10)


@few
@given(cases())
def test_the_inverse_undoes_a_change(case):
    variant, o, i, shape = case
    if variant == "bat_left" and i % shape[-1]:
        return
    W, D = randn(o, i), 0.2 * randn(*shape, seed=1)
    assert torch.allclose(restored(changed(W, D, variant), D, variant), W, rtol=1e-9, atol=1e-9)
    assert torch.allclose(compose(D, inverse(D, variant), variant), torch.zeros_like(D), atol=1e-11)


@pytest.mark.parametrize("variant", GUIDED)
def test_a_block_without_a_usable_inverse_is_refused(variant):
    r = SHAPES[variant][-1]
    B = torch.zeros(SHAPES[variant], dtype=torch.float64)
    B[..., 0, 0] = -1 + 1e-6
    with pytest.raises(ConfigError, match=r"I \+ B has the condition number 1.0e\+06, allowed is 1e\+04"):
        restored(randn(2 * r, 3 * r), B, variant)
    B[..., 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="condition number nan"):
        inverse(B, variant)


@few
@given(cases(), st.floats(-2, 2), st.floats(-2, 2))
def test_a_combination_is_the_weighted_sum_of_changes(case, a, b):
    variant, o, i, shape = case
    W, first, second = randn(o, i), randn(*shape, seed=1), randn(*shape, seed=2)
    want = a * delta(W, first, variant) + b * delta(W, second, variant)
    assert torch.allclose(delta(W, combine([first, second], [a, b]), variant), want, rtol=1e-10, atol=1e-10)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="2 blocks and 1 weights"):
        combine([randn(2, 3), randn(2, 3)], [1.0])
    with pytest.raises(ConfigError, match=r"shapes \(2, 3\), \(3, 2\) cannot be combined"):
        combine([randn(2, 3), randn(3, 2)], [1.0, 1.0])
    with pytest.raises(ConfigError, match="cannot be composed"):
        compose(randn(2, 3), randn(3, 2))
    for wrong, words in (((3, 7), r"does not fit a weight of shape \(6, 8\), which has \(3, 6\)"),
                         ((2, 4, 4), "it has 2 dimensions"), ((9, 6), "r=9 must lie between 1 and the 8 "
                                                                      "inputs")):
        with pytest.raises(ConfigError, match=words):
            delta(randn(6, 8), randn(*wrong))
    with pytest.raises(ConfigError, match="variant='bat_up' is not allowed"):
        delta(randn(6, 8), randn(2, 6), "bat_up")


def test_column_row_and_left_are_three_methods_even_on_square_weights():
    W, B = randn(8, 8), randn(2, 4, 4, seed=1)
    column, row, left = (delta(W, B, v) for v in ("bat", "bat_row", "bat_left"))
    assert all(float((a - b).abs().max()) > 0.1 for a, b in ((column, row), (column, left), (row, left)))
    # the column form of the transposed weight acts from the left, with its matrices transposed
    parts = [B[a].T @ W[:, 4 * a: 4 * a + 4].unflatten(0, (2, 4)) + B[a].T for a in range(2)]
    turned = torch.cat(parts, -1)
    assert torch.allclose(delta(W.T, B, "bat").T, turned.flatten(0, 1), rtol=1e-12)


def test_bat_without_its_product_with_the_weight_is_bone():
    """D[:, a r + q] = B[a][q, :]."""
    B = randn(3, 4, 4)
    added = delta(torch.zeros(12, 8, dtype=torch.float64), B, "bat")
    assert torch.equal(added, delta(torch.zeros(12, 8, dtype=torch.float64), B.flatten(0, 1).T))


def test_one_tile_in_each_direction_makes_bone_free_the_column_or_the_row_form():
    W, B = randn(12, 8), randn(3, 4, 4, seed=1)
    assert torch.allclose(delta(W, B[:, None], "bone_free"), delta(W, B, "bat"), rtol=1e-13)
    assert torch.allclose(delta(W, B[None, :2], "bone_free"), delta(W, B[:2], "bat_row"), rtol=1e-13)


@few
@given(st.integers(1, 40), st.integers(1, 40))
def test_shards_split_the_outputs_as_torch_does(o, n):
    n = min(n, o)
    sizes = [len(part) for part in torch.arange(o).tensor_split(n)]
    assert shards(o, n).bincount(minlength=n).tolist() == sizes
    assert shards(o, n).tolist() == sorted(shards(o, n).tolist())


# ------------------------------------------------------------------ LoRA


@few
@given(cases(ADDED))
def test_an_added_change_is_exactly_a_lora(case):
    variant, o, i, shape = case
    W, D = randn(o, i), randn(*shape, seed=1)
    A, B, error = to_lora(W, D, variant)
    assert error == 0.0 and A.shape == (len(D), i) and B.shape == (o, len(D))
    assert torch.allclose(B @ A, delta(W, D, variant), rtol=1e-13, atol=1e-13)
    rank = int(torch.linalg.matrix_rank(delta(W, D, variant)))
    assert rank <= (min(shape) if variant == "mini" else len(D))


@pytest.mark.parametrize("variant", GUIDED)
def test_a_guided_change_is_a_lora_with_the_error_that_is_said(variant):
    W, B = randn(16, 24), randn(*SHAPES[variant], seed=1)
    change = delta(W, B, variant)
    for rank in (1, 5, 16):
        left, right, error = to_lora(W, B, variant, rank)
        kept = right @ left
        assert left.shape == (rank, 24) and right.shape == (16, rank)
        assert error == pytest.approx(float((change - kept).norm() / change.norm()), abs=1e-7)
    assert error < 1e-7 and torch.linalg.matrix_rank(change) == 16
    with pytest.raises(ConfigError, match="has full rank: give the rank"):
        to_lora(W, B, variant)


def test_a_lora_of_lower_rank_than_the_block_keeps_the_largest_directions():
    W, D = randn(16, 24), randn(5, 16, seed=1)
    A, B, error = to_lora(W, D, "bone", rank=2)
    change = delta(W, D)
    best = torch.linalg.svdvals(change)
    assert error == pytest.approx(float(best[2:].norm() / best.norm()), rel=1e-6)
    assert float((change - B @ A).norm() / change.norm()) == pytest.approx(error, rel=1e-6)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_block_of_zeros_changes_no_bit(variant, dtype):
    W = randn(16, 24, dtype=dtype)
    D = torch.zeros(SHAPES[variant], dtype=torch.promote_types(dtype, torch.float32))
    assert torch.equal(changed(W, D, variant), W)
    assert not delta(W, D, variant).any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_is_changed_in_fp32_and_rounded_once(variant, dtype):
    W, D = randn(16, 24, dtype=dtype), 0.1 * randn(*SHAPES[variant], seed=1, dtype=torch.float32)
    exact = W.double() + loops(W.double(), D.double(), variant)
    ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert bool(((changed(W, D, variant).double() - exact).abs() <= 0.5 * ulp + 1e-6).all())
    assert delta(W, D, variant).dtype == torch.float32
