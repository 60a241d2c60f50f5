"""Write an OLMoE model as a GGUF file, tensor by tensor: experts in Q4_0, 4.5 bits a weight.

The rest is in Q8_0, 8.5 bits; routers and norms stay in 32, as llama.cpp wants them.

Run: python benchmarks/edgemoe_decode/make_gguf.py MODEL FILE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

HOT = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
       "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q",
       "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
       "mlp.gate": "ffn_gate_inp"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Tensors:
    """A transformers directory's tensors by name."""

    def __init__(self, folder: Path) -> None:
        self._homes = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = safe_open(path, "pt")
            self._homes |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._homes[name].get_tensor(name).float().numpy()


def names(layers: int) -> Iterator[tuple[str, str]]:
    """Yield (name in the GGUF, name in the model) of all tensors but those of experts."""
    for ours, theirs in OUTSIDE.items():
        yield f"{theirs}.weight", f"{ours}.weight"
    for n in range(layers):
        for ours, theirs in HOT.items():
            yield f"blk.{n}.{theirs}.weight", f"model.layers.{n}.{ours}.weight"


def form(name: str) -> Type:
    """Return how a tensor is stored."""
    if "_exps" in name:
        return Type.Q4_0
    return Type.F32 if "norm" in name or "ffn_gate_inp" in name else Type.Q8_0


def write_gguf(folder: Path, target: Path) -> Path:
    """Write a model; the file is not there before it is whole."""
    config = json.loads((folder / "config.json").read_text())
    tensors, partial = Tensors(folder), target.with_name(f"{target.name}.partial")
    writer = gguf.GGUFWriter(partial, "olmoe")
    _describe(writer, config)
    hidden, inner, experts = (config[k] for k in ("hidden_size", "intermediate_size", "num_experts"))
    made = [(name, [source]) for name, source in names(config["num_hidden_layers"])]
    shapes = {name: tensors[source].shape for name, (source,) in made}
    for n in range(config["num_hidden_layers"]):
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            name, path = f"blk.{n}.ffn_{part}_exps.weight", f"model.layers.{n}.mlp.experts"
            made.append((name, [f"{path}.{e}.{part}_proj.weight" for e in range(experts)]))
            shapes[name] = (experts, *shape)
    for name, _ in made:
        kind = form(name)
        writer.add_tensor_info(name, shapes[name], np.dtype(np.float32), _nbytes(shapes[name], kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources in made:
        writer.write_tensor_data(np.concatenate([gguf.quantize(tensors[s], form(name)) for s in sources]))
    writer.close()
    os.replace(partial, target)
    return target


def _nbytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    print(write_gguf(Path(sys.argv[1]), Path(sys.argv[2])))
