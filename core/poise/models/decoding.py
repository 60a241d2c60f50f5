"""Generation, one token after the other, for whatever can be fed tokens and says what comes next.

`tokens` knows nothing of models: a step takes the tokens (b, n) that follow those it was given before and
returns the logits (b, vocab) after the last of them. `generate` and `stream` put text around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, DataError
from poise.interfaces import Tokenizer
from poise.options import check_options, make, option

Step = Callable[[Tensor], Tensor]
BROKEN = "\ufffd"  # what decodes to this may become a letter with the next token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when generation ends."""

    max_new_tokens: int = option(help="most tokens that are made", low=1)
    do_sample: bool = option(False, "draw the next token; otherwise the likeliest is taken")
    temperature: float = option(1.0, "what logits are divided by before a draw", above=0)
    top_k: int | None = option(None, "draw from that many likeliest tokens", low=1)
    top_p: float | None = option(None, "draw from the likeliest tokens of this share", above=0, high=1)
    seed: int | None = option(None, "of the draws; null: of torch's own generator", low=0, high=2**63 - 1)
    stop: list[str] | None = option(None, "texts that end generation; they are left out of text")

    def __post_init__(self) -> None:
        check_options(self)
        if self.stop is not None and not all(self.stop):
            raise ConfigError("stop='' ends everything: leave it out, or give a text")
        given = [n for n in ("top_k", "top_p", "seed") if getattr(self, n) is not None]
        given += ["temperature"] if self.temperature != 1.0 else []
        if given and not self.do_sample:
            raise ConfigError(f"{given[0]}={getattr(self, given[0])} has no effect without do_sample=True: "
                              f"set it, or leave {given[0]} out")


@dataclass(frozen=True)
class Source:
    """What generation needs of a model.

    Parameters
    ----------
    start : callable
        From a prompt (b, t) to the tokens to begin with and a step; for a causal model the prompt itself.
    vocab : int
        Token ids are below it.
    context : int
        Most tokens of prompt and continuation together.
    end : tuple of int
        Tokens that end a text.
    tokenizer : Tokenizer or None
    """

    start: Callable[[Tensor], tuple[Tensor, Step]]
    vocab: int
    context: int
    end: tuple[int, ...]
    tokenizer: Tokenizer | None


# ------------------------------------------------------------------ the next token


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Return one token for each row of logits (b, vocab), shape (b,)."""
    if not sampling.do_sample:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    if not scaled.amax(-1).isfinite().all():  # a temperature near 0: the likeliest is drawn
        exact = logits.double()
        scaled = ((exact - exact.amax(-1, keepdim=True)) / sampling.temperature).float()
    kept = narrowed(scaled, sampling.top_k, sampling.top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)


def narrowed(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return logits (b, vocab) with -inf outside the k likeliest, then outside the share p.

    The likeliest token always stays; of the share's last one, all of it.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1)  # as transformers does: ties fall alike
        beyond = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        beyond[:, -1] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def tokens(
    prompt: Tensor, step: Step, sampling: Sampling, end: Sequence[int] = (),
    ended: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (b,), until all rows have ended or enough are made.

    A row that has ended repeats the first end token, or its last where there is none. `ended` tells of the
    tokens of a step which rows end with them for another reason.
    """
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(prompt.device).manual_seed(sampling.seed)
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    last, ends = prompt, torch.tensor(list(end), dtype=torch.long, device=prompt.device)
    for made in range(1, sampling.max_new_tokens + 1):
        new = next_tokens(step(last), sampling, generator)
        new = torch.where(done, ends[0] if end else last[:, -1], new)
        done |= torch.isin(new, ends)
        if ended is not None:
            done |= ended(new)
        yield new
        if done.all() or made == sampling.max_new_tokens:
            return
        last = new[:, None]


# ------------------------------------------------------------------ ids and text


def sampling(max_new_tokens: int, options: Mapping[str, Any]) -> Sampling:
    """Return how tokens are chosen, from what `generate` and `stream` were given.

    Raises
    ------
    ConfigError
        For an option that there is not, with the nearest; a wrong type, a value out of range.
    """
    return make(Sampling, {"max_new_tokens": max_new_tokens, **options}, "generate")


def generate(source: Source, prompt: Tensor | str, sampling: Sampling) -> Tensor | str:
    """Return the prompt and its continuation: ids (b, t + new) for ids (b, t), text for text."""
    if isinstance(prompt, str):
        return prompt + "".join(stream(source, prompt, sampling))
    ids, step = source.start(check_prompt(source, prompt, sampling))
    made = list(tokens(ids, step, sampling, source.end, _stops(source, sampling, len(ids))))
    return torch.cat([ids, torch.stack(made, 1)], 1)


def stream(source: Source, prompt: Tensor | str, sampling: Sampling) -> Iterator[Any]:
    """Yield what `generate` adds to the prompt as it is made: tokens (b,) for ids, pieces of text for text.

    Pieces are whole letters, and never a part of what may become a stop text.
    """
    if not isinstance(prompt, str):
        ids, step = source.start(check_prompt(source, prompt, sampling))
        return tokens(ids, step, sampling, source.end, _stops(source, sampling, len(ids)))
    if source.tokenizer is None:
        raise ConfigError("the model has no tokenizer: give token ids")
    try:
        words = source.tokenizer.encode(prompt)
    except UnicodeError:
        raise DataError("the prompt holds bytes that are no text: give it in UTF-8") from None
    if not words:
        raise DataError("the prompt is empty: give at least one token")
    ids, step = source.start(check_prompt(source, torch.tensor([words]), sampling))
    made = (int(new) for new in tokens(ids, step, sampling, source.end))
    wanted = (t for t in made if t not in source.end)
    return _until(_pieces(wanted, words, source.tokenizer), sampling.stop or [])


def check_prompt(source: Source, prompt: Tensor, sampling: Sampling | None = None) -> Tensor:
    """Return a prompt (b, t) of ids, or refuse it in words."""
    if not isinstance(prompt, Tensor):
        raise DataError(f"token ids are a tensor of whole numbers, not {type(prompt).__name__}")
    if prompt.dtype not in (torch.int64, torch.int32) or prompt.ndim != 2:
        raise DataError(f"token ids are whole numbers of shape (batch, time), not {prompt.dtype} of shape "
                        f"{tuple(prompt.shape)}")
    if not prompt.numel():
        raise DataError(f"the prompt of shape {tuple(prompt.shape)} is empty: give at least one token")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= source.vocab:
        raise DataError(f"token id {low if low < 0 else high} is out of range: ids lie in 0 .. "
                        f"{source.vocab - 1}")
    new = 0 if sampling is None else sampling.max_new_tokens
    if prompt.shape[1] + new > source.context:
        raise DataError(f"{prompt.shape[1]} tokens and {new} new ones exceed the context of "
                        f"{source.context}: shorten the prompt, or lower max_new_tokens")
    return prompt.long()


def check_decoder(source: Source, decoder_input_ids: Tensor | None, needed: bool) -> dict[str, Tensor]:
    """Return the decoder's ids as an argument, where the model has a decoder of its own, or refuse them."""
    if needed != (decoder_input_ids is not None):
        raise DataError("an encoder-decoder model needs decoder_input_ids too" if needed else
                        "the model has no decoder of its own: give input_ids only")
    return {} if decoder_input_ids is None else {
        "decoder_input_ids": check_prompt(source, decoder_input_ids)}


def _stops(source: Source, sampling: Sampling, rows: int) -> Callable[[Tensor], Tensor] | None:
    """Return what tells which rows' texts hold a stop text by now."""
    if not sampling.stop:
        return None
    if source.tokenizer is None:
        raise ConfigError("stop needs a tokenizer, and the model has none: leave it out")
    made: list[list[int]] = [[] for _ in range(rows)]
    # a token is a byte at least, and may be less than a letter
    window, decode = 4 * max(map(len, sampling.stop)) + 8, source.tokenizer.decode

    def ended(new: Tensor) -> Tensor:
        for row, token in zip(made, new.tolist(), strict=True):
            row.append(token)
        texts = [decode(row[-window:]) for row in made]
        return torch.tensor([any(s in t for s in sampling.stop or []) for t in texts], device=new.device)

    return ended


def _pieces(made: Iterator[int], before: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of tokens as they come, in whole letters; the rest at the end."""
    # some tokens before give the context in which a token is written (a space in front of it)
    known = list(before[-8:])
    said = len(tokenizer.decode(known))
    for token in made:
        known.append(token)
        text = tokenizer.decode(known)
        if len(text) > said and not text.endswith(BROKEN):
            yield text[said:]
            known = known[-8:]
            said = len(tokenizer.decode(known))
    if rest := tokenizer.decode(known)[said:]:
        yield rest


def _until(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """Yield text up to the first stop text, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((i for i in (held.find(s) for s in stop) if i >= 0), default=None)
        if found is not None:
            if held[:found]:
                yield held[:found]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep:]
    if held:
        yield held
