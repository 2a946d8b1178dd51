"""Tiny random models of the families that people train."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 40
"""Tokens of the labels; every embedding has eight rows more."""

TOKENS = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**TOKENS, **LAYERS, "intermediate_size": 48, "max_position_embeddings": 64}
SIZES = {**PLAIN, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

PACKABLE: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with windows": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=0
    ),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    "phi": PhiConfig(**PLAIN),
    "phi3": Phi3Config(**SIZES),
    # dropout of 0.1 in three places by default
    "gpt2": GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "opt": OPTConfig(
        **TOKENS, **LAYERS, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32
    ),
}
"""Those whose documents can share a row."""

PADDED_ONLY: dict[str, PretrainedConfig] = {
    "bloom": BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**TOKENS, **LAYERS, alibi=False),
    "falcon with ALiBi": FalconConfig(**TOKENS, **LAYERS, alibi=True),
}

FAMILIES = {**PACKABLE, **PADDED_ONLY}


def make_model(config: PretrainedConfig, **options: object) -> Any:
    """A model with the same random weights every time, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # a model changes the settings that it is made from, such as its attention
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).eval()
