"""Tiny random models of the eleven mixture-of-experts families, each made in a fraction of a second."""

from __future__ import annotations

import torch
import transformers

IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])
_SIZES = {
    "vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None, "num_experts_per_tok": 2,
}
_LATENT = {
    "intermediate_size": 32, "moe_intermediate_size": 24, "n_routed_experts": 4, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 4,
}
_OPTIONS = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4}),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {
        "intermediate_size": 32, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "num_experts": 4, "num_hidden_layers": 3, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", {"intermediate_size": 32, "moe_intermediate_size": 24, "num_experts": 4}),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "n_shared_experts": 2, "topk_method": "greedy",
                                   "n_group": None, "topk_group": None}),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": 4}),
    "gpt_oss": ("GptOss", {"intermediate_size": 24, "num_local_experts": 4}),
    "llama4_text": ("Llama4", {"intermediate_size": 24, "intermediate_size_mlp": 32,
                               "num_local_experts": 4}),
    "phimoe": ("Phimoe", {"intermediate_size": 24, "num_local_experts": 4}),
}
_SWITCH = {
    "vocab_size": 257, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_experts": 3,
    "num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
}
_CONFIGS = {"Llama4": "Llama4TextConfig"}
FAMILIES = (*_OPTIONS, "switch_transformers")
MOE_BLOCKS = {  # running numbers of the blocks that route, encoder before decoder
    **dict.fromkeys(_OPTIONS, (0, 1)), "qwen2_moe": (1, 2), "deepseek_v2": (1,), "deepseek_v3": (1,),
    "switch_transformers": (1, 3, 5),
}


def tiny(family, seed=0, **options):
    """Return a random model of a family, in evaluation mode, on the plain loop over experts."""
    torch.manual_seed(seed)
    if family == "switch_transformers":
        return transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**{**_SWITCH, **options})).eval()
    name, own = _OPTIONS[family]
    config = getattr(transformers, _CONFIGS.get(name, f"{name}Config"))(**{**_SIZES, **own, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model):
    """Return the logits of one short text."""
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    return model(input_ids=IDS).logits
