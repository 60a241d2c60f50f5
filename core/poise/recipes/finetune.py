"""Adapt or train a causal language model on prompts and completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.config import Train
from poise.errors import ConfigError, DataError
from poise.interfaces import Example, Parts, Tokenizer
from poise.recipes.loop import Order, build_optimizer, fit
from poise.recipes.prepare import (
    evaluating,
    finish,
    folded_weights,
    keep_adapter,
    load_splits,
    observed,
    prepare,
    sizes,
)
from poise.runs.context import RunContext

IGNORE = -100  # the label of positions that bear no loss


@dataclass(frozen=True)
class Sequences:
    """Tokenized rows of equal length.

    Parameters
    ----------
    ids, labels, positions, segments : int64, shape (rows, time)
        Labels are the ids where the loss is taken and `IGNORE` elsewhere; positions count from 0
        in each segment; segment 0 is padding.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Sequences:
        """Return some rows, cut to their longest content."""
        used = int((self.segments[index] > 0).sum(-1).max())
        return Sequences(*(t[index, :used] for t in (
            self.ids, self.labels, self.positions, self.segments)))


def encode(example: Example, tokenizer: Tokenizer, length: int) -> list[tuple[list[int], list[int]]]:
    """Return (ids, labels) pieces of at most `length` tokens; text without prompt is cut in pieces.

    An example with a prompt is one piece, cut at its end; its completion ends with the end token.
    """
    prompt = tokenizer.encode(example.prompt) if example.prompt else []
    completion = tokenizer.encode(example.completion)
    if prompt:
        ids = (prompt + completion + [tokenizer.eos_id])[:length]
        labels = ([IGNORE] * len(prompt) + ids[len(prompt):])[: len(ids)]
        return [(ids, labels)] if any(x != IGNORE for x in labels) else []
    pieces = [completion[i : i + length] for i in range(0, len(completion), length)]
    return [(p, list(p)) for p in pieces if len(p) > 1]


def pack(
    examples: Sequence[Example], tokenizer: Tokenizer, length: int, packing: bool
) -> Sequences:
    """Tokenize examples into rows; with packing, first-fit in the given order.

    Raises
    ------
    DataError
        When no example leaves a token to learn from.
    """
    pieces = [p for e in examples for p in encode(e, tokenizer, length)]
    if not pieces:
        raise DataError(
            f"none of {len(examples)} examples leaves a token to learn from within {length} tokens: "
            f"raise recipe.length, or give longer text"
        )
    rows: list[list[tuple[list[int], list[int]]]] = []
    room: list[int] = []
    for piece in pieces:
        size = len(piece[0])
        fit_at = next((i for i in range(max(0, len(rows) - 16), len(rows)) if room[i] >= size), None)
        if packing and fit_at is not None:
            rows[fit_at].append(piece)
            room[fit_at] -= size
        else:
            rows.append([piece])
            room.append(length - size)
    return _tensors(rows, length)


def _tensors(rows: list[list[tuple[list[int], list[int]]]], length: int) -> Sequences:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    for r, pieces in enumerate(rows):
        at = 0
        for s, (piece, marks) in enumerate(pieces, start=1):
            span = slice(at, at + len(piece))
            ids[r, span], labels[r, span] = torch.tensor(piece), torch.tensor(marks)
            labels[r, at] = IGNORE  # the first token of a segment is predicted from nothing
            positions[r, span] = torch.arange(len(piece))
            segments[r, span] = s
            at += len(piece)
    return Sequences(ids, labels, positions, segments)


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the additive mask (batch, 1, time, time) that keeps segments apart; None when the
    ordinary causal mask does (one segment in every row, padding only at its end)."""
    if int(segments.max()) <= 1:
        return None
    time = segments.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    allowed = (causal & same)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min)


def token_losses(model: nn.Module, rows: Sequences) -> Tensor:
    """Return the summed loss over labelled tokens."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if torch.is_autocast_enabled(rows.ids.device.type):
        dtype = torch.get_autocast_dtype(rows.ids.device.type)
    mask = attention_mask(rows.segments, dtype)
    extra = {} if mask is None else {"attention_mask": mask, "position_ids": rows.positions}
    logits = model(input_ids=rows.ids, use_cache=False, **extra).logits
    targets = rows.labels[:, 1:]
    kept = targets != IGNORE
    # logits are taken in fp32, and only where there is something to predict
    return F.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="sum")


class FinetuneTask:
    """Mean loss per completion token."""

    def __init__(
        self, model: nn.Module, train: Sequences, held_out: Sequences, order: Order,
        accumulate: int, device: str, attached: Any = None,
    ) -> None:
        self.model, self.train, self.held_out = model, train, held_out
        self.order, self.accumulate, self.device, self.attached = order, accumulate, device, attached

    def rows(self, step: int, part: int) -> Tensor:
        return self.order.rows(step * self.accumulate + part)

    def batch(self, step: int, part: int) -> Sequences:
        return _to(self.train.rows(self.rows(step, part)), self.device)

    def size(self, batch: Sequences) -> int:
        return int((batch.labels[:, 1:] != IGNORE).sum())

    def loss(self, batch: Sequences) -> Tensor:
        return token_losses(self.model, batch) / self.size(batch)

    def evaluate(self) -> dict[str, float]:
        with evaluating(self.attached):
            loss = held_out_loss(self.model, self.held_out, self.order.batch_size, self.device)
        return {"validation_loss": loss, "perplexity": math.exp(min(loss, 50.0)), **observed(self.attached)}


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequences, batch_size: int, device: str) -> float:
    """Return the mean loss per labelled token."""
    total, tokens = 0.0, 0
    for index in torch.arange(len(rows)).split(batch_size):
        part = _to(rows.rows(index), device)
        total += float(token_losses(model, part))
        tokens += int((part.labels[:, 1:] != IGNORE).sum())
    return total / max(tokens, 1)


def _to(rows: Sequences, device: str) -> Sequences:
    if device == "cpu":
        return rows
    return Sequences(*(t.to(device) for t in (rows.ids, rows.labels, rows.positions, rows.segments)))


@torch.no_grad()
def greedy(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, new_tokens: int, device: str = "cpu"
) -> str:
    """Continue a prompt greedily, up to the end token."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    cache, made = None, []
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        token = int(out.logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        made.append(token)
        cache, ids = out.past_key_values, torch.tensor([[token]], device=device)
    return tokenizer.decode(made)


def last_number(text: str) -> str:
    """Return the last number of a text without thousands separators or trailing zeros."""
    import re

    found = re.findall(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    if not found:
        return ""
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(
    model: nn.Module, tokenizer: Tokenizer, examples: Sequence[Example], new_tokens: int,
    context: RunContext,
) -> float:
    """Return the share of examples whose greedy answer ends in the right number."""
    hits = 0
    with context.progress(len(examples), "answering") as bar:
        for e in examples:
            text = greedy(model, tokenizer, e.prompt, new_tokens, context.device)
            hits += last_number(text) == last_number(e.answer or e.completion)
            bar.advance()
    return hits / len(examples)


def run(
    parts: Parts, context: RunContext, *, length: int, packing: bool, eval_examples: int, generate: int,
    new_tokens: int, save_folded: bool,
) -> dict[str, float]:
    """Train, evaluate before and after, fold, save; see `Finetune`."""
    assert parts.data is not None and parts.train is not None and parts.model is not None
    splits = load_splits(parts, context)
    tokenizer = parts.model.tokenizer()  # type: ignore[attr-defined]
    if any(not e.prompt for e in splits.test[:generate]):
        raise ConfigError(
            f"recipe.generate={generate} needs data with prompts; "
            f"data={parts.names.get('data')} is plain text: write recipe.generate=0"
        )
    train = pack(splits.train, tokenizer, length, packing)
    validation, test = (pack(rows[:eval_examples], tokenizer, length, False)
                        for rows in (splits.validation, splits.test))
    model, attached = prepare(parts, context, splits.spec)
    order = Order(len(train), parts.train.batch_size, context.seed_for("order"))
    task = FinetuneTask(model, train, validation, order, parts.train.accumulate, context.device, attached)
    metrics = _train(parts.train, task, attached, context)
    with evaluating(attached):  # the test rows are looked at once, when nothing is left to choose
        metrics["test_loss"] = held_out_loss(model, test, order.batch_size, context.device)
    if generate:
        metrics["exact_match"] = exact_match(model, tokenizer, splits.test[:generate], new_tokens, context)
    finish(attached, context)
    keep_adapter(attached, context)
    if save_folded:
        keep_folded(model, attached, tokenizer, context)
    return metrics | sizes(model)


def _train(train: Train, task: FinetuneTask, attached: Any, context: RunContext) -> dict[str, float]:
    model = task.model.eval()
    if context.resume_from is None:
        before = task.evaluate()["validation_loss"]
        context.log(0, {"validation_loss": before})
    seconds = 0.0
    if train.steps:
        model.train()
        seconds = fit(task, build_optimizer(train, model, attached), train, context)
    model.eval()
    after = task.evaluate()["validation_loss"]
    return {"loss_before": _first_loss(context), "loss_after": after, "step_seconds": seconds}


def _first_loss(context: RunContext) -> float:
    """Return the validation loss before training, which a resumed run finds in its records."""
    from poise.runs.records import read_rows

    rows = read_rows(context.directory / "metrics.jsonl")
    return next(r["value"] for r in rows if r["step"] == 0 and r["name"] == "validation_loss")


def keep_folded(model: nn.Module, attached: Any, tokenizer: Tokenizer, context: RunContext) -> None:
    """Write a plain transformers directory, `folded/`."""
    from poise.models.causal_lm import save_model

    save_model(model, tokenizer, context.directory / "folded", folded_weights(model, attached))
