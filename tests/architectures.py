"""Decoder architectures of transformers, each with four layers of width 64 and random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_USUAL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OLD = {
    "vocab_size": 512, "hidden_size": 64, "n_embd": 64, "n_layer": 4, "n_head": 4, "num_hidden_layers": 4,
    "num_attention_heads": 4, "n_positions": 512, "max_position_embeddings": 512, "ffn_dim": 96,
    "word_embed_proj_dim": 64, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEAD = {"head_dim": 16}
_WINDOW = {"sliding_window": 8}  # shorter than the test's sequences, so that it matters
_EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip
_MLA = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip

_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "shared_intermediate_size": 48,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 48, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip

ARCHITECTURES = {
    "apertus": _USUAL,
    "arcee": _USUAL,
    "biogpt": _USUAL,
    "bitnet": _USUAL,
    "codegen": _OLD,
    "cohere": _USUAL,
    "cohere2": _USUAL | _WINDOW,
    "deepseek_v3": _USUAL | _MLA,
    "ernie4_5": _USUAL,
    "exaone4": _USUAL | _HEAD | _WINDOW,
    "falcon": _OLD,
    "gemma": _USUAL | _HEAD,
    "gemma2": _USUAL | _HEAD | _WINDOW,
    "gemma3_text": _USUAL | _HEAD | _WINDOW,
    "glm": _USUAL | _HEAD,
    "glm4": _USUAL | _HEAD,
    "gpt2": _OLD,
    "gpt_neox": _USUAL,
    "gpt_oss": _USUAL | _HEAD | _WINDOW | _EXPERTS,
    "gptj": _OLD,
    "granite": _USUAL,
    "granitemoe": _USUAL | _EXPERTS,
    "granitemoehybrid": _USUAL | _MAMBA,
    "helium": _USUAL | _HEAD,
    "lfm2": _USUAL,
    "llama": _USUAL,
    "ministral": _USUAL | _HEAD | _WINDOW,
    "mistral": _USUAL | _WINDOW,
    "mixtral": _USUAL | _EXPERTS,
    "nemotron": _USUAL,
    "olmo": _USUAL,
    "olmo2": _USUAL,
    "olmo3": _USUAL | _HEAD | _WINDOW,
    "olmoe": _USUAL | _EXPERTS,
    "opt": _OLD,
    "persimmon": _USUAL,
    "phi": _USUAL,
    "phi3": _USUAL | _WINDOW,
    "qwen2": _USUAL,
    "qwen2_moe": _USUAL | _EXPERTS,
    "qwen3": _USUAL | _HEAD,
    "qwen3_moe": _USUAL | _HEAD | _EXPERTS,
    "qwen3_next": _USUAL | _LINEAR,
    "seed_oss": _USUAL | _HEAD,
    "smollm3": _USUAL | _HEAD,
    "stablelm": _USUAL,
    "starcoder2": _USUAL | _WINDOW,
}

WRITTEN_OUT = {"gemma2", "gpt_oss"}
"""Softcap or attention sinks, which transformers computes under "eager" alone."""

NOT_PACKED = {
    "falcon": "AttentionInterface",
    "granitemoehybrid": "4 of its 4 layers",
    "nemotron": "4 of its 4 layers",
    "qwen3_next": "3 of its 4 layers",
    "stablelm": "4 of its 4 layers",
}
"""Architectures without support for packed rows, and a word of the reason."""


def build(name):
    """A model with weights of its own name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    attention = "eager" if name in WRITTEN_OUT else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
