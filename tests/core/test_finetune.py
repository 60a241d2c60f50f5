"""Fine-tuning: completions alone bear loss, packing keeps examples apart, greedy is greedy."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.config import Train
from poise.errors import DataError
from poise.interfaces import Arrays, Example, Parts, Splits
from poise.models.components import CausalLM
from poise.models.tokenizers import ByteTokenizer
from poise.recipes import finetune
from poise.recipes.components import Classify, Finetune
from poise.recipes.finetune import (
    IGNORE,
    FinetuneTask,
    attention_mask,
    encode,
    exact_match,
    greedy,
    held_out_loss,
    last_number,
    pack,
    token_losses,
)
from poise.recipes.loop import Order, build_optimizer, fit
from poise.runs.context import RunContext

BYTES, EOS = ByteTokenizer(), 256
EXAMPLES = [
    Example("2 + 2 = ", "4"), Example("The sun ", "rises in the east."), Example("", "Plain text."),
    Example("a", "b"), Example("Count: ", "1 2 3 4 5 6 7 8 9"),
]
few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def llama(name="LlamaForCausalLM"):
    torch.manual_seed(0)
    model = CausalLM(architecture=name, hidden_size=16, context=128).build().eval()
    for p in model.parameters():  # far from uniform, so that a wrong mask shows
        p.data.mul_(3)
    return model


# ------------------------------------------------------------------ labels


def test_the_loss_is_on_the_completion_and_its_end_only():
    ((ids, labels),) = encode(Example("ab", "cd"), BYTES, 8)
    assert ids == [97, 98, 99, 100, EOS]
    assert labels == [IGNORE, IGNORE, 99, 100, EOS]


@pytest.mark.parametrize(("length", "ids", "labels"), [
    (5, [97, 98, 99, 100, EOS], [IGNORE, IGNORE, 99, 100, EOS]),
    (4, [97, 98, 99, 100], [IGNORE, IGNORE, 99, 100]), (3, [97, 98, 99], [IGNORE, IGNORE, 99]),
])
def test_a_long_example_is_cut_at_its_end(length, ids, labels):
    assert encode(Example("ab", "cd"), BYTES, length) == [(ids, labels)]


@pytest.mark.parametrize("length", [1, 2])
def test_an_example_whose_prompt_fills_the_row_is_left_out(length):
    assert encode(Example("ab", "cd"), BYTES, length) == []


def test_plain_text_is_cut_into_pieces_and_a_lone_last_token_is_dropped():
    assert [p for p, _ in encode(Example("", "abcdefg"), BYTES, 3)] == [[97, 98, 99], [100, 101, 102]]
    pieces = encode(Example("", "abcdefgh"), BYTES, 3)
    assert [len(p) for p, _ in pieces] == [3, 3, 2] and all(p == m for p, m in pieces)


def test_examples_without_anything_to_learn_are_refused():
    for empty in ([], [Example("", "")], [Example("long prompt", "x")], [Example("", "a")]):
        with pytest.raises(DataError, match=f"none of {len(empty)} examples .* raise recipe.length"):
            pack(empty, BYTES, 8, True)


# ------------------------------------------------------------------ packing


TEXTS = st.lists(st.builds(Example, st.text("ab", max_size=6), st.text("cd", min_size=2, max_size=12)),
                 min_size=1, max_size=12)


@few
@given(TEXTS, st.integers(8, 20), st.booleans())
def test_packing_loses_and_repeats_nothing(examples, length, packing):
    pieces = [p for e in examples for p in encode(e, BYTES, length)]
    rows = pack(examples, BYTES, length, packing)
    found = []
    for ids, labels, positions, segments in zip(
        rows.ids, rows.labels, rows.positions, rows.segments, strict=True
    ):
        for s in range(1, int(segments.max()) + 1):
            span = (segments == s).nonzero().flatten()
            assert span.tolist() == list(range(int(span[0]), int(span[-1]) + 1))
            assert positions[span].tolist() == list(range(len(span)))
            assert labels[span[0]] == IGNORE
            found.append((ids[span].tolist(), labels[span[1:]].tolist()))
        assert (labels[segments == 0] == IGNORE).all()
    assert sorted(found) == sorted((ids, marks[1:]) for ids, marks in pieces)
    assert rows.ids.shape[1] == length
    assert packing or len(rows) == len(pieces)


def test_packing_is_first_fit_in_the_given_order():
    sizes = [6, 5, 4, 2, 3]
    rows = pack([Example("", "x" * n) for n in sizes], BYTES, 10, True)
    assert [[int((s == k).sum()) for k in range(1, int(s.max()) + 1)] for s in rows.segments] == [
        [6, 4], [5, 2, 3]]


def test_rows_are_cut_to_their_longest_content():
    rows = pack(EXAMPLES, BYTES, 40, False)
    short = rows.rows(torch.tensor([0, 3]))
    assert short.ids.shape == (2, 10) and short.segments.shape == (2, 10)
    assert short.ids[0].tolist() == [*b"2 + 2 = 4", EOS]


def test_a_token_sees_its_own_segments_past_only():
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    mask = attention_mask(segments, torch.float32)
    assert mask.shape == (1, 1, 5, 5)
    assert (mask[0, 0] == 0).tolist() == [
        [True, False, False, False, False], [True, True, False, False, False],
        [False, False, True, False, False], [False, False, True, True, False],
        [False, False, False, False, True]]
    assert mask[mask != 0].unique().tolist() == [torch.finfo(torch.float32).min]
    assert attention_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.float32) is None


# ------------------------------------------------------------------ losses


def by_hand(model, example):
    """Sum of -log p over the completion, one token at a time."""
    ((ids, labels),) = encode(example, BYTES, 64)
    total = 0.0
    for t in range(1, len(ids)):
        if labels[t] != IGNORE:
            logits = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1]
            total -= float(logits.log_softmax(-1)[ids[t]])
    return total


@torch.no_grad()
def test_the_loss_is_the_completions_surprise():
    model = llama()
    for example in EXAMPLES:
        rows = pack([example], BYTES, 64, False)
        assert float(token_losses(model, rows)) == pytest.approx(by_hand(model, example), rel=1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"])
@torch.no_grad()
def test_packed_rows_lose_what_separate_rows_lose(name):
    model = llama(name)
    together, apart = pack(EXAMPLES, BYTES, 64, True), pack(EXAMPLES, BYTES, 64, False)
    assert len(together) < len(apart)
    want = sum(float(token_losses(model, apart.rows(torch.tensor([i])))) for i in range(len(apart)))
    assert float(token_losses(model, together)) == pytest.approx(want, rel=1e-5)


def test_packed_rows_have_the_gradient_of_separate_rows():
    model = llama()
    token_losses(model, pack(EXAMPLES, BYTES, 64, True)).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    token_losses(model, pack(EXAMPLES, BYTES, 64, False)).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(together[name], p.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_held_out_loss_is_a_mean_over_tokens_whatever_the_batch(batch_size):
    model = llama()
    rows = pack(EXAMPLES, BYTES, 64, False)
    tokens = int((rows.labels != IGNORE).sum())
    assert tokens == 2 + 19 + 10 + 2 + 18
    with torch.no_grad():
        want = sum(by_hand(model, e) for e in EXAMPLES) / tokens
    assert held_out_loss(model, rows, batch_size, "cpu") == pytest.approx(want, rel=1e-5)


@torch.no_grad()
def test_logits_are_compared_in_fp32():
    model = llama().to(torch.bfloat16)
    rows = pack(EXAMPLES, BYTES, 64, False)
    logits = model(input_ids=rows.ids).logits[:, :-1]
    kept = rows.labels[:, 1:] != IGNORE
    want = F.cross_entropy(logits[kept].float(), rows.labels[:, 1:][kept], reduction="sum")
    loss = token_losses(model, rows)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(want), rel=1e-3)


def test_two_parts_are_one_batch_whatever_their_tokens():
    """Rows bear 1 to 18 targets: the mean is over tokens, and the parts of a step are different rows."""
    rows = pack([*EXAMPLES, Example("3 + 4 = ", "7, which is odd"), Example("x", "yz")], BYTES, 64, False)
    found = []
    for batch_size, accumulate in ((6, 1), (3, 2), (2, 3), (1, 6)):
        model = llama().train()
        task = FinetuneTask(model, rows, rows, Order(len(rows), batch_size, 3), accumulate, "cpu")
        train = Train(steps=4, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", lr=0.05,
                      eval_every=0, checkpoint_every=0)
        fit(task, build_optimizer(train, model), train, quiet=True)
        found.append(dict(model.named_parameters()))
    with torch.no_grad():
        by_token = held_out_loss(model, rows, 2, "cpu")
        assert float(task.loss(rows)) == pytest.approx(by_token, rel=1e-5)
        by_row = sum(held_out_loss(model, rows.rows(torch.tensor([i])), 1, "cpu") for i in range(len(rows)))
    assert by_token != pytest.approx(by_row / len(rows), rel=1e-2)  # the two means are not the same here
    for other in found[1:]:
        for name, p in found[0].items():
            assert torch.allclose(other[name], p, rtol=1e-3, atol=1e-5), name


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("prompt", ["The", "2 + 2 = ", "x"])
@torch.no_grad()
def test_greedy_is_transformers_greedy(prompt):
    model = llama()
    ids = torch.tensor([BYTES.encode(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                         eos_token_id=EOS, pad_token_id=0)
    want = out[0, ids.shape[1]:].tolist()
    raw = SimpleNamespace(encode=BYTES.encode, decode=list, eos_id=EOS)
    assert greedy(model, raw, prompt, 20) == [t for t in want if t != EOS]
    assert len(want) > 3
    stop = next(t for t in want if t != want[0])  # ends at, and without, the end token
    raw.eos_id = stop
    assert greedy(model, raw, prompt, 20) == want[: want.index(stop)]


@pytest.mark.parametrize(("text", "number"), [
    ("The answer is 42.", "42"), ("1,234,567 dollars", "1234567"), ("3.50", "3.5"), ("2.0", "2"),
    ("100", "100"), ("-7", "-7"), ("first 5, then 6", "6"), ("none", ""), ("", ""), ("0.25!", "0.25"),
    ("#### 1,000.50\n", "1000.5"), ("5 apples, 6, and 7,", "7"), ("12 - 5 = 7", "7"),
])
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_exact_match_compares_last_numbers(monkeypatch, tmp_path):
    answers = iter(["so it is 1,000.", "it is 7", "no idea", "-3.0"])
    monkeypatch.setattr(finetune, "greedy", lambda *_: next(answers))
    examples = [Example("?", "x", "1000"), Example("?", "x", "8"), Example("?", "5"),
                Example("?", "in all -3")]
    context = RunContext(tmp_path, quiet=True)
    assert exact_match(llama(), BYTES, examples, Finetune(), context) == 0.5


# ------------------------------------------------------------------ the whole recipe


class Sums:
    def load(self, seed=0):
        made = [Example(f"{a}+{b}=", str(a + b), str(a + b)) for a in range(5) for b in range(5)]
        return Splits(made[:20], made[20:22], made[22:], {"source": "here"})


def test_the_recipe_learns_and_leaves_a_model_that_scores_the_same(tmp_path):
    context = RunContext(tmp_path, quiet=True)
    context.records.open()
    train = Train(steps=30, batch_size=8, lr=1e-2, eval_every=0, checkpoint_every=0)
    model = CausalLM(architecture="LlamaForCausalLM", hidden_size=16)
    parts = Parts(data=Sums(), model=model, train=train)
    metrics = Finetune(length=16, generate=2, new_tokens=4).run(parts, context)
    context.records.close()
    assert metrics["loss_after"] < 0.7 * metrics["loss_before"]
    assert context.records.notes["data"] == {"source": "here"}
    again = CausalLM(path=str(tmp_path / "folded"))
    for split, name in (("validation", "loss_after"), ("test", "test_loss")):
        rows = pack(getattr(Sums().load(), split), again.tokenizer(), 16, False)
        loss = held_out_loss(again.build(), rows, 8, "cpu")
        assert loss == pytest.approx(metrics[name], rel=1e-6), name


def recorded(directory):
    return [(r["step"], r["name"], r["value"]) for r in map(json.loads, open(directory / "metrics.jsonl"))
            if not r["name"].endswith("seconds")]


def test_nothing_before_the_end_depends_on_test_rows(tmp_path):
    """The same run with other test rows: the same records and weights; another test loss."""
    train = Train(steps=6, batch_size=4, lr=1e-2, eval_every=2, checkpoint_every=2)
    metrics = []
    for name, answer in (("a", "7"), ("b", "9")):
        data = SimpleNamespace(load=lambda seed, answer=answer: replace(
            Sums().load(), test=[Example("1+1=", answer, answer)] * 3))
        context = RunContext(tmp_path / name, quiet=True)
        context.records.open()
        model = CausalLM(architecture="LlamaForCausalLM", hidden_size=16)
        parts = Parts(data=data, model=model, train=train)
        metrics.append(Finetune(length=16).run(parts, context))
        context.records.close()
    assert recorded(tmp_path / "a") == recorded(tmp_path / "b")
    assert metrics[0].pop("test_loss") != metrics[1].pop("test_loss")
    for m in metrics:
        m.pop("step_seconds")
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("recipe", [Finetune(length=16), Classify()], ids=["finetune", "classify"])
def test_a_split_without_rows_is_refused(recipe, split, tmp_path):
    empty = [] if isinstance(recipe, Finetune) else Arrays(np.zeros((0, 3)), np.zeros(0, np.int64))
    some = Sums().load() if isinstance(recipe, Finetune) else Splits(
        *[Arrays(np.zeros((4, 3)), np.zeros(4, np.int64))] * 3, {}, {"input_shape": [3], "n_classes": 2})
    data = SimpleNamespace(load=lambda seed: replace(some, **{split: empty}))
    parts = Parts(data=data, model=CausalLM(architecture="LlamaForCausalLM", hidden_size=16),
                  train=Train(steps=1), names={"data": "mine"})
    context = RunContext(tmp_path, quiet=True)
    context.records.open()
    with pytest.raises(DataError, match=f"data=mine gives no {split} rows.* raise data.{split}"):
        recipe.run(parts, context)
