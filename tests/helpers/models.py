"""Tiny random models of many families, built from their configurations in milliseconds; nothing is downloaded."""

import importlib

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96

# Families take from these what their configuration knows, under its own name or an alias of it.
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    # Experts. Three choices a token: with two, no 16-bit sum shows in which order, or how wide, it was added up.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "top_k_experts": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_hidden_size": 64,
    "router_hidden_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # Attention: plain, latent, indexed.
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # Linear attention and state spaces.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
}

_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SMALL_WINDOW_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}

# Every family with the standard experts interface, and what it needs besides the sizes.
FAMILIES = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "cohere2_moe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": _DENSE_THEN_SPARSE,
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots1": {},
    "dots3_note_text": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": _DENSE_THEN_SPARSE,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": _LINEAR_THEN_FULL,
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": _SMALL_WINDOW_HEADS,
    "inkling_text": _SMALL_WINDOW_HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR_THEN_FULL,
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "muse_spark_text": {},
    "nemotron_h": {},
    "olmoe": {},
    "phimoe": {"num_experts_per_tok": 2},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _LINEAR_THEN_FULL,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_THEN_FULL,
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}
TINY_FAMILIES = tuple(FAMILIES)


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
    """A model of two small layers in eval mode, run by Transformers' eager experts; the same weights at every call."""
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    config = AutoConfig.for_model(model_type, **sizes | FAMILIES.get(model_type, {}) | overrides)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = _auto_class(config).from_config(config, dtype=dtype, experts_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    return model.eval()


def is_known(model_type: str) -> bool:
    """Whether this version of Transformers has the family, and its experts behind the standard interface."""
    if model_type not in CONFIG_MAPPING:
        return False
    config = AutoConfig.for_model(model_type)
    model_class = _auto_class(config)._model_mapping[type(config)]
    return hasattr(importlib.import_module(model_class.__module__), "use_experts_implementation")


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    """Token ids `[batch, length]` without special ones, the same at every call."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def _auto_class(config: object) -> type:
    # A few families are reachable as a text model only inside a larger one.
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
