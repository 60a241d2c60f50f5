"""A language model in memory behind the contract `Served`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, RunError
from poise.interfaces import Tokenizer
from poise.models.decoding import Source, Step, check_decoder, check_prompt, generate, sampling, stream

MOST_CONTEXT = 4096  # where a model allows more, and nobody asks for it


class InMemory:
    """Serve a transformers model, causal or encoder-decoder, that is wholly in memory.

    Parameters
    ----------
    model : nn.Module
        With a `config`; it is put into evaluation.
    tokenizer : Tokenizer, optional
        For prompts that are text.
    context : int, optional
        Most tokens of prompt and continuation; the smaller of the configuration's and 4,096.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer | None = None, context: int | None = None
    ) -> None:
        self.model: Any = model.eval()
        config = self.model.config
        self.source = Source(self._start, config.vocab_size, context or context_of(config),
                             ends_of(self.model), tokenizer)
        self._made, self._closed = 0, False

    @torch.no_grad()
    def logits(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        """Return logits (batch, time, vocab)."""
        self._open()
        check_prompt(self.source, input_ids)
        more = check_decoder(self.source, decoder_input_ids, self.model.config.is_encoder_decoder)
        return self.model(input_ids=input_ids, use_cache=False, **more).logits

    def generate(self, prompt: Tensor | str, max_new_tokens: int, **options: Any) -> Tensor | str:
        """Return the prompt and its continuation."""
        self._open()
        return generate(self.source, prompt, sampling(max_new_tokens, options))

    def stream(self, prompt: Tensor | str, max_new_tokens: int, **options: Any) -> Iterator[Any]:
        """Yield the continuation as it is made."""
        self._open()
        return stream(self.source, prompt, sampling(max_new_tokens, options))

    def stats(self) -> dict[str, Any]:
        """Return how many tokens were fed."""
        self._open()
        return {"tokens": self._made}

    def close(self) -> None:
        """Let go of the model."""
        self._closed, self.model = True, None

    def __enter__(self) -> InMemory:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        if self._closed:
            raise RunError("the model is closed: open it again")

    def _start(self, prompt: Tensor) -> tuple[Tensor, Step]:
        first, step = steps(self.model, prompt)

        def counted(ids: Tensor) -> Tensor:
            self._open()
            self._made += ids.numel()
            return step(ids)

        return first, counted


@torch.no_grad()
def steps(
    model: Any, prompt: Tensor, forward: Callable[..., Any] | None = None, chunk: int | None = None,
    cache: Any = None,
) -> tuple[Tensor, Step]:
    """Return the tokens that generation begins with, and a step with a cache of its own.

    Parameters
    ----------
    forward : callable, optional
        Called with a module and its inputs, in place of calling the module.
    chunk : int, optional
        Most tokens that are fed at a time.
    cache : object, optional
        Empty, for keys and values; the model's own without one.
    """
    kept: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    call = forward or (lambda module, **inputs: module(**inputs))
    seq2seq = model.config.is_encoder_decoder
    if seq2seq:
        kept["encoder_outputs"] = call(model.get_encoder(), input_ids=prompt)
        first = model.config.decoder_start_token_id
        prompt = prompt.new_full((len(prompt), 1), model.config.pad_token_id if first is None else first)
    name = "decoder_input_ids" if seq2seq else "input_ids"
    if not seq2seq:
        kept["logits_to_keep"] = 1  # those of a whole prompt would take more room than all else

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        for part in ids.split(chunk or ids.shape[1], 1):
            out = call(model, **{name: part}, use_cache=True, **kept)
            kept["past_key_values"] = out.past_key_values
        return out.logits[:, -1]

    return prompt, step


def context_of(config: Any) -> int:
    """Return the longest sequence of a configuration, at most `MOST_CONTEXT`."""
    given = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return min(given or MOST_CONTEXT, MOST_CONTEXT)


def ends_of(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a text: the generation configuration's, or the model's."""
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    ends = list(end) if isinstance(end, (list, tuple)) else [] if end is None else [end]
    if bad := [e for e in ends if isinstance(e, bool) or not isinstance(e, int)]:
        raise ConfigError(f"eos_token_id={bad[0]!r} is no token: mend generation_config.json")
    return tuple(ends)
