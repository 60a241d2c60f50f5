"""Text under a memory limit, and what every token took: the recipe `edgemoe_generate`."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.files import write_text
from poise.interfaces import Parts
from poise_edgemoe.bits import mean_loss, text_windows
from poise_edgemoe.budget import status_bytes
from poise_edgemoe.engine import Engine
from poise_edgemoe.plots import token_time

Row = dict[str, Any]


def run(
    parts: Parts, context: Any, *, prompts: int, prompt_length: int, max_new_tokens: int,
    temperature: float | None, length: int, windows: int, compare: bool,
) -> dict[str, float]:
    """Generate, measure, compare; see `EdgeMoEGenerate`."""
    model: Any = parts.model
    assert parts.data is not None
    splits, tokens = parts.data.load(context.seed), model.tokenizer()
    context.note("data", splits.provenance)
    asked = text_windows(splits.test, tokens, prompt_length - 1, prompts)
    batch = text_windows(splits.test, tokens, length, windows)
    per_byte = tokens_per_byte(splits.test, tokens)
    how = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    with model.build(splits.spec) as engine:
        print(engine.opening(), file=sys.stderr, flush=True)
        watched = forget_peak()
        rows, texts, answers = [], [], []
        with context.progress(prompts * max_new_tokens, "tokens") as bar:
            for n, ids in enumerate(asked):
                seed = {"seed": context.seed_for(f"prompt {n}")} if how else {}
                made = continued(engine, ids[None], max_new_tokens, how | seed, bar.advance)
                rows += [{"prompt": n, **row} for row in calls(engine, prompt_length, len(made))]
                answers.append(engine.stats()["planes"])
                texts.append((tokens.decode(ids.tolist()), tokens.decode(made)))
        peak = peak_bytes() if watched else None
        decodes = answers[-1] is not None and answers[-1]["allowed"] > 0
        loss = per_byte * held_out(token_by_token(engine) if decodes else engine.logits, batch, context)
        metrics = figures(rows) | {"loss": loss} | memory(engine, peak) | from_bases(answers, context)
    metrics |= _compared(model, engine, batch, per_byte, loss, context) if compare else {}
    context.note("what it took", [{"what": name, "value": value} for name, value in metrics.items()])
    _write(context.directory, rows, texts)
    token_time([r for r in rows if r["prompt"] == 0], _title(metrics),
               context.directory / "figures" / "token_time.png")
    return metrics


def continued(
    engine: Engine, ids: Tensor, new: int, how: Mapping[str, Any], advance: Callable[[], None]
) -> list[int]:
    """Return the tokens that follow ids (1, time)."""
    made = []
    for token in engine.stream(ids, new, **how):
        made.append(int(token))
        advance()
    return made


def calls(engine: Engine, prompt: int, made: int) -> list[Row]:
    """Return what each call of the last generation took: the prompt's pieces, then a token each."""
    pieces = -(-prompt // engine.budget.chunk)
    steps = engine.stats()["steps"][-(pieces + made - 1):]  # the last token is fed to nobody
    return [{"part": "prompt" if n < pieces else "token", **step} for n, step in enumerate(steps)]


# ------------------------------------------------------------------ what is measured


def figures(rows: list[Row]) -> dict[str, float]:
    """Return the metrics of decoding, prompts left out but for the time of the first token."""
    decoded = [r for r in rows if r["part"] == "token"]
    total = {k: sum(r[k] for r in decoded) for k in decoded[0] if k not in ("prompt", "part")}
    first = sum(r["seconds"] for r in rows if r["part"] == "prompt")
    return {
        "machine/tokens_per_second": total["tokens"] / total["seconds"],
        "hit_rate": total["hits"] / (total["hits"] + total["misses"]),
        "bytes_per_token": total["bytes_read"] / total["tokens"],
        "machine/stall_share": total["stall_seconds"] / total["seconds"],
        "machine/major_faults_per_token": total["major_faults"] / total["tokens"],
        "machine/first_token_seconds": first / (1 + max(r["prompt"] for r in rows)),
    }


def memory(engine: Engine, peak: int | None) -> dict[str, float]:
    """Return the engine's budget, the store, and the process's peak beside what it may be."""
    budget = engine.stats()["memory"]["total"]
    found = {"memory_bytes": budget, "machine/base_bytes": engine.base,
             "store_bytes": sum(f["bytes"] for f in engine.index.files.values())}
    if peak is not None:
        found |= {"machine/peak_bytes": peak, "machine/grown_of_limit": (peak - engine.base) / budget}
    return {name: float(value) for name, value in found.items()}


def from_bases(answers: list[Any], context: Any) -> dict[str, float]:
    """Note what bases have served in each answer; return the share of uses, of a store with any."""
    if answers[-1] is None:
        return {}
    context.note("served from bases", [
        {"prompt": n, "uses": said["answer_uses"], "from_base": said["answer_from_base"],
         "share": said["answer_share"]} for n, said in enumerate(answers)])
    return {"base_share": answers[-1]["share"]}


def forget_peak() -> bool:
    """Have the process's peak begin anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the most that the process held since `forget_peak`."""
    return status_bytes("VmHWM")


def _compared(
    model: Any, engine: Engine, batch: Tensor, per_byte: float, loss: float, context: Any
) -> dict[str, float]:
    """Return the held-out loss of the model in memory, prompts cut into the same pieces."""
    plain = model.reference()
    if plain is None:
        return {}
    with plain:
        size = sum(p.nbytes for p in plain.model.parameters())
        chunk = engine.budget.chunk
        same = plain.logits if batch.shape[1] - 1 <= chunk else in_pieces(plain.model, chunk)
        other = per_byte * held_out(same, batch, context)
    return {"loss_in_memory": other, "loss_difference": loss - other, "in_memory_bytes": float(size)}


def held_out(logits_of: Callable[[Tensor], Tensor], batch: Tensor, context: Any) -> float:
    """Return the mean loss of windows (nats a token), one after the other, with progress."""
    with context.progress(len(batch), "held-out loss") as bar:

        def one(ids: Tensor) -> Tensor:
            bar.advance()
            return logits_of(ids)

        return mean_loss(one, batch, rows=1)


def token_by_token(engine: Engine) -> Callable[[Tensor], Tensor]:
    """Return a function from ids to logits that feeds one token at a time: bases serve no prompts."""

    def logits(ids: Tensor) -> Tensor:
        _, step = engine.source.start(ids[:, :1])
        return torch.stack([step(part) for part in ids.split(1, 1)], 1)

    return logits


def in_pieces(model: Any, chunk: int) -> Callable[[Tensor], Tensor]:
    """Return a function from ids to logits that feeds a model some tokens at a time."""

    def logits(ids: Tensor) -> Tensor:
        found, kept = [], None
        for part in ids.split(chunk, 1):
            out = model(input_ids=part, use_cache=True, past_key_values=kept)
            kept = out.past_key_values
            found.append(out.logits)
        return torch.cat(found, 1)

    return logits


def tokens_per_byte(examples: Any, tokens: Any) -> float:
    """Return how many tokens a byte of text takes: losses of a token times that are losses of a byte."""
    texts = [e.completion for e in examples]
    return sum(len(tokens.encode(t)) for t in texts) / sum(len(t.encode()) for t in texts)


# ------------------------------------------------------------------ what is written


def _write(folder: Path, rows: list[Row], texts: list[tuple[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "steps.csv", table.getvalue())
    parts = (f"--- prompt {n}\n{asked}\n--- continuation {n}\n{made}\n"
             for n, (asked, made) in enumerate(texts))
    write_text(folder / "text.txt", "\n".join(parts))


def _title(metrics: Mapping[str, float]) -> str:
    ms, stall = 1e3 / metrics["machine/tokens_per_second"], metrics["machine/stall_share"]
    of = metrics.get("in_memory_bytes")
    size = f", the model {of / 1e6:.1f} MB in memory" if of else ""
    return (f"A token takes {ms:.1f} ms, {stall:.0%} of it waiting for experts; {metrics['hit_rate']:.0%} "
            f"of them were there\n(limit {metrics['memory_bytes'] / 1e6:.1f} MB{size})")
