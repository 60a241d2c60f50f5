"""A small mixture-of-experts model, trained on the packaged speeches and cached."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.caches import cache_folder
from poise.config import Train
from poise.errors import FileError, require
from poise.files import load_bundle, save_bundle
from poise.recipes.loop import build_optimizer, fit
from poise.registry import build as build_component
from poise.runs.context import seed_for

RECIPE_VERSION = 1  # raise when a change makes cached weights stale
BALANCE = 0.02  # weight of Mixtral's load-balancing loss


def tokenizer() -> Any:
    """Return core's byte tokenizer."""
    from poise.models.tokenizers import ByteTokenizer

    return ByteTokenizer()


def untrained(
    *, layers: int, experts: int, top: int, hidden: int, inner: int, length: int, seed: int
) -> Any:
    """Return the model with random weights, from the seed; sizes as in `ByteMoE`."""
    transformers = require("transformers", "edgemoe")
    config = transformers.MixtralConfig(
        vocab_size=tokenizer().eos_id + 1, hidden_size=hidden,
        intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 24), head_dim=24,
        num_key_value_heads=max(1, hidden // 48), num_local_experts=experts,
        num_experts_per_tok=top, max_position_embeddings=4 * length,
        router_aux_loss_coef=BALANCE, sliding_window=None, bos_token_id=None,
        eos_token_id=tokenizer().eos_id, tie_word_embeddings=False,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        config.num_key_value_heads = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init"))
        return transformers.MixtralForCausalLM(config)


def build(*, steps: int, batch_size: int, lr: float, **sizes: int) -> Any:
    """Return the trained model; train and cache it the first time. Options as in `ByteMoE`."""
    options = {**sizes, "steps": steps, "batch_size": batch_size, "lr": lr}
    model = untrained(**sizes)
    stem = cache_folder("byte_moe") / cache_key(options)
    try:
        tensors, _ = load_bundle(stem)
        model.load_state_dict(tensors)
    except FileError as error:
        if stem.with_name(f"{stem.name}.json").exists():
            print(f"poise: the cached model is damaged and made again: {error}", file=sys.stderr)
        report = train(model, steps, batch_size, lr, sizes["length"], sizes["seed"])
        save_bundle(stem, model.state_dict(), {**options, **report})
    return model.eval()


def cache_key(options: Mapping[str, Any]) -> str:
    """Return a name that changes with every option, the recipe and the libraries that matter."""
    import transformers

    facts = [RECIPE_VERSION, dict(options), torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def train(
    model: Any, steps: int, batch_size: int, lr: float, length: int, seed: int
) -> dict[str, float]:
    """Train on the speeches' training split; return the bytes of a step."""
    splits = build_component("data", "sotu").load(0)
    stream = byte_stream(splits.train)
    task = _Bytes(model, stream, batch_size, length, seed)
    settings = Train(
        steps=steps, batch_size=batch_size, lr=lr, schedule="cosine",
        warmup=min(40, steps), clip=1.0, eval_every=0, checkpoint_every=0,
    )
    print(
        f"poise: training model=byte_moe once ({steps} steps, about a minute or two); "
        f"it is cached afterwards", file=sys.stderr, flush=True,
    )
    fit(task, build_optimizer(settings, model), settings, seed=seed)
    model.eval()
    return {"bytes_per_step": float(batch_size * length)}


def byte_stream(examples: Any) -> Tensor:
    """Return all completions as one tensor of bytes, separated by the end token."""
    tokens = tokenizer()
    joined: list[int] = []
    for e in examples:
        joined += tokens.encode(e.completion)
        joined.append(tokens.eos_id)
    return torch.tensor(joined)


class _Bytes:
    """Next-byte loss plus the router's balance loss, on random windows of a stream."""

    def __init__(
        self, model: nn.Module, stream: Tensor, batch_size: int, length: int, seed: int
    ) -> None:
        self.model, self.stream = model, stream
        self.batch_size, self.length, self.seed = batch_size, length, seed

    def batch(self, step: int, part: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_for(self.seed, f"window {step}"))
        last = len(self.stream) - self.length - 1
        starts = torch.randint(0, last, (self.batch_size,), generator=generator)
        return self.stream[starts[:, None] + torch.arange(self.length + 1)]

    def size(self, batch: Tensor) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)

    def loss(self, batch: Tensor) -> Tensor:
        out = self.model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        next_byte = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        return next_byte + BALANCE * out.aux_loss

    def evaluate(self) -> dict[str, float]:
        return {}
